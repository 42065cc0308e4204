"""TEAL's search (arXiv 2408.14690, algorithm 1): within a decoder layer, skip next where the layer's output suffers least.

It is here as the baseline that others publish. A move skips as many weights whichever projection makes it: STEP of a square
matrix of the hidden size, as in the authors' code. That code goes by the last quarter of every sequence; this goes by all of it.
"""

from collections.abc import Sequence

import numpy as np

from ..format.grid import GRID
from .layer import Layer, Shares

STEP = 0.05


def divide(layer: Layer, hidden_size: int) -> Shares:
    """The moves of one layer, read off at the points of the grid.

    Args:
        layer: the layer, dense; it skips afterwards.
        hidden_size: features of the hidden states.

    Returns:
        the shares, whose mean, each projection counted by its weights, is the point of the grid.
    """
    weights, unit = layer.weights, hidden_size**2
    skipped = dict.fromkeys(weights, 0.0)

    def error_with(name: str) -> float:
        layer.skip(name, _raised(skipped[name], unit / weights[name]))
        error = layer.error()
        layer.skip(name, skipped[name])
        return error

    def mean() -> float:
        return sum(skipped[name] * weights[name] for name in weights) / sum(weights.values())

    moves = [(0.0, dict(skipped))]
    while mean() < GRID[-1]:
        chosen = min((name for name in weights if skipped[name] < 1), key=error_with)
        skipped[chosen] = _raised(skipped[chosen], unit / weights[chosen])
        layer.skip(chosen, skipped[chosen])
        moves.append((mean(), dict(skipped)))
    means = [level for level, _ in moves]
    rows = {name: np.interp(GRID, means, [fractions[name] for _, fractions in moves]) for name in weights}
    return {name: tuple(np.maximum.accumulate(row).tolist()) for name, row in rows.items()}


def _raised(fraction: float, size: float) -> float:
    """A fraction after a move of a projection that is 1 / size units large."""
    return min(fraction + STEP * size, 1.0)


def passes(weights: Sequence[int], hidden_size: int) -> int:
    """About how many times a search runs a layer with projections of so many weights."""
    return round(len(weights) * GRID[-1] * sum(weights) / (STEP * hidden_size**2))
