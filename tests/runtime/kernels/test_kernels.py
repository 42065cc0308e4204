"""The op wina::gated_linear against a float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.products import DTYPES, problem
from wina_convert.runtime.kernels import gated_linear

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 67)
dtypes = st.sampled_from(DTYPES)
ROWS = [1, 2, 3, 7, 8, 9, 40]  # a few stream, many do not
LEADING = [(), (1,), (5,), (8,), (9,), (2, 3), (1, 1), (3, 1, 4)]


def check(y: Tensor, x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> None:
    """Compare with the sum in float64, within float32 accumulation and the rounding of the dtype."""
    active = x.double() * (x.double().abs() > tau.double())
    added = 0 if bias is None else bias.double()
    product = active @ weight_t.double()
    magnitude = active.abs() @ weight_t.double().abs() + abs(added)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight_t.shape[1])
    rounding = torch.finfo(x.dtype).eps * (product.abs() + (product + added).abs())
    allowed = rounding + 2**-22 * magnitude + torch.finfo(x.dtype).smallest_normal
    assert ((y.double() - (product + added)).abs() <= allowed).all()


@given(seeds, st.sampled_from(LEADING), sizes, sizes, dtypes, st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_product_is_the_sum_over_the_inputs_above_tau(seed, leading, n_in, n_out, dtype, bias):
    arguments = problem(seed, leading, n_in, n_out, dtype, bias)
    check(gated_linear(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (1, 33), (33, 1), (352, 128), (129, 257)])
def test_every_number_of_rows_gives_the_sum(rows, n_in, n_out, dtype):
    arguments = problem(rows, (rows,), n_in, n_out, dtype)
    check(gated_linear(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 5, 17, 18])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_right_however_the_outputs_are_divided_into_blocks(bias, columns, dtype, monkeypatch):
    monkeypatch.setattr("wina_convert.runtime.kernels.cpu.WIDENED", 4 * 33 * columns)
    monkeypatch.setattr("wina_convert.runtime.kernels.cpu.multiplies", lambda dtype: False)
    arguments = problem(0, (20,), 33, 17, dtype, bias)
    check(gated_linear(*arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 20])
def test_a_processor_with_instructions_for_half_precision_gives_the_sum_too(rows, dtype, monkeypatch):
    monkeypatch.setattr("wina_convert.runtime.kernels.cpu.multiplies", lambda dtype: True)
    arguments = problem(14, (rows,), 33, 17, dtype)
    check(gated_linear(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_an_empty_batch_gives_an_empty_result(leading, dtype):
    y = gated_linear(*problem(0, leading, 5, 3, dtype))
    assert y.shape == (*leading, 3)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20])
def test_the_memory_order_of_x_does_not_matter(rows, dtype):
    x, weight_t, tau, bias = problem(1, (rows, 2), 24, 7, dtype)
    strided = torch.stack([x, x], -1)[..., 0]
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([x, x], -1)[..., : x.shape[-1]]
    expanded = x[:1].expand(3, -1, -1)
    for view in (strided, transposed, sliced, expanded):
        assert not view.is_contiguous()
        check(gated_linear(view, weight_t, tau, bias), view, weight_t, tau, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_when_everything_is_skipped_the_bias_remains(rows, dtype):
    x, weight_t, _, bias = problem(2, (rows,), 31, 5, dtype)
    everything = torch.full((31,), torch.inf)
    assert torch.equal(gated_linear(x, weight_t, everything, bias), bias.expand(rows, -1))
    assert not gated_linear(x, weight_t, everything, None).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_when_nothing_is_skipped_it_is_the_dense_product(tau, rows, dtype):
    x, weight_t, _, bias = problem(3, (rows,), 31, 5, dtype)
    x[:, 4] = 0
    tau = torch.full((31,), tau)
    check(gated_linear(x, weight_t, tau, bias), x, weight_t, torch.full((31,), -1.0), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_rows_that_keep_different_inputs_do_not_mix(rows, dtype):
    n = 20
    x = torch.zeros(rows, n, dtype=dtype)
    for row in range(rows):
        x[row, row % n] = 2.0
    weight_t = torch.arange(n * 3, dtype=dtype).view(n, 3)
    y = gated_linear(x, weight_t, torch.ones(n), None)
    assert torch.equal(y, 2 * weight_t[torch.arange(rows) % n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_an_input_equal_to_tau_is_skipped(rows, dtype):
    x = torch.tensor([[1.0, -1.0, 1.0]], dtype=dtype).expand(rows, -1)
    tau = torch.tensor([1.0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))])
    weight_t = torch.tensor([[1.0], [10.0], [100.0]], dtype=dtype)
    assert torch.equal(gated_linear(x, weight_t, tau, None), torch.full((rows, 1), 100.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bias", [True, False])
def test_a_nan_reaches_every_output_of_its_row_and_no_other_row(bias, rows, dtype):
    x, weight_t, tau, added = problem(4, (rows,), 31, 5, dtype, bias)
    x[0, 17] = torch.nan
    tau[17] = 1e30
    y = gated_linear(x, weight_t, tau, added)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinity_reaches_the_output(sign, rows, dtype):
    x, weight_t, tau, bias = problem(5, (rows,), 31, 5, dtype)
    x[0, 17] = sign * torch.inf
    y = gated_linear(x, weight_t, tau, bias)
    assert torch.equal(y[0], sign * torch.inf * weight_t[17].sign())
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 20])
def test_half_precision_sums_in_float32(rows, dtype):
    # In half precision 1 + 4096 * 2**-12 stays at 1: every further term is below half a unit.
    n = 4097
    x = torch.full((rows, n), 2.0**-12, dtype=dtype)
    x[:, 0] = 1
    y = gated_linear(x, torch.ones(n, 3, dtype=dtype), torch.zeros(n), None)
    assert torch.equal(y, torch.full((rows, 3), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_bias_is_added_before_the_sum_is_rounded(rows, dtype):
    x, weight_t, tau, _ = problem(6, (rows,), 300, 200, dtype)
    exact = (x.double() * (x.double().abs() > tau)) @ weight_t.double()
    bias = -exact[0].to(dtype)  # what is left is far smaller than either
    y = gated_linear(x, weight_t, tau, bias)
    expected = exact[0] + bias.double()
    assert ((y[0].double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps + 1e-4).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_a_float64_model_keeps_its_precision(rows):
    x, weight_t, tau, bias = problem(10, (rows,), 31, 5, torch.float64)
    exact = (x * (x.abs() > tau)) @ weight_t + bias
    torch.testing.assert_close(gated_linear(x, weight_t, tau, bias), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_call_gives_the_same_bits(rows, dtype):
    arguments = problem(7, (rows,), 352, 128, dtype)
    first = gated_linear(*arguments)
    assert all(torch.equal(gated_linear(*arguments), first) for _ in range(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inputs_stay_as_they_are(dtype):
    arguments = problem(8, (3,), 31, 5, dtype)
    before = [argument.clone() for argument in arguments]
    y = gated_linear(*arguments)
    y.zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@given(seeds, st.sampled_from(LEADING), sizes, sizes, dtypes)
@settings(deadline=None)
def test_the_gradient_in_x_reaches_the_kept_inputs_and_no_others(seed, leading, n_in, n_out, dtype):
    x, weight_t, tau, bias = problem(seed, leading, n_in, n_out, dtype)
    y = gated_linear(x.requires_grad_(), weight_t, tau, bias)
    check(y.detach(), x.detach(), weight_t, tau, bias)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y.backward(upstream)
    keep = x.detach().double().abs() > tau
    exact = upstream.double() @ weight_t.double().t() * keep
    magnitude = upstream.double().abs() @ weight_t.double().abs().t()
    allowed = torch.finfo(dtype).eps * exact.abs() + 2**-22 * magnitude + torch.finfo(dtype).smallest_normal
    assert x.grad.dtype == dtype
    assert ((x.grad.double() - exact).abs() <= allowed).all()
    assert not x.grad[~keep].any()


@pytest.mark.parametrize("rows", [3, 20])
def test_autograd_agrees_with_finite_differences(rows):
    x, weight_t, _, bias = problem(12, (rows,), 9, 5, torch.float64)
    tau = torch.tensor([0.0, torch.inf] * 4 + [0.0])  # a small step changes no choice
    arguments = x.requires_grad_(), weight_t, tau, bias
    assert torch.autograd.gradcheck(gated_linear, arguments)
    assert torch.autograd.gradgradcheck(gated_linear, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 20])
def test_nothing_is_recorded_where_no_gradient_is_wanted(rows, dtype):
    x, weight_t, tau, bias = problem(13, (rows,), 31, 5, dtype)
    plain = gated_linear(x, weight_t, tau, bias)
    with torch.no_grad():
        unrecorded = gated_linear(x.requires_grad_(), weight_t, tau, bias)
    recorded = gated_linear(x, weight_t, tau, bias)
    assert recorded.requires_grad
    assert plain.grad_fn is unrecorded.grad_fn is None
    assert torch.equal(plain, unrecorded)
    assert torch.equal(plain, recorded)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (20,), (2, 3), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_accepts_the_op(bias, leading, dtype):
    x, weight_t, tau, added = problem(9, leading, 31, 5, dtype, bias)
    torch.library.opcheck(torch.ops.wina.gated_linear.default, (x, weight_t, tau, added))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20])
def test_torch_accepts_the_op_with_x_in_any_memory_order(rows, dtype):
    x, weight_t, tau, bias = problem(9, (rows, 4), 31, 5, dtype)
    torch.library.opcheck(torch.ops.wina.gated_linear.default, (x.transpose(0, 1), weight_t, tau, bias))


@pytest.mark.slow
def test_a_compiled_call_is_one_graph_and_equals_the_eager_one():
    # With torch's own compiler behind it: test_loader.py.
    def call(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
        return torch.relu(gated_linear(2 * x, weight_t, tau, bias)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for dtype in DTYPES:
        for rows in (1, 3, 20):
            arguments = problem(rows, (rows,), 31, 5, dtype)
            torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch warns of itself
@pytest.mark.parametrize("rows", [3, 20])
def test_a_compiled_call_has_the_gradient_of_the_eager_one(rows):
    def call(x: Tensor) -> Tensor:
        return gated_linear(2 * x, weight_t, tau, bias).square().sum()

    torch._dynamo.reset()
    x, weight_t, tau, bias = problem(15, (rows,), 31, 5, torch.float32)
    x.requires_grad_()
    (eager,) = torch.autograd.grad(call(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20])
def test_a_projection_without_inputs_gives_the_bias(rows, dtype):
    bias = torch.ones(3, dtype=dtype)
    y = gated_linear(torch.zeros(rows, 0, dtype=dtype), torch.zeros(0, 3, dtype=dtype), torch.zeros(0), bias)
    assert torch.equal(y, bias.expand(rows, 3))


def test_a_weight_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match="x is on cpu and the weight on meta"):
        gated_linear(torch.ones(1, 3), torch.ones(3, 2, device="meta"), torch.zeros(3), None)
