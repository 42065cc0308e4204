"""The compiled kernels for a few rows on a CPU: sums, rounding and threads."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.products import DTYPES, problem
from wina_convert.runtime.kernels import streaming

pytestmark = pytest.mark.usefixtures("threads_as_before")


HALF = DTYPES[1:]
THREADS = [1, 2, 3, 7]
EDGES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 129, 777, 1023, 1024, 1025, 1333, 2047, 2048, 2049]
LEADING = [(), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (2, 3), (1, 1, 2)]


def call(kernel: str, x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """One of the two kernels; `dots` takes the weight the other way round and skips nothing."""
    if kernel == "columns":
        return streaming.columns(x, weight_t, tau, bias)
    return streaming.dots(x, weight_t.t().contiguous(), bias)


def check(kernel: str, y: Tensor, x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> None:
    """Compare with the sum in float64: float32 accumulation and one rounding to the dtype."""
    active = x.double() if kernel == "dots" else x.double() * (x.double().abs() > tau.double())
    added = 0 if bias is None else bias.double()
    exact = active @ weight_t.double() + added
    magnitude = active.abs() @ weight_t.double().abs() + abs(added)
    info = torch.finfo(x.dtype)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    accumulation = 2**-24 * (4 + x.shape[-1] ** 0.5) * magnitude
    rounding = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    assert ((y.double() - exact).abs() <= accumulation + rounding).all()


kernels = pytest.mark.parametrize("kernel", ["columns", "dots"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_thread_count = pytest.mark.parametrize("threads", THREADS)


@given(
    st.sampled_from(["columns", "dots"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(LEADING),
    st.sampled_from(EDGES) | st.integers(1, 300),
    st.sampled_from(EDGES) | st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(THREADS),
    st.sampled_from([1, streaming.GRAIN]),
    st.sampled_from([-1.0, 0.5, 1.0, 3.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_result_is_the_sum_in_float64_rounded_once(
    kernel, seed, leading, n_in, n_out, dtype, bias, threads, grain, scale
):
    x, weight_t, tau, added = problem(seed, leading, n_in, n_out, dtype, bias)
    arguments = x, weight_t, scale * tau, added
    torch.set_num_threads(threads)
    with mock.patch.object(streaming, "GRAIN", grain):  # at 1 even a tiny weight is divided among the threads
        check(kernel, call(kernel, *arguments), *arguments)


@kernels
@every_dtype
@every_thread_count
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (3, 5), (3, 80_000), (80_000, 3), (777, 1333)])
def test_every_number_of_rows_gives_the_sum(n_in, n_out, threads, dtype, kernel):
    torch.set_num_threads(threads)
    for rows in range(1, 9) if n_in * n_out < 100_000 else (1, 8):
        arguments = problem(rows, (rows,), n_in, n_out, dtype)
        check(kernel, call(kernel, *arguments), *arguments)


@kernels
@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [(1, 1), (7, 33), (65, 64), (129, 1333), (777, 95)])
def test_a_row_among_others_has_the_bits_that_it_has_alone(n, threads, dtype, kernel, monkeypatch):
    monkeypatch.setattr(streaming, "GRAIN", 1)
    torch.set_num_threads(threads)
    x, weight_t, tau, bias = problem(9, (8,), *n, dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16  # the signs of zeros as well
    x[2] = 0  # keeps nothing, where the rows beside it keep inputs of their own
    x[5, ::2] *= 100  # keeps more than the others
    for added in (bias, None):
        alone = [call(kernel, row, weight_t, tau, added) for row in x]
        for rows in range(2, 9):
            for chosen in (list(range(rows)), list(range(7, 7 - rows, -1))):
                together = call(kernel, x[chosen], weight_t, tau, added)
                assert torch.equal(together.view(bits), torch.stack([alone[row] for row in chosen]).view(bits))


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(streaming, "GRAIN", 1)
    for rows in (1, 3, 8):
        arguments = problem(rows, (rows,), 300, 1333, dtype)
        torch.set_num_threads(1)
        expected = streaming.columns(*arguments)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(streaming.columns(*arguments), expected)


@every_dtype
@every_thread_count
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_of_the_same_x_in_one_call_have_the_bits_that_each_has_alone(rows, threads, dtype, requested):
    torch.set_num_threads(threads)
    x, weight_t, _, bias = problem(10, (rows,), 300, 1333, dtype)
    taus = [quantile * torch.rand(300, generator=torch.Generator().manual_seed(rows)) for quantile in (-1, 1, 2, 9e9)]
    weights_t = [weight_t, weight_t[:, :65].contiguous(), weight_t[:, 5:].t().contiguous().t(), weight_t[:, :1]]
    biases = [None, bias[:65], bias[5:], bias[:1]]
    alone = [streaming.columns(x, *one) for one in zip(weights_t, taus, biases, strict=True)]
    requested.clear()
    together = streaming.several_columns(x, weights_t, taus, biases)
    assert requested == [threads]
    assert all(map(torch.equal, together, alone))
    check("columns", together[0], x, weights_t[0], taus[0], biases[0])


@every_dtype
def test_one_product_of_several_that_does_not_fit_is_refused(dtype):
    x, weight_t, tau, bias = problem(11, (2,), 6, 4, dtype)
    for wrong in ((weight_t[:5], tau, bias), (weight_t, tau[:5], bias), (weight_t, tau, bias[:3])):
        with pytest.raises(ValueError, match="is needed"):
            streaming.several_columns(x, *zip((weight_t, tau, bias), wrong, strict=True))


@kernels
@every_dtype
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_an_empty_batch_gives_an_empty_result(leading, dtype, kernel):
    y = call(kernel, *problem(0, leading, 5, 3, dtype))
    assert y.shape == (*leading, 3)
    assert y.dtype == dtype


@every_dtype
@every_thread_count
def test_rows_that_keep_nothing_are_the_bias_beside_one_that_keeps_something(threads, dtype):
    torch.set_num_threads(threads)
    x, weight_t, tau, bias = problem(1, (4,), 300, 400, dtype)
    x[[0, 1, 3]] = 0
    y = streaming.columns(x, weight_t, tau, bias)
    check("columns", y, x, weight_t, tau, bias)
    assert torch.equal(y[[0, 1, 3]], bias.expand(3, -1))
    nothing = streaming.columns(x, weight_t, torch.full((300,), torch.inf), bias)
    assert torch.equal(nothing, bias.expand(4, -1))


@kernels
@every_dtype
@every_thread_count
def test_a_nan_or_an_infinity_stays_in_its_row(threads, dtype, kernel):
    torch.set_num_threads(threads)
    x, weight_t, tau, bias = problem(2, (5,), 300, 400, dtype)
    tau[17] = 1e30
    plain = call(kernel, x, weight_t, tau, bias)
    x[1, 17], x[3, 299] = torch.nan, -torch.inf
    y = call(kernel, x, weight_t, tau, bias)
    assert y[1].isnan().all()
    assert torch.equal(y[3], -torch.inf * weight_t[299].sign())
    assert y[[0, 2, 4]].isfinite().all()
    torch.testing.assert_close(y[[0, 2, 4]], plain[[0, 2, 4]])


@kernels
@pytest.mark.parametrize("dtype", HALF)
def test_a_sum_is_rounded_as_torch_rounds_it(dtype, kernel):
    info = torch.finfo(dtype)
    weight_t = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(0)  # every value of the dtype
    x = torch.tensor([1, -1, 1.5, -1 / 3, 1 + info.eps, 2**-10, info.max, info.tiny], dtype=dtype).unsqueeze(1)
    exact = x.float() * weight_t.float()  # one product is one float32
    expected, y = exact.to(dtype), call(kernel, x, weight_t, torch.tensor([-1.0]), None)
    zero, nan = exact == 0, exact.isnan()
    assert (expected.isinf() & exact.isfinite()).any()  # too large for the dtype
    assert ((expected == 0) & ~zero & exact.signbit()).any()  # rounded to a negative zero
    assert not y[zero].any()  # of either sign
    assert torch.equal(y.isnan(), nan)
    number = ~zero & ~nan
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))


@kernels
@every_dtype
@every_thread_count
def test_the_same_call_gives_the_same_bits(threads, dtype, kernel):
    torch.set_num_threads(threads)
    for rows in (1, 5):
        arguments = problem(3, (rows,), 777, 1333, dtype)
        first = call(kernel, *arguments)
        assert all(torch.equal(call(kernel, *arguments), first) for _ in range(5))


@kernels
@every_dtype
def test_the_memory_order_of_the_arguments_does_not_matter(dtype, kernel):
    def spread(tensor: Tensor) -> Tensor:
        view = torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]
        assert not view.is_contiguous()
        return view

    x, weight_t, tau, bias = problem(4, (3, 2), 40, 30, dtype)
    expected = call(kernel, x, weight_t, tau, bias)
    for weight in (spread(weight_t), weight_t.t().contiguous().t()):
        for view in (spread(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
            matrix = weight if kernel == "columns" else weight.t()
            gated = (spread(tau),) if kernel == "columns" else ()
            assert torch.equal(getattr(streaming, kernel)(view, matrix, *gated, spread(bias)), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x[..., 1:]),
        ("x", lambda x: x.half()),
        ("bias", lambda bias: bias[:1]),
        ("bias", lambda bias: bias[None]),
        ("bias", lambda bias: bias.half()),
        ("tau", lambda tau: tau[:1]),
        ("tau", lambda tau: tau[None]),
        ("tau", lambda tau: tau.double()),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(name, change):
    arguments = dict(zip(("x", "weight_t", "tau", "bias"), problem(5, (2,), 6, 4, torch.float32), strict=True))
    arguments[name] = change(arguments[name])
    for kernel in ["columns"] if name == "tau" else ["columns", "dots"]:
        with pytest.raises(ValueError, match=f"{name} is"):
            call(kernel, **arguments)


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads of every parallel region from now on."""
    counts, enter = [], streaming._parallel
    monkeypatch.setattr(streaming, "_parallel", lambda *call: (counts.append(call[2]), enter(*call)))
    return counts


@kernels
def test_a_large_weight_takes_the_threads_of_torch_and_a_small_one_takes_one(requested, kernel):
    for threads in THREADS:
        torch.set_num_threads(threads)
        call(kernel, *problem(6, (1,), 512, 512, torch.bfloat16))
        call(kernel, *problem(6, (8,), 8, 8, torch.bfloat16))
    assert requested == [count for threads in THREADS for count in (threads, 1)]


@kernels
def test_a_region_has_all_threads_or_one(requested, kernel):
    """The runtime ends threads that a region does not have, and starts them anew for the next one that does."""
    torch.set_num_threads(7)
    for width in (1, 30, 50, 90, 120, 200, 350, 500):
        call(kernel, *problem(0, (1,), 300, width, torch.float32))
    streaming.attend(torch.randn(1, 6, 1, 64), torch.randn(1, 3, 700, 64), torch.randn(1, 3, 700, 64), 1.0)
    assert set(requested) == {1, 7}
    assert requested[-1] == 7


@every_thread_count
def test_reading_memory_reads_all_of_it_with_all_threads(threads, requested, monkeypatch):
    sums, run = [], streaming._run
    monkeypatch.setattr(streaming, "_run", lambda *arguments: (run(*arguments), sums.append(arguments[3][0][1])))
    torch.set_num_threads(threads)
    memory = torch.randint(-(2**62), 2**62, (4 * 42 * 100,), generator=torch.Generator().manual_seed(7))
    before = memory.clone()
    streaming.read(memory)
    assert requested == [threads]
    assert len(sums[0]) == threads
    assert torch.equal(sums[0].sum(), memory.sum())
    assert torch.equal(memory, before)
