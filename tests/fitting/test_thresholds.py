"""From histograms to the stored curve."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_convert.fitting.histogram import ScoreHistogram
from wina_convert.fitting.thresholds import levels, threshold_curve
from wina_convert.format.curve import threshold_at
from wina_convert.format.grid import GRID

RESOLUTION = 2**-7
seeds = st.integers(0, 2**32 - 1)
sparsities = st.floats(0, 0.95)


def histograms(seed: int, points: tuple[float, ...], n: int = 500) -> tuple[dict, dict]:
    """Random scores for each level, raw and counted."""
    rng = np.random.default_rng(seed)
    raw = {level: rng.lognormal(rng.uniform(-3, 3), rng.uniform(0.1, 2), n).astype(np.float32) for level in points}
    counted = {level: ScoreHistogram() for level in points}
    for level, values in raw.items():
        counted[level].add(torch.from_numpy(values))
    return raw, counted


@given(seeds, sparsities)
@settings(max_examples=50, deadline=None)
def test_a_curve_rises_from_zero_and_is_finite(seed, sparsity):
    curve = threshold_curve(histograms(seed, levels(sparsity))[1], GRID)
    assert curve.shape == (len(GRID),)
    assert curve.dtype == torch.float32
    assert curve[0] == 0
    assert curve.isfinite().all()
    assert (curve.diff() >= 0).all()


def test_a_curve_is_each_levels_own_quantile_at_that_level():
    # Rising levels have rising scores here, so that nothing needs flattening.
    raw = {level: (np.arange(1, 1001) * (1 + level)).astype(np.float32) for level in (0.25, 0.5, 0.75)}
    counted = {level: ScoreHistogram() for level in raw}
    for level, values in raw.items():
        counted[level].add(torch.from_numpy(values))
    curve = threshold_curve(counted, GRID)
    for level, values in raw.items():
        expected = np.quantile(values.astype(np.float64), level)
        assert threshold_at(curve, GRID, level).item() == pytest.approx(expected, rel=RESOLUTION)


def test_between_two_levels_both_count_by_their_nearness_and_beyond_the_last_only_that():
    raw = {level: (np.arange(1, 1001) * (1 + level)).astype(np.float32) for level in (0.25, 0.75)}
    counted = {level: ScoreHistogram() for level in raw}
    for level, values in raw.items():
        counted[level].add(torch.from_numpy(values))
    curve = dict(zip(GRID, threshold_curve(counted, GRID).tolist(), strict=True))
    low, high = (lambda s: 1250 * s), (lambda s: 1750 * s)  # the quantiles of the two
    assert curve[0.1] == pytest.approx(low(0.1), rel=0.01)
    assert curve[0.4] == pytest.approx(0.7 * low(0.4) + 0.3 * high(0.4), rel=0.01)
    assert curve[0.5] == pytest.approx(0.5 * low(0.5) + 0.5 * high(0.5), rel=0.01)
    assert curve[0.9] == pytest.approx(high(0.9), rel=0.01)


@given(seeds, st.sampled_from(GRID[1:]))
@settings(max_examples=50, deadline=None)
def test_a_curve_of_one_level_skips_what_was_asked(seed, sparsity):
    raw, counted = histograms(seed, (0.5,), n=4000)
    threshold = threshold_at(threshold_curve(counted, GRID), GRID, sparsity).item()
    assert (raw[0.5] <= threshold).mean() == pytest.approx(sparsity, abs=0.01 + RESOLUTION)


def test_scores_that_are_all_zero_give_a_curve_of_zeros():
    counted = {level: ScoreHistogram() for level in (0.25, 0.5)}
    for histogram in counted.values():
        histogram.add(torch.zeros(10))
    assert not threshold_curve(counted, GRID).any()


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.0, (0.25, 0.5, 0.75)),  # without gating nothing needs calibrating at 0
        (0.05, (0.05, 0.25, 0.5, 0.75)),
        (0.25, (0.25, 0.5, 0.75)),
        (0.3, (0.3, 0.5, 0.75)),
        (0.375, (0.375, 0.75)),  # both neighbours are near
        (0.5, (0.25, 0.5, 0.75)),
        (0.65, (0.25, 0.5, 0.65)),
        (0.95, (0.25, 0.5, 0.75, 0.95)),
    ],
)
def test_calibration_runs_at_the_default_and_at_levels_that_span_the_rest(sparsity, expected):
    assert levels(sparsity) == expected


@given(sparsities)
@settings(deadline=None)
def test_levels_ascend_hold_the_default_and_stay_apart(sparsity):
    found = levels(sparsity)
    assert list(found) == sorted(set(found))
    assert not sparsity or sparsity in found
    assert all(abs(level - sparsity) >= 0.15 or level == sparsity for level in found if sparsity)
