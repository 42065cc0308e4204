"""TEAL's search: which projection skips next, and what that leaves at the points of the grid."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.layers import STATES, lost, run_of, three_gates
from wina_convert.errors import CalibrationError
from wina_convert.fitting import greedy
from wina_convert.fitting.greedy import divide, passes
from wina_convert.fitting.layer import Layer, dense_layer
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear

pytestmark = pytest.mark.slow


@pytest.fixture
def gates() -> dict[str, WinaLinear]:
    return three_gates()


def searched_by_hand(gates: dict[str, WinaLinear], hidden_size: int) -> dict[str, list[float]]:
    """The same in float64 with exact quantiles, from what the paper says."""
    weights = {name: gate.in_features * gate.out_features for name, gate in gates.items()}

    parts = dict.fromkeys(gates, 0.0)
    levels, rows = [0.0], [dict(parts)]
    while levels[-1] < GRID[-1]:
        costs = {}
        for name in gates:
            if parts[name] < 1:
                raised = min(1.0, parts[name] + greedy.STEP * hidden_size**2 / weights[name])
                more = lost(gates[name], raised).sum() - lost(gates[name], parts[name]).sum()
                costs[name] = (float(more), raised)
        chosen = min(costs, key=lambda name: costs[name][0])
        parts[chosen] = costs[chosen][1]
        levels.append(sum(parts[name] * weights[name] for name in gates) / sum(weights.values()))
        rows.append(dict(parts))
    return {name: list(np.interp(GRID, levels, [row[name] for row in rows])) for name in gates}


def test_the_search_is_that_of_the_paper(gates: dict[str, WinaLinear]):
    layer = dense_layer(run_of(gates), gates, STATES)
    shares = divide(layer, 16)
    expected = searched_by_hand(gates, 16)
    for name, share in shares.items():  # a bin of the histogram is 0.8% wide
        assert share == pytest.approx(expected[name], abs=0.06)
    assert shares["weak"][10] > 0.6 > 0.3 > shares["strong"][10]
    assert all(
        torch.equal(output, run_of_dense(gates, hidden)) for output, hidden in zip(layer.outputs, STATES, strict=True)
    )


def run_of_dense(gates: dict[str, WinaLinear], hidden: Tensor) -> Tensor:
    for gate in gates.values():
        gate.set_threshold(0.0)
    return torch.as_tensor(run_of(gates)(hidden))


def test_every_point_is_met_and_no_share_falls(gates: dict[str, WinaLinear]):
    shares = divide(dense_layer(run_of(gates), gates, STATES), 16)
    weights = {name: gate.in_features * gate.out_features for name, gate in gates.items()}
    for point, level in enumerate(GRID):
        mean = sum(shares[name][point] * weights[name] for name in gates) / sum(weights.values())
        assert mean == pytest.approx(level, abs=1e-12)
    for share in shares.values():
        assert share[0] == 0
        assert all(0 <= a <= b <= 1 for a, b in pairwise(share))


def test_a_move_skips_as_many_weights_whichever_projection_makes_it(gates: dict[str, WinaLinear]):
    """Of two that cost nothing, the first goes all the way before the second begins, in steps of its own size."""
    for gate in gates.values():
        gate.weight_t.data.zero_()
    calls: list[float] = []

    class Histogram:
        def quantile(self, fraction: float) -> float:
            calls.append(fraction)
            return 0.0

    histograms: Any = {name: Histogram() for name in gates}
    outputs = [run_of(gates)(hidden) for hidden in STATES]
    shares = divide(Layer(run_of(gates), gates, histograms, STATES, outputs), 16)
    steps = {name: greedy.STEP * 16**2 / (gate.in_features * gate.out_features) for name, gate in gates.items()}
    assert min(calls[1:]) == 0
    assert steps["weak"] in calls
    assert shares["weak"][10] == pytest.approx(0.5 * (96 + 48 + 8) / 96)
    assert shares["strong"][10] == 0


def test_an_activation_that_is_no_number_is_refused(gates: dict[str, WinaLinear]):
    with pytest.raises(CalibrationError, match="weak"):
        dense_layer(run_of(gates), gates, [STATES[0] * torch.nan])


def test_the_work_is_known_beforehand(gates: dict[str, WinaLinear]):
    calls = []
    run = run_of(gates)
    divide(dense_layer(lambda hidden, number: calls.append(1) or run(hidden), gates, STATES[:1]), 16)
    expected = passes([gate.in_features * gate.out_features for gate in gates.values()], 16)
    assert 0.6 * expected < len(calls) < 1.2 * expected
