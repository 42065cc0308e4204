"""Budgets: what an allocation asks of each projection, against a reference in float64, and what config.json keeps of it."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_convert.architectures import ARCHITECTURES
from wina_convert.errors import CheckpointError
from wina_convert.fitting.budget import ALLOCATIONS, SEARCHED, UNIFORM, Budget, budget_of, by_type
from wina_convert.format.config import WinaConfig
from wina_convert.format.grid import GRID

PRIOR = ARCHITECTURES["llama"].prior
KINDS = tuple(PRIOR)


def names(kinds: tuple[str, ...], layers: int = 2) -> list[str]:
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


@st.composite
def models(draw: st.DrawFn) -> dict[str, int]:
    """Numbers of weights of some projections of a few layers; a layer need not have what another has."""
    chosen = draw(st.lists(st.sampled_from(names(KINDS, 3)), min_size=1, unique=True))
    return {name: draw(st.integers(1, 10**9)) for name in chosen}


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def mean(weights: dict[str, int], budget: Budget, level: float) -> float:
    return math.fsum(weights[name] * budget.asked(name, level) for name in weights) / sum(weights.values())


@given(models(), st.floats(0, 0.95))
@settings(deadline=None)
def test_the_mean_over_weights_is_the_level(weights: dict[str, int], level: float):
    budget = by_type(weights, PRIOR)
    assert mean(weights, budget, level) == pytest.approx(level, abs=1e-13)
    assert budget.overall(weights, level) == pytest.approx(level, abs=1e-13)


@given(models())
@settings(max_examples=30, deadline=None)
def test_all_types_move_alike_in_the_logit(weights: dict[str, int]):
    budget = by_type(weights, PRIOR)
    assert set(budget.shares) == set(weights)
    for level in GRID[1:]:
        moved = {name: logit(budget.asked(name, level)) - logit(PRIOR[name.split(".", 3)[3]]) for name in weights}
        assert max(moved.values()) - min(moved.values()) < 1e-9


@given(models())
@settings(max_examples=30, deadline=None)
def test_shares_rise_from_0_and_stay_below_1(weights: dict[str, int]):
    for share in by_type(weights, PRIOR).shares.values():
        assert len(share) == len(GRID)
        assert share[0] == 0
        assert all(a < b for a, b in pairwise(share))
        assert share[-1] < 1


def test_weights_that_make_the_prior_50_percent_leave_it_as_it_is():
    weights = {"model.layers.0.self_attn.q_proj": 155, "model.layers.0.self_attn.v_proj": 90}  # .59 and .345
    budget = by_type(weights, PRIOR)
    assert budget.asked("model.layers.0.self_attn.q_proj", 0.5) == pytest.approx(0.59, abs=1e-12)
    assert budget.asked("model.layers.0.self_attn.v_proj", 0.5) == pytest.approx(0.345, abs=1e-12)


def test_the_prior_of_separate_projections_is_the_measured_one():
    assert PRIOR == {
        "self_attn.q_proj": 0.59,
        "self_attn.k_proj": 0.45,
        "self_attn.v_proj": 0.345,
        "self_attn.o_proj": 0.54,
        "mlp.gate_proj": 0.455,
        "mlp.up_proj": 0.49,
        "mlp.down_proj": 0.55,
    }


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_has_a_prior_for_each_projection_and_a_fused_one_the_mean_of_its_parts(family: str):
    facts = ARCHITECTURES[family]
    assert set(facts.prior) == {*facts.attention, *facts.mlp}
    if len(facts.attention) == 2:
        attention, mlp = ([facts.prior[short] for short in block] for block in (facts.attention, facts.mlp))
        assert attention == pytest.approx([(0.59 + 0.45 + 0.345) / 3, 0.54])
        assert mlp == pytest.approx([(0.455 + 0.49) / 2, 0.55])


def test_a_projection_alone_is_asked_for_the_level():
    budget = by_type({"model.layers.0.mlp.down_proj": 7}, PRIOR)
    for level in (0.0, 0.02, 0.05, 0.5, 0.77, 0.95):
        assert budget.asked("model.layers.0.mlp.down_proj", level) == pytest.approx(level, abs=1e-13)


def test_uniform_asks_every_projection_for_the_level():
    budget = ALLOCATIONS["uniform"]({"a": 1, "b": 5}, {})
    assert budget is UNIFORM
    assert [budget.asked(name, 0.37) for name in ("a", "b", "c")] == [0.37] * 3
    assert budget.stored() == {}


# --- as config.json keeps it ---


def config(weights: dict[str, int], budget: Budget) -> WinaConfig:
    """What is read of the stored block of a conversion."""
    made = WinaConfig(0.5, modules=list(weights), allocation=budget.allocation, shares=budget.stored())
    return WinaConfig.from_dict(json.loads(json.dumps(made.to_dict())))


@given(models(), st.sampled_from(sorted(set(ALLOCATIONS) - set(SEARCHED))), st.floats(0, 0.95))
@settings(max_examples=50, deadline=None)
def test_a_config_gives_the_budget_back_to_the_last_bit(weights: dict[str, int], allocation: str, level: float):
    budget = ALLOCATIONS[allocation](weights, PRIOR)
    found = budget_of(config(weights, budget))
    assert found.allocation == allocation
    assert [found.asked(name, level) for name in weights] == [budget.asked(name, level) for name in weights]


def test_a_config_of_another_grid_is_read_along_that_grid():
    made = WinaConfig(
        modules=["model.layers.0.mlp.up_proj"],
        grid=[0, 0.5, 1],
        allocation="types",
        shares={"mlp.up_proj": [0, 0.2, 1]},
    )
    assert budget_of(made).asked("model.layers.0.mlp.up_proj", 0.75) == pytest.approx(0.6)


def test_the_shares_of_an_allocation_without_a_known_name_are_what_counts():
    share = [0.0, *(0.9 * level for level in GRID[1:])]
    made = WinaConfig(modules=["model.layers.0.mlp.up_proj"], allocation="of tomorrow", shares={"mlp.up_proj": share})
    assert budget_of(made).asked("model.layers.0.mlp.up_proj", 0.5) == pytest.approx(0.45)


RISING = list(GRID)


@pytest.mark.parametrize(
    ("allocation", "shares", "words"),
    [
        ("types", {}, "'types', which this version does not know without shares"),
        ("nosuch", {}, "'nosuch'"),
        ("uniform", {"mlp.up_proj": RISING, "mlp.down_proj": RISING}, "'uniform', which has no shares"),
        ("types", {"mlp.up_proj": RISING}, "only one of them has 'mlp.down_proj'"),
        (
            "types",
            {"mlp.up_proj": RISING, "mlp.down_proj": RISING, "mlp.gate_proj": RISING},
            "only one of them has 'mlp.gate_proj'",
        ),
    ],
)
def test_a_config_that_does_not_tell_the_budget_is_refused(allocation: str, shares: dict[str, list[float]], words: str):
    made = WinaConfig(modules=names(("mlp.up_proj", "mlp.down_proj")), allocation=allocation, shares=shares)
    with pytest.raises(CheckpointError, match=words):
        budget_of(made)


@pytest.mark.parametrize(
    "share",
    [
        [],
        RISING[:-1],
        [*RISING, 0.97],
        [0.01, *RISING[1:]],
        [0.0, 0.2, 0.1, *RISING[3:]],
        [*RISING[:-1], 1.01],
        [*RISING[:-1], math.nan],
        [*RISING[:-1], "1"],
        [False, *RISING[1:]],
        [None] * 20,
        0.5,
        None,
        {},
    ],
    ids=str,
)
def test_shares_that_are_none_are_refused(share: object):
    with pytest.raises(
        CheckpointError, match=r"shares of config\.json has no 20 ascending fractions from 0 for 'mlp\.up"
    ):
        WinaConfig(allocation="types", shares={"mlp.up_proj": share})  # type: ignore[dict-item]


@pytest.mark.parametrize("shares", [None, [], "x", 5], ids=str)
def test_shares_that_are_no_object_are_refused(shares: object):
    with pytest.raises(CheckpointError, match=r"shares of config\.json is no dict"):
        WinaConfig(shares=shares)  # type: ignore[arg-type]


def test_version_1_has_no_shares_and_stays_version_1():
    old = {"quant_method": "wina", "format_version": 1, "modules": names(KINDS)}
    read = WinaConfig.from_dict(old)
    assert budget_of(read) is UNIFORM
    assert not {"shares", "basis"} & set(read.to_dict())
    assert read.to_dict()["format_version"] == 1
    with pytest.raises(CheckpointError, match="unknown fields: shares"):
        WinaConfig.from_dict(old | {"shares": {}})
