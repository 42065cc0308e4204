"""The rule, against float64 and a few lines of numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_convert.fitting.schemes import column_norms
from wina_convert.format.curve import threshold_at
from wina_convert.runtime.rule import cutoffs, dropped, gate, scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 70)
dtypes = st.sampled_from(DTYPES)
thresholds = st.floats(2**-20, 2**20, width=32)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(seeds, sizes, sizes, dtypes)
@settings(deadline=None)
def test_a_column_norm_is_the_l2_norm_of_a_column_of_the_weight(seed, n_in, n_out, dtype):
    weight = randn(seed, n_out, n_in, dtype=dtype)
    norms = column_norms(weight.t().contiguous())
    assert norms.dtype == torch.float32
    exact = (weight.double() ** 2).sum(0).sqrt()
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


def test_column_norms_of_float16_weights_do_not_overflow():
    weight_t = torch.full((2, 4), 60_000.0, dtype=torch.float16)  # the sum of squares is far outside float16
    torch.testing.assert_close(column_norms(weight_t), torch.full((2,), 120_000.0))


@given(seeds, sizes, dtypes)
@settings(deadline=None)
def test_a_score_is_magnitude_times_norm_in_float32(seed, n_in, dtype):
    x, norms = randn(seed, 3, n_in, dtype=dtype), randn(seed + 1, n_in).abs()
    found = scores(x, norms)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().abs() * norms.double(), rtol=1e-6, atol=1e-37)


def test_a_score_beyond_float16_is_finite_and_ordered():
    x = torch.tensor([60_000.0, 65_504.0], dtype=torch.float16)
    found = scores(x, torch.tensor([1000.0, 1000.0]))
    assert found.isfinite().all()
    assert found[0] < found[1]


@given(seeds, sizes, dtypes, thresholds)
@settings(deadline=None)
def test_an_input_is_dropped_when_its_score_is_at_most_the_threshold(seed, n_in, dtype, threshold):
    x, norms = randn(seed, 2, n_in, dtype=dtype), randn(seed + 1, n_in).abs() + 2**-10
    mask = dropped(x, cutoffs(torch.tensor(threshold), norms))
    score = x.double().abs() * norms.double()
    decided = (score - threshold).abs() > 1e-6 * threshold  # not within rounding of a tie
    assert torch.equal(mask[decided], (score <= threshold)[decided])


@given(seeds, sizes, dtypes, st.integers(-20, 20))
@settings(deadline=None)
def test_an_exact_tie_is_dropped_and_its_next_larger_value_kept(seed, n_in, dtype, exponent):
    norms = 2.0 ** torch.randint(-10, 10, (n_in,), generator=torch.Generator().manual_seed(seed))
    threshold = torch.tensor(2.0**exponent) * norms.max()
    tie = (threshold / norms).to(dtype)  # powers of two: exact in every dtype
    exact = tie.isfinite() & (tie.double() * norms.double() == threshold.double())
    tau = cutoffs(threshold, norms)
    above = torch.nextafter(tie.float(), torch.tensor(torch.inf))
    assert dropped(tie, tau)[exact].all()
    assert dropped(-tie, tau)[exact].all()
    assert not dropped(above, tau)[exact].any()


@given(seeds, sizes, dtypes)
@settings(deadline=None)
def test_threshold_zero_skips_only_what_scores_zero(seed, n_in, dtype):
    x, norms = randn(seed, 3, n_in, dtype=dtype), randn(seed + 1, n_in).abs()
    norms[::3] = 0
    x[0, ::2] = 0
    tau = cutoffs(torch.tensor(0.0), norms)
    assert torch.equal(dropped(x, tau), (x == 0) | (norms == 0))
    assert torch.equal(gate(x, tau) * norms, x * norms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_zero_keeps_the_smallest_subnormal(dtype):
    x = torch.tensor([2.0 ** {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}[dtype]], dtype=dtype)
    assert x.item() > 0
    assert torch.equal(gate(x, cutoffs(torch.tensor(0.0), torch.ones(1))), x)


@given(st.floats(2**-20, 2**20, width=32), dtypes)
@settings(deadline=None)
def test_a_column_of_zeros_is_dropped_and_does_not_disturb_the_others(threshold, dtype):
    tau = cutoffs(torch.tensor(threshold), torch.tensor([0.0, 1.0]))
    assert not tau.isnan().any()
    assert tau[1] == threshold
    largest = torch.tensor([torch.finfo(dtype).max if dtype == torch.float16 else 1e30, 0.0], dtype=dtype)
    assert dropped(largest, tau).tolist() == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0, 1e30])
def test_a_nan_is_never_dropped(dtype, threshold):
    x = torch.tensor([torch.nan, -torch.nan, 1e-3], dtype=dtype)
    tau = cutoffs(torch.tensor(threshold), torch.tensor([1.0, 0.0, 1.0]))
    assert dropped(x, tau).tolist() == [False, False, threshold > 0]
    assert gate(x, tau).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_is_kept_at_a_finite_threshold(dtype):
    x = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    assert torch.equal(gate(x, cutoffs(torch.tensor(1e30), torch.ones(2))), x)


@given(seeds, sizes, dtypes, thresholds)
@settings(deadline=None)
def test_gating_zeroes_what_is_dropped_and_passes_the_rest_bit_for_bit(seed, n_in, dtype, threshold):
    x, norms = randn(seed, 2, 3, n_in, dtype=dtype), randn(seed + 1, n_in).abs()
    tau = cutoffs(torch.tensor(threshold), norms)
    gated, mask = gate(x, tau), dropped(x, tau)
    assert gated.dtype == dtype
    assert gated.shape == mask.shape == x.shape
    assert torch.equal(gated[~mask], x[~mask])
    assert not gated[mask].any()


@given(seeds, sizes, dtypes, thresholds)
@settings(deadline=None)
def test_a_float16_or_bfloat16_magnitude_is_compared_in_float32(seed, n_in, dtype, threshold):
    x = randn(seed, n_in, dtype=dtype)
    tau = torch.nextafter(x.float().abs(), torch.tensor(0.0))  # the largest float32 below: lost in half precision
    assert torch.equal(dropped(x, tau), x == 0)
    assert torch.equal(dropped(x.float(), tau), dropped(x, tau))


@given(seeds, st.integers(2, 30), st.data())
@settings(deadline=None)
def test_a_threshold_is_interpolated_linearly_between_grid_points(seed, points, data):
    rng = np.random.default_rng(seed)
    grid = np.concatenate([[0.0], np.sort(rng.uniform(0.01, 0.95, points - 1))])
    curve = np.sort(rng.uniform(0, 5, points)).astype(np.float32)
    sparsity = data.draw(st.floats(0, float(grid[-1])))
    found = threshold_at(torch.from_numpy(curve), grid.tolist(), sparsity)
    assert found.dtype == torch.float32
    assert found.shape == ()
    np.testing.assert_allclose(found.item(), np.interp(sparsity, grid, curve.astype(np.float64)), rtol=1e-5, atol=1e-6)


@given(seeds, st.integers(2, 30))
@settings(deadline=None, max_examples=30)
def test_a_threshold_at_a_grid_point_is_the_stored_one_exactly(seed, points):
    rng = np.random.default_rng(seed)
    grid = [round(0.95 * k / (points - 1), 4) for k in range(points)]
    curve = torch.from_numpy(np.sort(rng.uniform(0, 5, points)).astype(np.float32))
    assert [threshold_at(curve, grid, sparsity).item() for sparsity in grid] == curve.tolist()
