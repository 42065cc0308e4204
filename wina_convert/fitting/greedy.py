"""TEAL's search (arXiv 2408.14690, algorithm 1): within a decoder layer, skip next where the layer's output suffers least.

It is here as the baseline that others publish. A move skips as many weights whichever projection makes it: STEP of a square
matrix of the hidden size, as in the authors' code. That code goes by the last quarter of every sequence; this goes by all of it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ..format.grid import GRID
from ..runtime.linear import WinaLinear
from .calibrate import counting
from .histogram import ScoreHistogram

STEP = 0.05

Shares = dict[str, tuple[float, ...]]  # by projection, what it skips at each point of the grid


def divide_layer(
    run: Callable[[Tensor, int], Tensor], gates: Mapping[str, WinaLinear], states: Sequence[Tensor], hidden_size: int
) -> tuple[Shares, list[Tensor]]:
    """Divide the budget of one decoder layer among its projections, for every point of the grid.

    Args:
        run: the loaded layer, [B, S, hidden] and the number of the batch -> [B, S, hidden].
        gates: its gated projections by name, with weights and column norms; their thresholds are lost.
        states: the hidden states of the dense model before the layer, [B, S, hidden] each.
        hidden_size: features of the hidden states.

    Returns:
        the shares, whose mean, each projection counted by its weights, is the point of the grid; and the hidden states of the
        dense model behind the layer.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    for gate in gates.values():
        gate.set_threshold(0.0)
    with counting(gates) as histograms:
        outputs = [run(hidden, number) for number, hidden in enumerate(states)]
    return (divide(run, gates, histograms, states, outputs, hidden_size**2) if gates else {}), outputs


def divide(
    run: Callable[[Tensor, int], Tensor],
    gates: Mapping[str, WinaLinear],
    histograms: Mapping[str, ScoreHistogram],
    states: Sequence[Tensor],
    outputs: Sequence[Tensor],
    unit: int,
) -> Shares:
    """The moves of one layer, read off at the points of the grid.

    Args:
        run: the loaded layer.
        gates: its gated projections.
        histograms: of the scores of each, in the dense model.
        states: before the layer.
        outputs: what the dense layer makes of them.
        unit: weights of which a move skips STEP more.
    """
    weights = {name: gate.in_features * gate.out_features for name, gate in gates.items()}
    skipped = dict.fromkeys(gates, 0.0)

    def skip(name: str, fraction: float) -> None:
        gates[name].set_threshold(histograms[name].quantile(fraction))

    def error_with(name: str) -> float:
        skip(name, _raised(skipped[name], unit / weights[name]))
        found = (run(hidden, number) for number, hidden in enumerate(states))
        error = sum(float((a - b).double().square().sum()) for a, b in zip(found, outputs, strict=True))
        skip(name, skipped[name])
        return error

    def mean() -> float:
        return sum(skipped[name] * weights[name] for name in gates) / sum(weights.values())

    moves = [(0.0, dict(skipped))]
    while mean() < GRID[-1]:
        chosen = min((name for name in gates if skipped[name] < 1), key=error_with)
        skipped[chosen] = _raised(skipped[chosen], unit / weights[chosen])
        skip(chosen, skipped[chosen])
        moves.append((mean(), dict(skipped)))
    means = [level for level, _ in moves]
    rows = {name: np.interp(GRID, means, [fractions[name] for _, fractions in moves]) for name in gates}
    return {name: tuple(np.maximum.accumulate(row).tolist()) for name, row in rows.items()}


def _raised(fraction: float, size: float) -> float:
    """A fraction after a move of a projection that is 1 / size units large."""
    return min(fraction + STEP * size, 1.0)


def moves_of(weights: Sequence[int], hidden_size: int) -> int:
    """About how many times a search runs a layer with projections of so many weights."""
    return round(len(weights) * GRID[-1] * sum(weights) / (STEP * hidden_size**2))
