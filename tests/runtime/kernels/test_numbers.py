"""The gated product on zeros, infinities, NaN, denormals, ties and overflow.

The reference computes in float64. `test_kernels.py` and `test_streaming.py` ask the same of ordinary numbers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from support.products import DTYPES, INF, SMALLEST, check, randn
from wina_convert.fitting.schemes import column_norms
from wina_convert.runtime.kernels import cpu, gated_linear
from wina_convert.runtime.rule import cutoffs, dropped, gate

FEW = list(range(1, cpu.FEW_ROWS + 1))
ROWS = [1, 8, 9, 513]  # both sides of where the compiled kernels end


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_path = pytest.mark.parametrize("rows", ROWS)


def kept(x: Tensor, tau: Tensor) -> Tensor:
    """Which inputs the op keeps, seen through an identity: [..., in], bool. x has no zeros and is finite."""
    y = gated_linear(x, torch.eye(x.shape[-1], dtype=x.dtype), tau, None)
    assert ((y == x) | (y == 0)).all()
    return y == x


def dense_flushes(rows: int, dtype: torch.dtype) -> bool:
    """Whether torch's dense product of so many rows flushes denormals: the bfloat16 instructions of processors do."""
    x = torch.full((rows, 16), SMALLEST[dtype]).to(dtype)
    return rows > cpu.FEW_ROWS and cpu.multiplies(dtype) and not torch.equal(linear(x, torch.eye(16, dtype=dtype)), x)


# The product


@every_dtype
@every_path
def test_columns_of_norm_zero_add_nothing_whatever_enters_them(rows, dtype):
    x, weight_t = randn(1, rows, 40).to(dtype), randn(2, 40, 13).to(dtype)
    dead = slice(8, 24)
    weight_t[dead] = 0
    x[:, 8] = torch.finfo(dtype).max
    x[:, 9] = torch.inf
    for threshold in (0.0, 1.0):
        tau = cutoffs(torch.tensor(threshold), column_norms(weight_t))
        y = gated_linear(x, weight_t, tau, None)
        check(y, x, weight_t, tau)
        assert y.isfinite().all()
        alive = torch.ones(40, dtype=torch.bool)
        alive[dead] = False
        without = gated_linear(x.masked_fill(~alive, 0), weight_t, tau, None)
        assert torch.equal(y, without)
    x[0, 10] = torch.nan  # is not hidden even there
    y = gated_linear(x, weight_t, tau, None)
    check(y, x, weight_t, tau)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@every_dtype
@every_path
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_activation_does_what_it_does_in_the_dense_product(sign, rows, dtype):
    x, weight_t, tau = randn(3, rows, 33).to(dtype), randn(4, 33, 12).to(dtype), randn(5, 33).abs()
    x[:, 7] = sign * torch.inf
    weight_t[7, :4] = 0  # infinity times zero
    y = gated_linear(x, weight_t, tau, None)
    check(y, x, weight_t, tau)
    assert y[:, :4].isnan().all()
    assert y[:, 4:].isinf().all()
    x[:, 8] = -sign * torch.inf
    weight_t[8] = weight_t[7]
    y = gated_linear(x, weight_t, tau, None)
    check(y, x, weight_t, tau)
    assert y.isnan().all()
    tau[8] = torch.inf  # skipped: what it would have cancelled stays
    y = gated_linear(x, weight_t, tau, None)
    check(y, x, weight_t, tau)
    assert y[:, 4:].isinf().all()


@every_dtype
@every_path
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value, rows, dtype):
    x, weight_t, tau = randn(6, rows, 33).to(dtype), randn(7, 33, 12).to(dtype), randn(8, 33).abs()
    weight_t[20, 5] = 0
    clean = gated_linear(x, weight_t, tau, None)
    for row in {0, rows // 2, rows - 1}:
        spoilt = x.clone()
        spoilt[row, 20] = value
        y = gated_linear(spoilt, weight_t, tau, None)
        check(y, spoilt, weight_t, tau)
        others = torch.arange(rows) != row
        assert y[others].isfinite().all()
        torch.testing.assert_close(y[others], clean[others])
        assert not y[row].isfinite().any()


@every_dtype
@every_path
@pytest.mark.parametrize("tau", [-1.0, 0.0, 0.5, torch.inf])
def test_inputs_that_are_all_zero_give_the_bias(tau, rows, dtype):
    weight_t, bias = randn(9, 35, 21).to(dtype), randn(10, 21).to(dtype)
    for x in (torch.zeros(rows, 35, dtype=dtype), -torch.zeros(rows, 35, dtype=dtype)):
        y = gated_linear(x, weight_t, torch.full((35,), tau), bias)
        assert torch.equal(y, bias.expand(rows, 21))
        assert not gated_linear(x, weight_t, torch.full((35,), tau), None).any()


@every_dtype
@every_path
def test_denormal_inputs_and_weights_are_not_flushed_to_zero(rows, dtype):
    tiny = SMALLEST[dtype]
    steps = torch.arange(1, 17).repeat(rows, 1)
    x = (steps.double() * tiny).to(dtype)
    assert (x.double() == steps * tiny).all()
    nothing_skipped, one, column = torch.zeros(16), torch.ones(rows, 16, dtype=dtype), x[0].unsqueeze(1).repeat(1, 3)
    same, biased, sums = x, x, torch.full((rows, 3), 136 * tiny, dtype=torch.float64)  # 1 + 2 + ... + 16
    if dense_flushes(rows, dtype):  # what the dense product does there is all that can be asked
        same, sums = linear(x, torch.eye(16, dtype=dtype)), linear(one, column.t()).double()
        biased = linear(torch.zeros(rows, 16, dtype=dtype), torch.eye(16, dtype=dtype), x[0])
    assert torch.equal(gated_linear(x, torch.eye(16, dtype=dtype), nothing_skipped, None), same)
    assert torch.equal(gated_linear(one, column, nothing_skipped, None).double(), sums)
    y = gated_linear(torch.zeros(rows, 16, dtype=dtype), torch.eye(16, dtype=dtype), nothing_skipped, x[0])
    assert torch.equal(y, biased)


@every_dtype
@every_path
def test_denormal_thresholds_decide_to_the_last_bit(rows, dtype):
    x = (torch.arange(1, 17).double() * SMALLEST[dtype]).to(dtype).repeat(rows, 1)
    at = x[0].float()
    below = torch.nextafter(at, -INF)
    assert (below < at).all()  # a float32 denormal, not zero, but for the first of them
    for tau in (at, below):
        assert torch.equal(gate(x, tau) == x, ~dropped(x, tau))
    assert dropped(x, at).all()
    assert not dropped(x, below).any()
    if dense_flushes(rows, dtype):  # the product shows nothing of what was kept
        return
    assert not kept(x, at).any()
    assert kept(x, below).all()
    assert torch.equal(kept(x, torch.full((16,), 4 * SMALLEST[dtype])), x.double() > 4 * SMALLEST[dtype])


@pytest.mark.parametrize("rows", ROWS)
def test_a_score_that_float16_could_not_hold_is_compared_all_the_same(rows):
    magnitudes = torch.tensor([1000.0, 30_000.0, 32_000.0, 60_000.0, 65_504.0])
    x = magnitudes.repeat(rows, 1).half()
    x[:, 1] *= -1
    norms = torch.tensor([3e4, 2e4, 2e4, 1e4, 3e4])  # scores of 3e7 to 2e9
    assert (x.abs() * norms.half()).isinf().all()
    threshold = torch.tensor(6.2e8)
    expected = magnitudes.double() * norms.double() > 6.2e8
    assert expected.tolist() == [False, False, True, False, True]
    assert torch.equal(kept(x, cutoffs(threshold, norms)), expected.expand(rows, -1))


@pytest.mark.parametrize("rows", ROWS)
def test_a_float16_sum_overflows_to_infinity_only_where_its_end_does(rows):
    top = torch.finfo(torch.float16).max
    x = torch.tensor([top, top, -top, 1.0, 1.0], dtype=torch.float16).repeat(rows, 1)
    weight_t = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.float16)
    tau = torch.zeros(5)
    back = gated_linear(x, weight_t, tau, None)  # by way of twice the maximum
    check(back, x, weight_t, tau)
    assert back.isfinite().all()
    tau[2] = torch.inf
    beyond = gated_linear(x, weight_t, tau, None)
    check(beyond, x, weight_t, tau)
    assert (beyond == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_path
def test_a_norm_that_overflows_keeps_its_column(rows, dtype):
    x, weight_t = randn(11, rows, 20).to(dtype), randn(12, 20, 6).to(dtype)
    x[:, 4], weight_t[4] = 1e-30, 1e30  # the square of a weight is far outside float32
    norms = column_norms(weight_t)
    assert norms.isinf().tolist() == [j == 4 for j in range(20)]
    tau = cutoffs(torch.tensor(1.0), norms)
    assert kept(x, tau)[:, 4].all()
    check(gated_linear(x, weight_t, tau, None), x, weight_t, tau)


# Ties


@every_dtype
@pytest.mark.parametrize("rows", [*FEW, 9, 10, 513])
def test_scores_that_are_all_equal_are_dropped_or_kept_at_once(rows, dtype):
    exponents = torch.randint(-6, 7, (48,), generator=torch.Generator().manual_seed(rows))
    norms = 2.0**exponents  # |x| * norm = 3 and threshold / norm are exact
    x = (3.0 / norms * torch.tensor([1.0, -1.0]).repeat(24)).to(dtype).repeat(rows, 1)
    assert (x.double().abs() * norms.double() == 3).all()
    one_less, one_more = (torch.nextafter(torch.tensor(3.0), side) for side in (-INF, INF))
    for threshold, drop in ((one_less, False), (torch.tensor(3.0), True), (one_more, True)):
        tau = cutoffs(threshold, norms)
        assert (dropped(x, tau) == drop).all()
        assert (kept(x, tau) != drop).all()
        assert ((gate(x, tau) == 0) == drop).all()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([*FEW, 9, 12]),
    st.integers(1, 60),
    st.sampled_from(DTYPES),
    st.sampled_from([-2, -1, 0, 1, 2]),
    st.floats(2**-10, 2**10, width=32),
)
@settings(max_examples=150, deadline=None)
def test_every_path_makes_the_same_decision_next_to_a_tie(seed, rows, n, dtype, ulps, threshold):
    generator = torch.Generator().manual_seed(seed)
    norms = torch.empty(n).uniform_(0.01, 10, generator=generator)
    tau = cutoffs(torch.tensor(threshold), norms)
    nearest = tau.to(dtype).clamp(max=torch.finfo(dtype).max)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    largest = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(bits))  # behind it come infinity and NaN
    x = (nearest.view(bits) + ulps).clamp(max=largest).view(dtype).repeat(rows, 1)
    x *= torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    expected = x.double().abs() > tau.double()
    assert torch.equal(~dropped(x, tau), expected)
    assert torch.equal(gate(x, tau) != 0, expected)
    assert torch.equal(kept(x, tau), expected)
    many = kept(x.repeat(9, 1), tau)
    assert torch.equal(many, expected.repeat(9, 1))


# Strides and shapes


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory order, with values around them that must not be read."""
    if layout == "offset":  # begins within a cache line
        room = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype)
        room[3:] = tensor.reshape(-1)
        return room[3:].view(tensor.shape)
    if layout == "step":
        room = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        room[..., 1::3] = tensor
        return room[..., 1::3]
    if layout == "slice":
        room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
        room[..., 2:-3] = tensor
        return room[..., 2:-3]
    if layout == "transpose":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "flip":  # torch has no negative strides
        return tensor.flip(-1).contiguous().flip(-1)
    assert layout == "plain"
    return tensor


layouts = st.sampled_from(["plain", "offset", "step", "slice", "transpose", "flip"])
SHAPES = [(), (0,), (1,), (3,), (8,), (9,), (2, 4), (3, 3), (2, 0), (1, 5, 2)]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SHAPES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.tuples(layouts, layouts, layouts, layouts),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_memory_order_of_no_argument_matters(seed, leading, n_in, n_out, dtype, chosen, with_bias):
    x, weight_t = randn(seed, *leading, n_in).to(dtype), randn(seed + 1, n_in, n_out).to(dtype)
    tau, bias = randn(seed + 2, n_in).abs(), randn(seed + 3, n_out).to(dtype) if with_bias else None
    arguments = [
        None if t is None else laid_out(t, name) for t, name in zip((x, weight_t, tau, bias), chosen, strict=True)
    ]
    before = [None if t is None else t.clone() for t in arguments]
    y = gated_linear(*arguments)
    check(y, x, weight_t, tau, bias)
    assert all(a is b or torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@every_dtype
@pytest.mark.parametrize("shape", [(4, 30), (9, 30), (2, 7, 30)])
def test_one_row_expanded_over_a_batch_gives_one_result_expanded(shape, dtype):
    row, weight_t, tau = randn(13, 30).to(dtype), randn(14, 30, 11).to(dtype), randn(15, 30).abs()
    y = gated_linear(row.expand(shape), weight_t, tau, None)
    check(y, row.expand(shape), weight_t, tau)
    assert torch.equal(y, y.reshape(-1, 11)[0].expand(*shape[:-1], 11))
    constant = row[:1].expand(shape)  # a single number in memory
    check(gated_linear(constant, weight_t, tau, None), constant, weight_t, tau)


@every_dtype
@pytest.mark.parametrize("leading", [(0,), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_without_rows_gives_no_rows_in_any_memory_order(bias, leading, dtype):
    added = torch.ones(4, dtype=dtype) if bias else None
    for x in (torch.empty(*leading, 6, dtype=dtype), torch.empty(6, *leading, dtype=dtype).movedim(0, -1)):
        y = gated_linear(x, torch.ones(6, 4, dtype=dtype), torch.zeros(6), added)
        assert y.shape == (*leading, 4)
        assert y.dtype == dtype


# Anything at once


def special(dtype: torch.dtype) -> st.SearchStrategy[float]:
    top = min(torch.finfo(dtype).max, 1e18)  # products stay within float32: beyond, the order of a sum decides
    named = [0.0, -0.0, 1.0, -1.0, SMALLEST[dtype], -SMALLEST[dtype], top, -top, torch.inf, -torch.inf, torch.nan]
    return st.sampled_from(named) | st.floats(-4, 4, width=16)


@pytest.mark.slow
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([1, 2, 8, 9, 11]), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_any_mixture_of_numbers_gives_what_float64_gives(data, dtype, rows, n_in, n_out):
    values = special(dtype)
    finite = values.filter(lambda value: abs(value) <= 1e18)
    x = torch.tensor(data.draw(st.lists(values, min_size=rows * n_in, max_size=rows * n_in))).to(dtype)
    weight_t = torch.tensor(data.draw(st.lists(finite, min_size=n_in * n_out, max_size=n_in * n_out))).to(dtype)
    x, weight_t = x.view(rows, n_in), weight_t.view(n_in, n_out)
    threshold = data.draw(st.sampled_from([0.0, 0.5, 1.0, 1e10, torch.inf]) | st.floats(0, 8, width=32))
    norms = column_norms(weight_t)
    tau = cutoffs(torch.tensor(threshold), norms)
    assert not tau[norms.isfinite()].isnan().any()
    bias = randn(n_out, n_out).to(dtype) if data.draw(st.booleans()) else None
    check(gated_linear(x, weight_t, tau, bias), x, weight_t, tau, bias)
