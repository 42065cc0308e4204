"""A projection's thresholds and biases along the sparsity, as a checkpoint stores them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ascends(curve: Tensor) -> Tensor:
    """Whether thresholds [K] are what a checkpoint may store: finite, ascending, the first 0. A scalar bool, on their device."""
    return curve.isfinite().all() & (curve[0] == 0) & (curve.diff() >= 0).all()


def starts_at_zero(biases: Tensor) -> Tensor:
    """Whether biases [K, out] are what a checkpoint may store: finite, the first 0. A scalar bool, on their device."""
    return biases.isfinite().all() & (biases[0] == 0).all()


def threshold_at(curve: Tensor, grid: Sequence[float], sparsity: float) -> Tensor:
    """The threshold for a sparsity, linear between the points of the stored curve; or the bias.

    Args:
        curve: [K], float32, thresholds at the sparsities of `grid`; or [K, out], biases.
        grid: K ascending sparsities (fraction skipped).
        sparsity: within [grid[0], grid[-1]].

    Returns:
        scalar, float32; or [out].
    """
    right = next(k for k, point in enumerate(grid) if sparsity <= point)
    left = max(right - 1, 0)
    span = grid[right] - grid[left]
    weight = (sparsity - grid[left]) / span if span else 0.0
    return torch.lerp(curve[left], curve[right], weight)
