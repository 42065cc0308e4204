"""The gated product in half precision on a CPU.

torch multiplies bfloat16 and float16 by a transposed weight element by element where the processor has no instructions for
them: hundreds of times slower than memory allows. Here a few rows stream through `embedding_bag`, which reads the active rows
of the weight alone, and many go through float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...scoring import dropped, gate

FEW_ROWS = 8  # up to here a row costs about as much memory traffic as the weights it keeps
BLOCK = 1 << 24  # weights widened to float32 at a time: 64 MB


def gated_linear(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x over the inputs with |x_j| > tau_j, accumulated in float32; shapes as in `kernels.op.gated_linear`.

    With few rows the sum is rounded to the dtype of x before the bias is added.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = (_stream if len(rows) <= FEW_ROWS else _widen)(rows, weight_t, tau)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], weight_t.shape[1])


def _stream(rows: Tensor, weight_t: Tensor, tau: Tensor) -> Tensor:
    """[R, in] -> [R, out], each row the weighted sum of its active rows of weight_t."""
    keep = ~dropped(rows, tau)
    counts = keep.sum(1)
    columns = keep.nonzero()[:, 1]
    return embedding_bag(columns, weight_t, counts.cumsum(0) - counts, mode="sum", per_sample_weights=rows[keep])


def _widen(rows: Tensor, weight_t: Tensor, tau: Tensor) -> Tensor:
    """[R, in] -> [R, out] float32, the weight widened block by block."""
    active = gate(rows, tau).float()
    step = max(1, BLOCK // weight_t.shape[1])
    y = torch.zeros(len(rows), weight_t.shape[1])
    for x_block, weight_block in zip(active.split(step, 1), weight_t.split(step), strict=True):
        y.addmm_(x_block, weight_block.float())
    return y
