"""The rule: which inputs of a projection are kept for a token, and what a token reads. Calibration and inference call it.

WINA (arXiv 2505.19427, section 3) scores input j of y = W x with |x_j| * ||W[:, j]||_2. An input is dropped when its score
is at most the projection's threshold t, so ties are dropped and t = 0 changes nothing. The comparison made is
|x_j| <= t / ||W[:, j]||_2, in float32, with the right side computed once when the model is loaded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


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
    bits = BITS[x.itemsize]
    kept = dropped(x, tau).to(bits) - 1  # all bits or none: on a CPU this takes a fraction of the time of `where`
    return (x.view(bits) & kept).view(x.dtype)


def bytes_read(nbytes: int, in_features: int, skipped: float) -> int:
    """Bytes that a token reads of a gated projection: the rows of the weight that are kept, and the cutoffs.

    Args:
        nbytes: of the whole weight.
        in_features: its inputs; a cutoff is a float32 each.
        skipped: fraction of the inputs that are skipped.
    """
    return round(nbytes * (1 - skipped)) + 4 * in_features


def overall(fractions: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Mean of a fraction over projections, each counted by its weights."""
    return sum(fractions[name] * weights[name] for name in fractions) / sum(weights[name] for name in fractions)
