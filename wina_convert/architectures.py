"""The supported model families, as data. This is the only file that names them.

A family is: where its decoder layers are, and which projections of a layer read the hidden state. To add one, add a line
here and a tiny random model to tests/families.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Where the gated projections of a family are.

    Attributes:
        layers: dotted path of the list of decoder layers in the causal LM.
        attention: projections of the attention block, relative to a decoder layer.
        mlp: projections of the feed-forward block, relative to a decoder layer.
        shared: groups of them that read the same input, in the order in which a layer calls them.
    """

    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...] = ()


SEPARATE = Architecture(
    layers="model.layers",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    shared=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
)
FUSED = Architecture(
    layers="model.layers",
    attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_up_proj", "mlp.down_proj"),
)
NEOX = Architecture(
    layers="gpt_neox.layers",
    attention=("attention.query_key_value", "attention.dense"),
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
GPT2 = Architecture(
    layers="transformer.h",
    attention=("attn.c_attn", "attn.c_proj"),
    mlp=("mlp.c_fc", "mlp.c_proj"),
)

# config.json's model_type -> family
ARCHITECTURES: dict[str, Architecture] = {
    "llama": SEPARATE,  # Llama 2, 3, 3.1, 3.2, 3.3
    "mistral": SEPARATE,
    "qwen2": SEPARATE,  # Qwen2, Qwen2.5
    "qwen3": SEPARATE,
    "gemma2": SEPARATE,
    "gemma3_text": SEPARATE,  # Gemma 3, text only
    "olmo2": SEPARATE,
    "phi3": FUSED,  # Phi-3, Phi-4
    "gpt_neox": NEOX,  # GPT-NeoX, Pythia
    "gpt2": GPT2,
}
