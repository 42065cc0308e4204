"""Products on a CPU: a few rows stream through compiled kernels, many go through one dense product.

Where the compiled kernels do not work, torch operations compute the same, more slowly, and a warning says so once.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from ..rule import dropped, gate
from . import reference

FEW_ROWS = 8  # rows of a call that read each row of the weight once for all of them
MOST_SHARING = 16  # heads that share keys in the compiled attention
WIDENED = 1 << 24  # bytes of weights that are widened to float32 at a time, for all rows
HALF = (torch.bfloat16, torch.float16)
# Of these, one makes products in half precision fast; under the names of Linux, on x86 and on ARM.
INSTRUCTIONS = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16", "svebf16"},
    torch.float16: {"amx_fp16", "avx512_fp16", "asimdhp"},
}
CPUINFO = Path("/proc/cpuinfo")


def gated_linear(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x over the inputs with |x_j| > tau_j, accumulated in float32; shapes as in `kernels.op.gated_linear`."""
    rows = x.shape[:-1].numel()
    few = rows <= FEW_ROWS
    if few and (kernels := compiled(x.dtype)):
        y: Tensor = kernels.columns(x, weight_t, tau, bias)
        return y
    if x.dtype not in HALF or (not few and multiplies(x.dtype)):
        return reference.gated_linear(x, weight_t, tau, bias)
    # Without instructions for it torch multiplies by a transposed half-precision weight element by element.
    with torch.autocast("cpu", enabled=False):
        y = (_bag if few else _widen)(x.reshape(rows, x.shape[-1]), weight_t, tau, bias)
    return y.view(*x.shape[:-1], weight_t.shape[1])


def gated_linears(
    x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Several products of the same x: a few rows in one parallel region; shapes as in `kernels.op.gated_linears`."""
    if x.shape[:-1].numel() <= FEW_ROWS and (kernels := compiled(x.dtype)):
        ys: list[Tensor] = kernels.several_columns(x, weights_t, taus, biases)
        return ys
    return [gated_linear(x, *others) for others in zip(weights_t, taus, biases, strict=True)]


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + b; shapes as in `kernels.op.dense_linear`."""
    if x.shape[:-1].numel() <= FEW_ROWS and (kernels := compiled(x.dtype)):
        y: Tensor = kernels.dots(x, weight, bias)
        return y
    return linear(x, weight, bias)


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` computes this: without gradient, of one dtype, and so many heads that share keys."""
    tensors = (query, key, value)
    plain = all(tensor.device.type == "cpu" and tensor.dtype is query.dtype for tensor in tensors)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    sharing = query.shape[1] <= MOST_SHARING * key.shape[1]
    return plain and sharing and not differentiable and compiled(query.dtype) is not None


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one token a sequence; shapes as in `kernels.op.attend`."""
    y: Tensor = compiled(query.dtype).attend(query, key, value, scaling)
    return y


@cache
def compiled(dtype: torch.dtype) -> Any:
    """The compiled kernels if they work for this dtype here, else None; the first call compiles or reads them from the disk."""
    if dtype not in (torch.float32, *HALF):
        return None
    try:
        from . import streaming

        one = torch.ones(1, 1, dtype=dtype, device="cpu")
        streaming.columns(one, one, torch.zeros(1, dtype=torch.float32, device="cpu"), None)
        streaming.dots(one, one, None)
        return streaming
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"the compiled CPU kernels do not work here ({type(error).__name__}: {reason}); "
            "gated products use torch operations and are slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for matrix products in this half precision that torch uses.

    Torch's own answer is yes for bfloat16 wherever there is AVX-512; without more its products are far slower than in float32.
    """
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    supported = bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    has = instructions()
    return supported and (has is None or not has.isdisjoint(INSTRUCTIONS[dtype]))


def instructions() -> frozenset[str] | None:
    """What the processor's kinds of instructions are called by Linux; None elsewhere."""
    try:
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        field, _, names = line.partition(":")
        if field.strip().lower() in ("flags", "features"):  # x86, ARM
            return frozenset(names.split())
    return None


def _bag(rows: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """[R, in] -> [R, out], each row the weighted sum of its active rows of weight_t; rounded before the bias is added."""
    keep = ~dropped(rows, tau)
    counts = keep.sum(1)
    active = keep.nonzero()[:, 1]
    y = embedding_bag(active, weight_t, counts.cumsum(0) - counts, mode="sum", per_sample_weights=rows[keep])
    return y if bias is None else y + bias


def _widen(rows: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """[R, in] -> [R, out], in float32 for a block of outputs at a time."""
    n_in, n_out = weight_t.shape
    active = gate(rows, tau).float()
    y = rows.new_empty(len(rows), n_out)
    columns = max(1, WIDENED // (4 * max(n_in, 1)))
    memory = active.new_empty(n_in * min(columns, n_out))  # one for all blocks: new pages cost as much as the product
    for left in range(0, n_out, columns):
        width = min(columns, n_out - left)
        block = slice(left, left + width)
        widened = memory[: n_in * width].view(n_in, width).copy_(weight_t[:, block])
        y[:, block] = active @ widened if bias is None else torch.addmm(bias[block].float(), active, widened)
    return y
