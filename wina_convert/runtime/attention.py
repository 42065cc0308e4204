"""Attention that does not hold up a gated model on a CPU.

Where the processor has no instructions for half precision, torch's attention takes several times as long in bfloat16 as in
float32, which shows once the weights are skipped. The loader imports this when transformers is complete.
"""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import cpu

SDPA = "wina_sdpa"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", in float32 where that is faster; arguments and results are the same."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in cpu.HALF and not cpu.multiplies(dtype):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"].float()
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), weights


def use(model: Any) -> None:
    """Let a model that was loaded with transformers' "sdpa", its default, compute attention here."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SDPA)


ALL_ATTENTION_FUNCTIONS.register(SDPA, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA, sdpa_mask)
