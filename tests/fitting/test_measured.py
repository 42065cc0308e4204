"""The division by measured errors: what it measures, and that it costs least."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from support.layers import STATES, WIDTH, lost, projection, run_of, three_gates
from wina_convert.fitting import greedy, measured
from wina_convert.fitting.budget import by_type
from wina_convert.fitting.layer import Layer, Shares, dense_layer, remembering
from wina_convert.fitting.measured import LEVELS, curve, errors, halfway, least, passes
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear

pytestmark = pytest.mark.slow


def layer_of(gates: dict[str, WinaLinear]) -> Layer:
    return dense_layer(run_of(gates), gates, STATES)


def divided(gates: dict[str, WinaLinear]) -> Shares:
    return least(errors(layer_of(gates)), weights_of(gates))


def searched(gates: dict[str, WinaLinear]) -> Shares:
    return greedy.divide(layer_of(gates), 8)


def met(shares: Shares, weights: dict[str, int]) -> None:
    """Every point of the grid is met, and no share falls."""
    for point, level in enumerate(GRID):
        mean = sum(shares[name][point] * weights[name] for name in weights) / sum(weights.values())
        assert mean == pytest.approx(level, abs=1e-12)
    for share in shares.values():
        assert share[0] == 0
        assert all(0 <= a <= b <= 1 for a, b in pairwise(share))


def test_errors_that_are_powers_are_divided_where_the_next_weight_costs_all_alike():
    rng = np.random.default_rng()
    names = ["a", "b", "c", "d"]
    weights = {name: int(rng.integers(100, 1000)) for name in names}
    sizes, powers = rng.uniform(0.5, 50, 4), rng.uniform(1.5, 4, 4)
    shares = least({name: [sizes[i] * level ** powers[i] for level in LEVELS] for i, name in enumerate(names)}, weights)
    met(shares, weights)
    counts = np.array(list(weights.values()))
    for point, level in enumerate(GRID[1:], 1):
        low, high = -50.0, 50.0  # the logarithm of what a weight costs
        for _ in range(100):
            cost = np.exp((low + high) / 2)
            parts = np.minimum((cost * counts / (sizes * powers)) ** (1 / (powers - 1)), 1.0)
            low, high = (low, (low + high) / 2) if parts @ counts > level * counts.sum() else ((low + high) / 2, high)
        assert [shares[name][point] for name in names] == pytest.approx(list(parts), abs=0.01)


def test_a_curve_goes_through_what_was_measured_and_from_zero():
    known = np.sort(np.random.default_rng().uniform(0.1, 9, len(LEVELS)))
    found = curve(known.tolist())
    assert found[0] == 0
    assert np.all(np.diff(found) >= 0)
    assert [found[round(level * measured.PARTS)] for level in LEVELS] == pytest.approx(list(known))


def test_what_is_measured_is_the_error_of_each_alone_as_a_part_of_each_token():
    gates = three_gates()
    whole = torch.cat(STATES).double().flatten(0, 1)
    dense = torch.cat([whole @ gate.weight_t.double() for gate in gates.values()], -1).square().sum(-1)
    found = errors(layer_of(gates))
    for name, gate in gates.items():
        expected = [float((lost(gate, level) / dense).sum()) for level in LEVELS]
        assert found[name] == pytest.approx(
            expected, rel=0.1
        )  # a bin of the histogram is 0.8% wide, and skips as many scores


def test_where_errors_add_up_it_costs_no_more_than_the_search():
    gates = three_gates()
    found, other = divided(gates), searched(gates)
    met(found, weights_of(gates))
    for point in (5, 10, 15, 18):
        own, others = (
            sum(float(lost(gate, shares[name][point]).sum()) for name, gate in gates.items())
            for shares in (found, other)
        )
        assert own <= 1.1 * others
    assert found["weak"][10] > 0.6 > 0.3 > found["strong"][10]


@pytest.mark.parametrize("divide", [divided, searched])
def test_a_term_that_stands_in_for_what_is_skipped_counts(divide: Callable[[dict[str, WinaLinear]], Shares]):
    """Two alike, but that the low-rank term of one is its whole weight: skipping it costs nothing."""
    gates = {name: projection(WIDTH, WIDTH, 1, low_rank=0.99) for name in ("without", "with")}
    (rank,) = {gate.low_rank_in.shape[1] for gate in gates.values()}
    left, right = torch.randn(WIDTH, rank), torch.randn(rank, WIDTH)
    for gate in gates.values():
        gate.weight_t.data.copy_(left @ right)
        gate.column_norms.data.copy_(gate.weight_t.norm(dim=1))
    assert divide(gates)["with"][10] < 0.6
    gates["with"].low_rank_in.data.copy_(left)
    gates["with"].low_rank_out.data.copy_(right)
    assert divide(gates)["with"][10] > 0.9


def test_halfway_meets_what_both_meet_with_a_head_beside_the_layers():
    gates = three_gates()
    weights = weights_of(gates) | {"head": 1000}
    prior = by_type(weights, {name: 0.3 + 0.1 * number for number, name in enumerate(weights)}).shares
    found = halfway(divided(gates), prior)
    met(found, weights)
    assert found["head"][10] == pytest.approx((0.5 + prior["head"][10]) / 2)
    assert found["weak"][10] == pytest.approx((divided(gates)["weak"][10] + prior["weak"][10]) / 2)


def test_projections_that_cost_nothing_meet_every_point():
    gates = three_gates()
    for gate in gates.values():
        gate.weight_t.data.zero_()
    met(divided(gates), weights_of(gates))


def test_the_layer_is_dense_afterwards_and_the_work_known_beforehand():
    gates = three_gates()
    calls = []
    dense = dense_layer(run_of(gates), gates, STATES[:1])
    layer = Layer(lambda *a: calls.append(1) or dense.run(*a), gates, dense.histograms, dense.states, dense.outputs)
    errors(layer)
    assert len(calls) == 1 + len(gates) * len(LEVELS)
    assert (
        passes(list(weights_of(gates).values()), WIDTH) == 11
    )  # runs in full: two thirds of what a projection skips in
    assert layer.error() == 0


def chain(gates: dict[str, WinaLinear], spoil: str = "") -> Callable[..., Tensor]:
    """Two projections side by side, and two behind them; one writes into its output or its input afterwards."""

    def run(hidden: Tensor, number: int = 0) -> Tensor:
        with torch.no_grad():
            x = hidden.clone()
            left, right = gates["left"](x), gates["right"](x)
            behind = gates["behind"](torch.tanh(left) * right)
            if spoil == "output":
                left += behind[..., :WIDTH]
            if spoil == "input":
                x.zero_()
            return gates["last"](behind) + left + x

    return run


@pytest.mark.parametrize("spoil", ["", "output", "input"])
def test_what_is_remembered_is_what_would_be_computed(spoil: str):
    """Every projection alone, to the last bit; where nothing writes into them, only what stands behind it computes again."""
    gates = {name: projection(WIDTH, WIDTH, seed) for seed, name in enumerate(["left", "right", "behind", "last"])}
    layer = dense_layer(chain(gates, spoil), gates, STATES)
    computed = []
    for name, gate in gates.items():
        gate._operands = lambda x, name=name, operands=gate._operands: computed.append(name) or operands(x)
    with remembering(layer) as quick:
        for name, again in {"left": 3, "right": 3, "behind": 2, "last": 1}.items():
            layer.skip(name, 0.5)
            computed.clear()
            found = [quick.run(hidden, number) for number, hidden in enumerate(STATES)]
            assert spoil or len(computed) == again * len(STATES)
            assert all(map(torch.equal, found, [layer.run(hidden, number) for number, hidden in enumerate(STATES)]))
            layer.skip(name, 0.0)
    assert not any("forward" in vars(gate) for gate in gates.values())


def test_projections_compute_again_after_an_error():
    gates = three_gates()
    with pytest.raises(ZeroDivisionError), remembering(layer_of(gates)):
        raise ZeroDivisionError
    assert not any("forward" in vars(gate) for gate in gates.values())


def weights_of(gates: dict[str, WinaLinear]) -> dict[str, int]:
    return {name: gate.in_features * gate.out_features for name, gate in gates.items()}
