"""Divides the sparsity of a model by what each projection, skipping alone, does to the output of its decoder layer.

TEAL's search (`fitting.greedy`) runs a layer for every step of every projection, on top of all steps before, and lets every
layer skip the same. Here the error of each projection is measured at a few levels and taken for the same whatever the others
skip, for errors that are hardly correlated add up. That takes a fiftieth of the runs and divides a layer nearly alike. And
since errors are measured as parts of the hidden states, token by token, they are compared across the layers as well.

What becomes of an error in the layers behind is not measured, and some layers would be trusted with too much. So the division
that is used is halfway to the prior by type: on three small models that loses less than either of the two.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..format.grid import GRID
from .layer import Layer, Shares, remembering

LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)
PARTS = 400  # that a projection is skipped in
REMEMBERED = 1 / 3  # of the products of a layer of Llama's kind while each projection skips in turn


def errors(layer: Layer) -> dict[str, list[float]]:
    """Of each projection of a layer, what it does to the layer's output where it skips LEVELS of its inputs.

    Args:
        layer: the layer, dense; it is dense afterwards.
    """
    found: dict[str, list[float]] = {}
    with remembering(layer) as quick:
        for name in layer.gates:
            found[name] = []
            for level in LEVELS:
                layer.skip(name, level)
                found[name].append(quick.part_lost())
            layer.skip(name, 0.0)
    return found


def least(errors: Mapping[str, Sequence[float]], weights: Mapping[str, int]) -> Shares:
    """The shares at which the sum of errors is least, for every point of the grid.

    Each projection is skipped part by part; of all parts of all projections those come first that cost least for each weight.

    Args:
        errors: by projection, at each of LEVELS.
        weights: of each projection.

    Returns:
        the shares, whose mean, each projection counted by its weights, is the point of the grid.
    """
    sizes = np.array([weights[name] for name in errors], dtype=np.float64)
    costs = np.stack([np.diff(curve(errors[name])) / weights[name] for name in errors])
    costs = np.maximum.accumulate(costs, axis=1)  # the parts of a projection keep their order
    order = np.argsort(costs, axis=None, kind="stable") // PARTS  # which projection skips next
    means = np.concatenate([[0.0], np.cumsum(sizes[order])]) / (PARTS * sizes.sum())
    shares: Shares = {}
    for row, name in enumerate(errors):
        skipped = np.concatenate([[0], np.cumsum(order == row)]) / PARTS
        shares[name] = tuple(np.interp(GRID, means, skipped).tolist())
    return shares


def halfway(shares: Mapping[str, Sequence[float]], prior: Mapping[str, Sequence[float]]) -> Shares:
    """The mean of two divisions, at every point of the grid.

    Args:
        shares: as `least` finds them; the head, which is in no layer, is not among them: it skips what the whole does.
        prior: of all projections.
    """
    return {name: tuple(np.mean([shares.get(name, GRID), share], axis=0).tolist()) for name, share in prior.items()}


def curve(errors: Sequence[float]) -> NDArray[np.float64]:
    """The error after each part, [PARTS + 1], from that at LEVELS: a power of the level between them, before and behind too."""
    levels = np.log(LEVELS)
    known = np.log(np.maximum(np.maximum.accumulate(errors), np.finfo(np.float64).tiny))
    powers = np.diff(known) / np.diff(levels)
    at = np.log(np.arange(1, PARTS + 1) / PARTS)
    inside = np.interp(at, levels, known)
    before = known[0] + powers[0] * (at - levels[0])
    behind = known[-1] + powers[-1] * (at - levels[-1])
    found = np.where(at < levels[0], before, np.where(at > levels[-1], behind, inside))
    return np.concatenate([[0.0], np.exp(found)])


def passes(weights: Sequence[int], hidden_size: int) -> int:
    """How many runs of a layer with projections of so many weights this costs, about."""
    return 1 + round((1 - REMEMBERED) * len(weights) * len(LEVELS))
