"""The rule: which inputs of a projection are kept for a token. Calibration and inference both call it.

WINA (arXiv 2505.19427, section 3) scores input j of y = W x with |x_j| * ||W[:, j]||_2. An input is dropped when its score
is at most the projection's threshold t, so ties are dropped and t = 0 changes nothing. The comparison made is
|x_j| <= t / ||W[:, j]||_2, in float32, with the right side computed once when the model is loaded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def column_norms(weight_t: Tensor) -> Tensor:
    """L2 norm of every column of W, from its contiguous transpose.

    Args:
        weight_t: [in, out], any floating dtype, contiguous. Another memory order would sum in another order.

    Returns:
        [in], float32, accumulated in float32.
    """
    norms: Tensor = torch.linalg.vector_norm(weight_t, dim=1, dtype=torch.float32)
    return norms


def scores(x: Tensor, norms: Tensor) -> Tensor:
    """Score of every input: |x_j| * norms_j (arXiv 2505.19427, equation 4).

    Args:
        x: [..., in], any floating dtype.
        norms: [in], float32.

    Returns:
        [..., in], float32: half precision cannot overflow.
    """
    return x.abs().float() * norms


def cutoffs(threshold: Tensor, norms: Tensor) -> Tensor:
    """The magnitude each input must exceed: tau_j = threshold / norms_j.

    A column of zeros scores 0, which no threshold lets through: its cutoff is infinite, and dropping it changes no output.

    Args:
        threshold: scalar, float32, at least 0.
        norms: [in], float32, at least 0.

    Returns:
        [in], float32.
    """
    return torch.where(norms > 0, threshold / norms, torch.inf)


def dropped(x: Tensor, tau: Tensor) -> Tensor:
    """Mask of the inputs to skip: |x_j| <= tau_j. A NaN is never skipped, so that it stays visible.

    Args:
        x: [..., in], any floating dtype; compared in float32.
        tau: [in], float32.

    Returns:
        [..., in], bool.
    """
    return x.abs() <= tau


def gate(x: Tensor, tau: Tensor) -> Tensor:
    """x with the inputs to skip set to zero; same shape and dtype as x [..., in]."""
    return torch.where(dropped(x, tau), torch.zeros((), dtype=x.dtype, device=x.device), x)


def threshold_at(curve: Tensor, grid: Sequence[float], sparsity: float) -> Tensor:
    """The threshold for a sparsity, linear between the points of the stored curve.

    Args:
        curve: [K], float32, thresholds at the sparsities of `grid`.
        grid: K ascending sparsities (fraction skipped).
        sparsity: within [grid[0], grid[-1]].

    Returns:
        scalar, float32.
    """
    right = next(k for k, point in enumerate(grid) if sparsity <= point)
    left = max(right - 1, 0)
    span = grid[right] - grid[left]
    weight = (sparsity - grid[left]) / span if span else 0.0
    return torch.lerp(curve[left], curve[right], weight)
