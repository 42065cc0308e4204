"""Attention that does not hold up a gated model on a CPU.

Where the processor has no instructions for half precision, torch's attention takes several times as long in bfloat16 as in
float32, which shows once the weights are skipped. The loader imports this when transformers is complete.

It stands in transformers' table under the name "sdpa" and does what stood there before, but for the modules of a model that
`use` was called on. A name of its own would not do: continuous batching, among others, goes by the names that it knows.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import cpu

SDPA = "sdpa"
MARK = "wina_attention"  # an attribute of the modules that compute attention here

before = ALL_ATTENTION_FUNCTIONS[SDPA]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", in float32 where that is faster; arguments and results are the same.

    A paged cache (`cache`) stores the keys as they come, so what goes into one stays as it is.
    """
    dtype = query.dtype
    widen = getattr(module, MARK, False) and kwargs.get("cache") is None
    if widen and query.device.type == "cpu" and dtype in cpu.HALF and not cpu.multiplies(dtype):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"].float()
    output, weights = before(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), weights


def use(model: Any, used: bool = True) -> None:
    """Let a model with transformers' "sdpa" compute attention here, or no longer."""
    for module in model.modules():
        setattr(module, MARK, used and model.config._attn_implementation == SDPA)


ALL_ATTENTION_FUNCTIONS.register(SDPA, attention)
