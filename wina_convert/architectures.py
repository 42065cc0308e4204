"""What is known of model families, as data. This is the only file that names them.

A listed family is: where its decoder layers are, which projections of a layer read the hidden state, what a score and an
allocation need to know of them, and which changes of basis its structure allows. Of any other type of model the structure is
discovered; the tables DENSE and PRIOR say what is known of its parts by their names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Residual:
    """How the residual stream is read and written, where RMSNorms and linear maps alone do so.

    Such a stream can be turned by any orthogonal matrix: an RMSNorm without its gain commutes with it (SliceGPT,
    arXiv 2401.15024, section 3).

    Attributes:
        readers: the norms of a decoder layer, each with the projections that read it, relative to the layer.
        writers: the projections whose output is added to the stream, relative to the layer.
        embedding: dotted path of the input embedding in the causal LM.
        final: dotted path of the norm before the head.
        head: dotted path of the output embedding.
        offset: what a norm adds to its stored weight to make the gain: 1 for Gemma, else 0.
    """

    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    embedding: str = "model.embed_tokens"
    final: str = "model.norm"
    head: str = "lm_head"
    offset: float = 0.0


@dataclass(frozen=True)
class Values:
    """Where attention makes its values and reads their mixture.

    Attention mixes values linearly, head by head, so the values of a key-value head may have any invertible basis.

    Attributes:
        projection: makes the values, relative to a decoder layer.
        output: reads the mixed values, relative to a decoder layer.
        rows: which outputs of `projection` are values: "all"; "last", behind queries and keys; or "interleaved", where every
            head has its query, key and value one after another.
    """

    projection: str
    output: str
    rows: Literal["all", "last", "interleaved"] = "all"


@dataclass(frozen=True)
class Architecture:
    """Where the gated projections of a family are, how they are told apart, and what bases it may be given.

    Attributes:
        layers: dotted path of the list of decoder layers in the causal LM.
        attention: projections of the attention block, relative to a decoder layer.
        mlp: projections of the feed-forward block, relative to a decoder layer.
        weighted: those of them whose inputs the code of WINA's authors weights by column norms: the ones with the keys or the
            gate in them.
        residual: how the residual stream is read and written; or why it cannot be turned.
        values: where the values are; None: no test has turned them.
        shared: groups of them that read the same input, in the order in which a layer calls them.
        dense: linear maps of the decoder layers that are not gated, relative to a layer, each with the reason.
        outputs: the length of the tuple that a decoder layer returns; 0: it returns the hidden states alone.
        beside: modules of a model of more than text, beside its decoder, that text passes as well.
        named: what the table PRIOR does not tell of them by the last part of their names, in the same terms.
    """

    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    weighted: tuple[str, ...]
    residual: Residual | str
    values: Values | None
    shared: tuple[tuple[str, ...], ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    outputs: int = 0
    beside: frozenset[str] = frozenset()
    named: Mapping[str, float] = field(default_factory=dict)

    @property
    def prior(self) -> dict[str, float]:
        """By projection, the sparsity to ask of it where the whole is asked for 50%; see `QUERY` below."""
        names = (*self.attention, *self.mlp)
        return {name: self.named.get(name, PRIOR.get(name.rpartition(".")[2], 0.5)) for name in names}


LAYER_NORM = "its LayerNorms subtract the mean over the features"
POST_NORM = "its norms act with a gain for every feature on what a block adds to the residual stream"

# What thresholds that were learned on three small models (1 to 6.5 million parameters) skip at 50%, by type of projection, in
# the mean: a prior, not a measurement of any other model. A fused matrix has the mean of its parts, counted alike, as they are
# where every query head has keys and values of its own. The first matrix of an MLP without a gate counts as gate and up: it
# does the work of both.
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = 0.59, 0.45, 0.345, 0.54, 0.455, 0.49, 0.55
QKV, GATE_UP = (QUERY + KEY + VALUE) / 3, (GATE + UP) / 2

# by the last part of a name; one that is not here counts as 0.5
PRIOR = {
    "q_proj": QUERY,
    "k_proj": KEY,
    "v_proj": VALUE,
    "o_proj": OUT,
    "qkv_proj": QKV,
    "query_key_value": QKV,
    "c_attn": QKV,
    "Wqkv": QKV,
    "gate_proj": GATE,
    "up_proj": UP,
    "gate_up_proj": GATE_UP,
    "down_proj": DOWN,
    "fc1": GATE_UP,
    "fc2": DOWN,
}

# Linear maps that are never gated: a pattern of the name within a decoder layer, and why.
DENSE = {
    r"(^|\.)(mamba|mixer|ssm)\.(?!(shared_)?experts\.)": (
        "belongs to a state-space block, whose kernels read the weight past the module"
    ),
    r"(^|\.)(in_proj_ba?|in_proj_a|[ab]_proj|dt_proj|x_proj)$": "sets how fast a recurrent state forgets",
    r"(^|\.)(router|gate|shared_expert_gate)$": "chooses experts",
    r"(^|\.)altup\.": "mixes the several hidden states of a token, of which there are too few to skip any",
}

# Modules of experts that get every token, sorted by expert and as zeros where it is not chosen, and store matrices as [in, out].
SORTED_EXPERTS = frozenset({"Llama4TextExperts"})

RECURRENT = "it has recurrent state only, whose kernels read the weights past the modules"
SOUND = "it writes codes of sound and no text"
DRAFTS = "it drafts for another model, whose keys and values it reads"

SHARED = (
    "several of its layers run one and the same block of attention and feed-forward, whose weights are stored once, and each of "
    "them would need thresholds of its own"
)

# Types that cannot be converted, and why.
REFUSED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), RECURRENT),
    **dict.fromkeys(("musicgen", "musicgen_melody"), SOUND),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFTS),
    **dict.fromkeys(("zamba", "zamba2"), SHARED),
    "blt": "it reads bytes with three transformers, none of which has the decoder layers alone",
    "hy_v4": "some of its layers attend to the tokens that an earlier layer chose, which go past the hidden states",
    "longcat_flash": "each of its layers is two, with a mixture of experts beside both, and counts as two in its config",
    "zaya": "its layers pass on what their routers computed, beside the hidden states",
    "hrm_text": "it runs two lists of layers over and over, and not each layer once",
    "cpmant": "it puts states of its own before those of a text",
    "lfm3": "its files call some projections otherwise than the model does",
    "mllama": "some of its layers run for images alone",
    "prophetnet": "it predicts several tokens at once, in streams beside its hidden states",
    "reformer": "its layers are reversible and pass on two hidden states",
    "xlm": "its layers are parts in lists beside each other, and no modules of their own",
    "xlnet": "its hidden states are by position first and not by sequence",
}

PRE_NORM = Residual(
    readers=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)

# The authors' code knows k_proj and gate_proj, and on Phi qkv_proj and gate_up_proj. By the same rule GPT-2 and GPT-NeoX have
# their fused matrix of queries, keys and values, and the matrix before the activation function, which is where the gate stands.
SEPARATE = Architecture(
    layers="model.layers",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    weighted=("self_attn.k_proj", "mlp.gate_proj"),
    residual=PRE_NORM,
    values=Values("self_attn.v_proj", "self_attn.o_proj"),
    shared=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
)
GEMMA = replace(SEPARATE, residual=replace(PRE_NORM, offset=1.0))
POST_NORMED = replace(SEPARATE, residual=POST_NORM)
FUSED = Architecture(
    layers="model.layers",
    attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    weighted=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    residual=Residual(
        readers=(
            ("input_layernorm", ("self_attn.qkv_proj",)),
            ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    values=Values("self_attn.qkv_proj", "self_attn.o_proj", "last"),
)
NEOX = Architecture(
    layers="gpt_neox.layers",
    attention=("attention.query_key_value", "attention.dense"),
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    weighted=("attention.query_key_value", "mlp.dense_h_to_4h"),
    named={"attention.dense": OUT, "mlp.dense_h_to_4h": GATE_UP, "mlp.dense_4h_to_h": DOWN},
    residual=LAYER_NORM,
    values=Values("attention.query_key_value", "attention.dense", "interleaved"),
)
GPT2 = Architecture(
    layers="transformer.h",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
    weighted=("attn.c_attn", "mlp.c_fc"),
    named={"attn.c_proj": OUT, "mlp.c_fc": GATE_UP, "mlp.c_proj": DOWN},
    residual=LAYER_NORM,
    values=Values("attn.c_attn", "attn.c_proj", "last"),
)

# config.json's model_type -> family
ARCHITECTURES: dict[str, Architecture] = {
    "llama": SEPARATE,  # Llama 2, 3, 3.1, 3.2, 3.3
    "mistral": SEPARATE,
    "qwen2": SEPARATE,  # Qwen2, Qwen2.5
    "qwen3": SEPARATE,
    "gemma": GEMMA,
    "gemma2": POST_NORMED,
    "gemma3_text": POST_NORMED,  # Gemma 3, text only
    "olmo2": POST_NORMED,
    "phi3": FUSED,  # Phi-3, Phi-4
    "gpt_neox": NEOX,  # GPT-NeoX, Pythia
    "gpt2": GPT2,
}
