"""Score counts: exact, mergeable, and quantiles within the width of a bin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_convert.errors import CalibrationError
from wina_convert.fitting.histogram import BINS, ScoreHistogram, bin_edges
from wina_convert.runtime.rule import scores

RESOLUTION = 2**-7  # a bfloat16 has 8 significant bits: a bin is at most 1/128 = 0.8% wide
seeds = st.integers(0, 2**32 - 1)
any_scores = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=200)


def draw(seed: int, n: int, spread: float = 1.0) -> np.ndarray:
    """Scores as they look: positive, over several decades."""
    return np.random.default_rng(seed).lognormal(-2, spread, n).astype(np.float32)


def histogram(values: object) -> ScoreHistogram:
    found = ScoreHistogram()
    found.add(torch.as_tensor(values, dtype=torch.float32))
    return found


@given(any_scores)
@settings(deadline=None)
def test_every_score_is_counted_on_the_bfloat16_below_it(values):
    counts = histogram(values).counts
    assert counts.sum() == len(values)
    for k in counts.nonzero()[:, 0].tolist():
        low, high = bin_edges(k)
        assert sum(low <= np.float32(value) < high for value in values) == counts[k]


def test_bins_are_bfloat16_values_at_most_0_8_percent_wide():
    for k in range(128, 0x7F7F, 7):  # the normal ones, but the last, which ends at infinity
        low, high = bin_edges(k)
        assert low == torch.tensor(low, dtype=torch.bfloat16).item()
        assert 0 < high - low <= RESOLUTION * low


@given(st.lists(any_scores, min_size=1, max_size=5), st.randoms())
@settings(deadline=None)
def test_counts_do_not_depend_on_the_order_or_the_division_of_the_work(batches, random):
    whole = histogram([value for batch in batches for value in batch])
    parts = [histogram(batch) for batch in batches]
    random.shuffle(parts)
    merged = ScoreHistogram()
    for part in parts:
        merged.merge(part)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.counts.dtype == torch.int64
    assert merged.quantile(0.5) == whole.quantile(0.5)


def test_any_shape_and_memory_order_counts_alike():
    values = torch.from_numpy(draw(0, 24))
    expected = histogram(values).counts
    for view in (values.view(2, 3, 4), values.view(4, 6).t(), torch.stack([values, values], 1)[:, 0]):
        assert torch.equal(histogram(view).counts, expected)


@given(seeds, st.integers(1, 3000), st.floats(0.1, 3), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_a_quantile_is_that_of_the_raw_scores_within_a_bin(seed, n, spread, sparsity):
    values = draw(seed, n, spread)
    found = histogram(values).quantile(sparsity)
    # Between two neighbouring scores any answer skips the same fraction.
    low, high = (np.quantile(values, sparsity, method=method) for method in ("lower", "higher"))
    assert low * (1 - RESOLUTION) <= found <= high * (1 + RESOLUTION)


@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.5, 0.65, 0.95])
def test_a_quantile_of_many_scores_skips_the_fraction_asked(sparsity):
    values = draw(1, 200_000)
    threshold = histogram(values).quantile(sparsity)
    assert (values <= threshold).mean() == pytest.approx(sparsity, abs=1e-3)
    assert threshold == pytest.approx(np.quantile(values.astype(np.float64), sparsity), rel=RESOLUTION)


@given(seeds, st.integers(1, 500))
@settings(deadline=None)
def test_quantiles_do_not_fall_as_the_sparsity_rises(seed, n):
    counts = histogram(draw(seed, n))
    found = [counts.quantile(sparsity) for sparsity in np.linspace(0, 0.95, 39)]
    assert found == sorted(found)
    assert found[0] == 0


@given(st.integers(1, 100), st.floats(0, 0.95))
@settings(deadline=None)
def test_scores_that_are_all_zero_need_no_threshold(n, sparsity):
    assert histogram([0.0] * n).quantile(sparsity) == 0


def test_where_zeros_alone_reach_the_sparsity_the_threshold_is_zero():
    counts = histogram([0.0] * 6 + [1.0, 2.0, 3.0, 4.0])
    assert counts.quantile(0.5) == 0
    assert counts.quantile(0.6) == 0
    assert counts.quantile(0.65) > 0.99


@given(st.floats(2**-100, 2**100, width=32), st.integers(1, 50), st.floats(0.01, 0.95))
@settings(deadline=None)
def test_constant_scores_have_the_constant_as_every_quantile(value, n, sparsity):
    assert histogram([value] * n).quantile(sparsity) == pytest.approx(value, rel=RESOLUTION)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("others", [0, 100])
def test_a_score_that_is_not_finite_is_refused(bad, others):
    counts = ScoreHistogram()
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        counts.add(torch.tensor([1.0] * others + [bad]))


@pytest.mark.parametrize("x", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_an_activation_that_is_not_finite_is_refused_over_any_column(x, norm):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        ScoreHistogram().add(scores(torch.tensor([1.0, x]), torch.tensor([1.0, norm])))


def test_the_largest_finite_score_is_counted():
    assert histogram([torch.finfo(torch.float32).max]).counts.sum() == 1


def test_more_scores_than_fit_a_chunk_are_all_counted(monkeypatch):
    monkeypatch.setattr("wina_convert.fitting.histogram.CHUNK", 7)
    values = draw(2, 100)
    bins = values.view(np.uint32) >> 16
    assert torch.equal(histogram(values).counts, torch.from_numpy(np.bincount(bins, minlength=BINS)))


def test_the_density_of_log_uniform_scores_is_flat():
    values = torch.from_numpy(2.0 ** np.random.default_rng(3).uniform(-4, 4, 200_000)).float()
    centres, density = histogram(values).density()
    inside = (centres > 2**-3.8) & (centres < 2**3.8)
    assert float((density[inside] - 1 / 8).abs().max()) < 0.02
    assert bool((centres[1:] > centres[:-1]).all())
