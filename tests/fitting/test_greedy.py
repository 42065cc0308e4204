"""TEAL's search: which projection skips next, and what that leaves at the points of the grid."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wina_convert.errors import CalibrationError
from wina_convert.fitting import greedy
from wina_convert.fitting.greedy import divide, divide_layer, moves_of
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear

WIDTH = 32


def projection(inputs: int, outputs: int, seed: int, scale: float = 1.0) -> WinaLinear:
    made = WinaLinear(inputs, outputs, GRID, bias=False)
    weight_t = scale * torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))
    made.weight_t.data.copy_(weight_t)
    made.column_norms.data.copy_(weight_t.norm(dim=1))
    made.thresholds.data.zero_()
    return made


@pytest.fixture
def gates() -> dict[str, WinaLinear]:
    """Of three sizes; a fourth of the weights of `strong` matter a thousand times as much as those of `weak`."""
    return {
        "weak": projection(WIDTH, 96, 1, 0.01),
        "strong": projection(WIDTH, 48, 2),
        "small": projection(WIDTH, 8, 3),
    }


def run_of(gates: dict[str, WinaLinear]) -> Any:
    def run(hidden: Tensor, number: int = 0) -> Tensor:
        with torch.no_grad():
            return torch.cat([gate(hidden) for gate in gates.values()], -1)

    return run


STATES = [torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def searched_by_hand(gates: dict[str, WinaLinear], hidden_size: int) -> dict[str, list[float]]:
    """The same in float64 with exact quantiles, from what the paper says."""
    x = torch.cat(STATES).double().flatten(0, 1)
    scores = {name: x.abs() * gate.column_norms.double() for name, gate in gates.items()}
    weights = {name: gate.in_features * gate.out_features for name, gate in gates.items()}

    def error(name: str, part: float) -> float:
        ordered = scores[name].flatten().sort().values
        threshold = ordered[min(int(part * len(ordered)), len(ordered)) - 1] if part > 0 else -1.0
        lost = torch.where(scores[name] <= threshold, x, 0.0) @ gates[name].weight_t.double()
        return float(lost.square().sum())

    parts = dict.fromkeys(gates, 0.0)
    levels, rows = [0.0], [dict(parts)]
    while levels[-1] < GRID[-1]:
        costs = {}
        for name in gates:
            if parts[name] < 1:
                raised = min(1.0, parts[name] + greedy.STEP * hidden_size**2 / weights[name])
                costs[name] = (error(name, raised) - error(name, parts[name]), raised)
        chosen = min(costs, key=lambda name: costs[name][0])
        parts[chosen] = costs[chosen][1]
        levels.append(sum(parts[name] * weights[name] for name in gates) / sum(weights.values()))
        rows.append(dict(parts))
    return {name: list(np.interp(GRID, levels, [row[name] for row in rows])) for name in gates}


def test_the_search_is_that_of_the_paper(gates: dict[str, WinaLinear]):
    shares, outputs = divide_layer(run_of(gates), gates, STATES, 16)
    expected = searched_by_hand(gates, 16)
    for name, share in shares.items():  # a bin of the histogram is 0.8% wide
        assert share == pytest.approx(expected[name], abs=0.06)
    assert shares["weak"][10] > 0.6 > 0.3 > shares["strong"][10]
    assert all(torch.equal(output, run_of_dense(gates, hidden)) for output, hidden in zip(outputs, STATES, strict=True))


def run_of_dense(gates: dict[str, WinaLinear], hidden: Tensor) -> Tensor:
    for gate in gates.values():
        gate.set_threshold(0.0)
    return torch.as_tensor(run_of(gates)(hidden))


def test_every_point_is_met_and_no_share_falls(gates: dict[str, WinaLinear]):
    shares, _ = divide_layer(run_of(gates), gates, STATES, 16)
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
    shares = divide(run_of(gates), gates, histograms, STATES, outputs, 16**2)
    steps = {name: greedy.STEP * 16**2 / (gate.in_features * gate.out_features) for name, gate in gates.items()}
    assert min(calls[1:]) == 0
    assert steps["weak"] in calls
    assert shares["weak"][10] == pytest.approx(0.5 * (96 + 48 + 8) / 96)
    assert shares["strong"][10] == 0


def test_a_layer_that_gates_nothing_passes_the_states_on():
    shares, outputs = divide_layer(lambda hidden, number: hidden + 1, {}, STATES, 16)
    assert shares == {}
    assert torch.equal(outputs[1], STATES[1] + 1)


def test_an_activation_that_is_no_number_is_refused(gates: dict[str, WinaLinear]):
    with pytest.raises(CalibrationError, match="weak"):
        divide_layer(run_of(gates), gates, [STATES[0] * torch.nan], 16)


def test_the_work_is_known_beforehand(gates: dict[str, WinaLinear]):
    calls = []
    run = run_of(gates)
    divide_layer(lambda hidden, number: calls.append(1) or run(hidden), gates, STATES[:1], 16)
    expected = moves_of([gate.in_features * gate.out_features for gate in gates.values()], 16)
    assert 0.6 * expected < len(calls) < 1.2 * expected
