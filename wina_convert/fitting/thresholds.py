"""From score histograms to the threshold curve of a projection."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .histogram import ScoreHistogram

LEVELS = (0.25, 0.5, 0.75)
NEAR = 0.15  # a level this close to the default sparsity is replaced by it


def levels(sparsity: float) -> tuple[float, ...]:
    """The sparsities at which calibration runs the gated model: the default, and three that span the rest.

    Thresholds depend on what the gated layers before let through, so each level carries hidden states of its own.
    """
    others = [level for level in LEVELS if abs(level - sparsity) >= NEAR]
    return tuple(sorted({*others, sparsity} if sparsity else others))


def threshold_curve(
    histograms: Mapping[float, ScoreHistogram], grid: Sequence[float], asked: Callable[[float], float] = float
) -> Tensor:
    """Threshold of a projection at every sparsity of the grid.

    A point between two levels is solved in both histograms and interpolated; beyond the outer levels, the nearest counts.

    Args:
        histograms: of this projection's scores, by level.
        grid: ascending sparsities of the model, the first 0.
        asked: from one of them to what is asked of this projection (see `Budget.asked`).

    Returns:
        [len(grid)], float32, ascending from 0.
    """
    points = sorted(histograms)
    shares = [asked(sparsity) for sparsity in grid]
    solved = {level: histograms[level].quantiles(shares) for level in points}
    curve = []
    for number, sparsity in enumerate(grid):
        below = max((level for level in points if level <= sparsity), default=points[0])
        above = min((level for level in points if level >= sparsity), default=points[-1])
        weight = (sparsity - below) / (above - below) if above > below else 0.0
        low, high = solved[below][number], solved[above][number]
        curve.append(low + weight * (high - low) if sparsity else 0.0)
    return torch.tensor(curve, dtype=torch.float64).cummax(0).values.float()
