"""Attention that does not hold up a gated model on a CPU.

A single token is computed as a vector for each head, in bfloat16 at a tenth of the memory's speed, though several heads share
keys and values (grouped-query attention): a compiled kernel goes through both once. Under a mask, for which it has no code, or
where it is not there, heads that share keys are computed as tokens of one. And where the processor has no instructions for half
precision, torch's attention takes several times as long in bfloat16 as in float32. All this shows once the weights are skipped.
The loader imports it when transformers is complete.

It stands in transformers' table under the name "sdpa" and does what stood there before, but for the modules of a model that
`use` was called on. A name of its own would not do: continuous batching, among others, goes by the names that it knows.
"""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import attend, cpu

SDPA = "sdpa"
UNUSUAL = ("position_bias", "softcap")  # arguments that only transformers' own function knows what to do with
MARK = "wina_attention"  # an attribute of the modules that compute attention here

before = ALL_ATTENTION_FUNCTIONS[SDPA]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", one token by a kernel of its own or as several, in float32 where that is faster; same arguments.

    A paged cache (`cache`) stores the keys as they come, so what goes into one stays as it is.
    """
    dtype = query.dtype
    if not getattr(module, MARK, False) or kwargs.get("cache") is not None or query.device.type != "cpu":
        unchanged: tuple[Tensor, None] = before(module, query, key, value, attention_mask, **kwargs)
        return unchanged
    plain = all(kwargs.get(name) is None for name in UNUSUAL)
    alone = plain and query.shape[2] == 1 and len(query) == len(key)
    unmasked = alone and attention_mask is None and not kwargs.get("dropout") and not is_compiling()
    if unmasked and cpu.attends(query, key, value):
        scaling = kwargs.get("scaling")
        return attend(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None
    if dtype in cpu.HALF and not cpu.multiplies(dtype):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"].float()
    # torch has no fast code for a matrix with one vector in half precision.
    if alone and (query.shape[1] > key.shape[1] or query.dtype in cpu.HALF):
        y = _together(query, key, value, attention_mask, kwargs.get("dropout", 0.0), kwargs.get("scaling"))
        return y.to(dtype), None
    output, weights = before(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), weights


def _together(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of one token as of several: its heads that share keys, or itself twice.

    Args:
        query: [batch, heads, 1, size]; heads that share a key stand beside each other.
        key: [batch, kv_heads, keys, size].
        value: [batch, kv_heads, keys, its size].
        mask: [batch, 1 or heads, 1, keys], boolean or added to the scores; or None.
        dropout: probability.
        scaling: of the scores; None: one over the root of the size.

    Returns:
        [batch, 1, heads, size of a value].
    """
    batch, heads, _, size = query.shape
    group = heads // key.shape[1]
    query = query.reshape(batch, -1, group, size)
    if group == 1:
        query = query.expand(-1, -1, 2, -1)
    if mask is not None and mask.shape[1] == heads:
        mask = mask.reshape(len(mask), -1, group, mask.shape[-1])
    y = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return y[:, :, :group].reshape(batch, 1, heads, value.shape[-1])


def use(model: Any, used: bool = True) -> None:
    """Let a model with transformers' "sdpa" compute attention here, or no longer."""
    for module in model.modules():
        setattr(module, MARK, used and model.config._attn_implementation == SDPA)


ALL_ATTENTION_FUNCTIONS.register(SDPA, attention)
