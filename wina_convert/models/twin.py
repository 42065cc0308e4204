"""A shrunken twin of a model: the same class and every kind of its layers, few of them and narrow, with random weights.

What a conversion does to a type of model that no test has seen is tried on the twin first, in seconds.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import SourceError, one_line
from ..format.experts import COUNTS, experts_given
from ..runtime.experts import stored_transposed
from .structure import decoder_layers

HEAD_DIM = 16  # the least features of a head: a quarter of them may be rotary, in pairs
VOCABULARY = 512
WINDOW = 8  # positions that a layer with a sliding window sees: fewer than the twin's tokens, so that it matters
MOST_LAYERS = 16
SHORT = ("short_factor", "long_factor")  # of rotary embeddings: a number for every pair of features

HANDED = {"adapter_out_dim"}  # features that a part of images or sound hands to the text part
LAYERS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers")
SHARING = "num_kv_shared_layers"
PARTIAL = "partial_rotary_factor"  # of the features of a head
SECTIONS = ("mrope_section",)  # of these pairs, how many tell of time, height and width

# Fields that count features. All are divided by one number, so that what is a product of others stays one.
_WIDTH = re.compile(
    r"(\w+_)?(hidden|intermediate|ffn|mlp|embed|embedding|model)_(\w+_)?(size|dim)|(hidden|intermediate)_size_\w+"
    r"|(\w+_)?(head_dim|lora_rank)|d_model|n_embd|n_inner|d_ff|dff|dim_ff|d_kv|dim_head|kv_channels|rotary_dim|lru_width|rope_dim"
    r"|mamba_(d_head|headdim|d_ssm|d_state)|d_head"
)
_WINDOW = re.compile(r"(\w+_)?(sliding_window|window_size|(attention|mamba)_chunk_size)(_\w+)?")
_TOKEN = re.compile(r"(\w+_)?token_(id|index)")
_DEPTH = re.compile(r"depth|(\w+_)?layers")  # of a part that is not for text
# Fields that say nothing of how a model is built.
LEFT_OUT = (
    *("architectures", "auto_map", "transformers_version", "transformers_weights"),
    *("dtype", "torch_dtype", "quantization_config"),
)


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """What tells the kinds of decoder layers of a model apart: the layer's type in the config, and the classes in it by name."""
    layers = list(model.get_submodule(decoder_layers(model)).children())
    named = getattr(model.config.get_text_config(), "layer_types", None)
    types = named if isinstance(named, list) and len(named) == len(layers) else [""] * len(layers)
    return [
        " ".join([str(kind), *(f"{name}:{type(part).__name__}" for name, part in layer.named_modules())])
        for kind, layer in zip(types, layers, strict=True)
    ]


def make_twin(model: PreTrainedModel, seed: int = 0, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """The twin of a model, float32, on the CPU.

    Args:
        model: on the meta device.
        seed: of the weights.
        vocabulary: the most tokens that it knows.

    Raises:
        SourceError: transformers cannot build it.
    """
    kinds = layer_kinds(model)
    needed = 1 + max(kinds.index(kind) for kind in kinds)
    if sharing := _sharing(model.config):
        needed = 2 * (1 + max(kinds.index(kind) for kind in kinds[:-sharing]))  # half of the twin's layers share too
    try:
        config = shrink(model.config, len(kinds), min(max(needed, 2), len(kinds), MOST_LAYERS), vocabulary)
        with torch.device("cpu"), torch.random.fork_rng(devices=()):
            twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever transformers makes of numbers that were never tried together
        raise SourceError(
            f"no small model of type {model.config.model_type!r} could be built to try a conversion on "
            f"({one_line(error)}); the type is not supported"
        ) from error
    twin.train(False)
    twin.config._experts_implementation = "eager"  # the others need widths that are multiples of 16 bytes
    random_weights(twin, seed)
    return twin


def _sharing(config: PreTrainedConfig) -> int:
    """How many of the last layers take the keys and values of the last one of their type before them."""
    return int(getattr(config.get_text_config(), SHARING, 0) or 0)


def shrink(config: PreTrainedConfig, layers: int, kept: int, vocabulary: int = VOCABULARY) -> PreTrainedConfig:
    """A config of the same type with fewer layers, all widths divided alike, and a small vocabulary.

    Args:
        config: of the model.
        layers: its decoder layers.
        kept: how many of them, from the first on, the result has.
        vocabulary: the most tokens that it knows.

    Of a model of more than text the text part becomes narrow, and every other part keeps its widths and one layer.
    """
    text = config.get_text_config()
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    small = {name: shrink(part, layers, kept, vocabulary) for name, part in parts.items() if part is text}
    small |= {name: _shallow(part, [*small.values()]) for name, part in parts.items() if part is not text}
    left_out = (*LEFT_OUT, *parts)
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    factor, experts = (_factor(config, fields) if text is config else 1), _experts(fields)
    counts = {*LAYERS, config.attribute_map.get("num_hidden_layers", "")}

    def shrunk(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shrunk(str(key), one) for key, one in _of_layers(value, kept).items()}
        if isinstance(value, list):
            short = value[: len(value) // factor] if name in SHORT else value
            if name in SECTIONS and all(part % factor == 0 for part in value):
                short = [part // factor for part in value]
            if _WIDTH.fullmatch(name):  # of each layer
                short = [part // factor for part in value]
            return short[:kept] if len(short) == layers else short
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if name in counts:
            return kept
        if name == SHARING:
            return min(value, kept // 2)
        if _WIDTH.fullmatch(name):
            return value // factor
        if _WINDOW.fullmatch(name):
            return min(value, WINDOW)
        if name in COUNTS:
            return min(value, experts)
        if "vocab" in name:
            return min(value, vocabulary)
        return min(value, vocabulary - 1) if _TOKEN.fullmatch(name) else value

    return type(config)(**{name: shrunk(name, value) for name, value in fields.items()} | small)


def _shallow(config: PreTrainedConfig, text: Sequence[PreTrainedConfig]) -> PreTrainedConfig:
    """A config with one layer; where it counts what it hands to the text part, it is for the narrow one."""
    fields = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}
    one: dict[str, Any] = {name: 1 for name, value in fields.items() if _DEPTH.fullmatch(name) and type(value) is int}
    by_layer = {name: _of_layers(value, 1) for name, value in fields.items() if isinstance(value, dict)}
    handed = {name: part.hidden_size for part in text for name in HANDED & fields.keys()}
    return type(config)(**fields | by_layer | one | handed)


def _of_layers(value: dict[Any, Any], kept: int) -> dict[Any, Any]:
    """Without the entries by the number of a layer that is not kept."""
    return {key: one for key, one in value.items() if not str(key).isdigit() or int(key) < kept}


def _experts(fields: dict[str, Any]) -> int:
    """The fewest experts of which the twin may choose: twice as many as a token is given, and in every group enough to choose."""
    given, groups = experts_given(fields) or 1, fields.get("n_group") or fields.get("num_expert_group") or 1
    chosen = fields.get("topk_group") or groups
    return -(-max(2 * given, groups * max(2, -(-given // chosen))) // groups) * groups


def _factor(config: PreTrainedConfig, fields: dict[str, Any]) -> int:
    """The largest number that divides every width and leaves a head its least features."""
    by_field = [value for name, value in fields.items() if _WIDTH.fullmatch(name)]
    by_layer = [width for value in by_field if isinstance(value, list) for width in value]
    widths = [width for width in (*by_field, *by_layer) if type(width) is int and width > 0]
    heads = fields.get(config.attribute_map.get("num_attention_heads", "num_attention_heads"))
    hidden = fields.get(config.attribute_map.get("hidden_size", "hidden_size"))
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else HEAD_DIM
    width = fields.get("head_dim") or derived
    rotary = [value // 4 for name, value in fields.items() if name.endswith("rope_head_dim") and type(value) is int]
    common = math.gcd(*widths, width)
    rope = config.to_dict().get("rope_parameters")
    part = (
        (rope.get(PARTIAL) if isinstance(rope, dict) else None)
        or fields.get(PARTIAL)
        or fields.get("rotary_pct")
        or 1.0
    )

    def whole(factor: int) -> bool:
        """Whether what is rotary of a narrow head is pairs of features, as it is of a wide one."""
        return int(part * width) % 2 != 0 or int(part * (width // factor)) % 2 == 0

    largest = min(width // HEAD_DIM, *rotary, width)
    return max((f for f in range(1, largest + 1) if common % f == 0 and whole(f)), default=1)


def random_weights(model: nn.Module, seed: int) -> None:
    """Weights at which every layer changes the hidden state and the logits differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    owners = dict(model.named_modules())
    with torch.no_grad():
        for path, parameter in model.named_parameters():  # a tied head is not named again
            owner, _, name = path.rpartition(".")
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if isinstance(owners[owner], nn.Embedding):
                parameter.copy_(0.05 * noise)  # small: else a tied head answers with the token it was given
            elif (axis := _inputs(owners[owner], name, parameter)) is not None:
                inputs = parameter.shape[axis]
                scale = torch.empty(inputs).uniform_(0.5, 2.0, generator=generator) / inputs**0.5
                alone = [inputs if dimension == axis else 1 for dimension in range(parameter.dim())]
                parameter.copy_(noise * scale.view(alone))  # columns of unlike norms: the rule depends on them
            else:  # biases, and the weights of norms, which are 1 or (Gemma) 0
                parameter.add_(0.2 * noise)


def _inputs(owner: nn.Module, name: str, parameter: Tensor) -> int | None:
    """The dimension of a parameter along which the inputs of a linear map are; None: it is of no linear map."""
    if isinstance(owner, (nn.Linear, Conv1D)) and name == "weight":
        return 0 if isinstance(owner, Conv1D) else 1
    if parameter.dim() == 3 and name.endswith("_proj"):  # of all experts of a layer
        return 1 if stored_transposed(owner) else 2
    return None
