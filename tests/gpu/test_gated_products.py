"""The GPU kernel against sums in float64. Every result is computed twice, in memory that was filled with NaN before."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wina_convert.runtime.kernels import cuda, gated_linear, reference

DTYPES = list(cuda.TYPES)
LLAMA = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]
SHAPES = [*LLAMA, (8192, (28672,)), (28672, (8192,)), (136, (24, 1000, 8)), (8, (8,)), (20000, (264,)), (1024, (32,))]
ODD = [
    (1, (1,)),
    (1, (33,)),
    (33, (1,)),
    (4097, (4095,)),
    (14337, (1000, 7)),
    (2056, (999, 1001, 3)),
    (9, (16,)),
    (20001, (8,)),
]


@pytest.fixture(autouse=True)
def _new_memory_is_filled_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    for card in filter(None, cuda._cards.values()):
        for address in card._slots.values():
            assert not memory(address, cuda.COUNTERS).any()  # as the next launch needs them


def memory(address: int, words: int) -> Tensor:
    """A copy of memory of the card that is not torch's."""

    class Words:
        __cuda_array_interface__ = {"shape": (words,), "typestr": "<i4", "data": (address, False), "version": 2}  # noqa: RUF012

    return torch.as_tensor(Words(), device="cuda").cpu()


def problem(
    n_in: int, outs: tuple[int, ...], rows: int, dtype: torch.dtype, skipped: float, kind: str = "random"
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """x, weights_t, taus, biases; this part of the inputs is skipped, each matrix with thresholds of its own."""
    generator = torch.Generator("cuda").manual_seed(n_in + sum(outs) + rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    x = randn(rows, n_in)
    if kind == "run":  # the kept inputs are neighbours
        x *= torch.linspace(1e-3, 1, n_in, device="cuda").pow(8)
    elif kind == "ends":  # only the first and the last input of every 512 are kept
        x *= 1e-3
        x[:, ::512] = 3
        x[:, 511::512] = -3
        x[:, -1] = 3
    x = x.to(dtype)
    if skipped in (0, 1):
        tau = torch.full((n_in,), torch.inf if skipped else -1.0, device="cuda")
    else:
        tau = x.float().abs().quantile(skipped, dim=1)[0].expand(n_in).contiguous()
    taus = [tau * factor for factor in (1.0, 1.1, 0.9)[: len(outs)]]
    weights_t = [(randn(n_in, out) / n_in**0.5).to(dtype) for out in outs]
    return x, weights_t, taus, [randn(outs[0]).to(dtype), None, randn(outs[-1]).to(dtype)][: len(outs)]


def check(y: Tensor, x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> None:
    """Within float32 accumulation and one rounding of the dtype of the sum in float64."""
    active = torch.where(x.double().abs() <= tau.double(), 0.0, x.double())
    exact = active @ weight_t.double() + (0 if bias is None else bias.double())
    magnitude = active.abs() @ weight_t.double().abs() + (0 if bias is None else bias.double().abs())
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], weight_t.shape[1])
    allowed = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-20 * magnitude + torch.finfo(x.dtype).smallest_normal
    assert ((y.double() - exact).abs() <= allowed).all()


def run(x: Tensor, weights_t: list[Tensor], taus: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """The products in one launch of the kernel; computed twice, to the same bits."""
    ys = cuda.products(x, weights_t, taus, biases)
    assert ys is not None
    again = cuda.products(x, weights_t, taus, biases)
    assert all(torch.equal(y.view(torch.uint8), other.view(torch.uint8)) for y, other in zip(ys, again, strict=True))
    return ys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("n_in", "outs"), SHAPES + ODD, ids=str)
def test_products_are_the_sums_over_the_inputs_above_tau(n_in, outs, rows, dtype):
    for skipped, kind in [(0, "random"), (0.5, "random"), (0.9, "run"), (0.5, "ends"), (1, "random")]:
        x, weights_t, taus, biases = problem(n_in, outs, rows, dtype, skipped, kind)
        ys = run(x, weights_t, taus, biases)
        for y, *arguments in zip(ys, weights_t, taus, biases, strict=True):
            check(y, x, *arguments)
            if skipped == 1:
                expected = torch.zeros_like(y) if arguments[2] is None else arguments[2].expand_as(y)
                assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 64), (63, 65), (14336, 4096)])
def test_nan_and_infinity_stay_visible_and_in_their_row(n_in, n_out, rows, dtype):
    x, (weight_t,), _, (bias,) = problem(n_in, (n_out,), rows, dtype, 0.5)
    tau = torch.full((n_in,), 0.5, device="cuda")
    tau[n_in // 2] = 1e30
    x[0, n_in // 2] = torch.nan  # kept, whatever the threshold
    y = gated_linear(x, weight_t, tau, bias)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
    x[0, n_in // 2] = -torch.inf
    (y,) = run(x, [weight_t], [tau], [bias])
    assert torch.equal(y[0], -torch.inf * weight_t[n_in // 2].sign())
    assert y[1:].isfinite().all()
    x[0, n_in // 2] = 1
    tau[n_in // 2] = torch.nan  # no magnitude is at most NaN
    weight_t[n_in // 2] = torch.inf
    y = gated_linear(x, weight_t, tau, bias)
    assert not y.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("n_in", [64, 61, 9000])
def test_the_weights_of_skipped_inputs_are_not_read(n_in, rows, dtype):
    x, (weight_t,), _, (bias,) = problem(n_in, (40,), rows, dtype, 0.5)
    tau = torch.full((n_in,), 0.7, device="cuda")
    skipped = (x.float().abs() <= tau).all(0)
    clean = torch.where(skipped[:, None], torch.zeros((), dtype=dtype, device="cuda"), weight_t)
    weight_t[skipped] = torch.nan
    (y,) = run(x, [weight_t], [tau], [bias])
    check(y, x, clean, tau, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_only_one_row_keeps_does_not_touch_the_other(dtype):
    x, (weight_t,), _, (bias,) = problem(640, (64,), 2, dtype, 0.5)
    tau = torch.full((640,), 0.5, device="cuda")
    x[0, 100], x[1, 100] = 0.25, 2
    weight_t[100] = torch.inf
    y = gated_linear(x, weight_t, tau, bias)
    assert y[0].isfinite().all()
    assert (y[1] == torch.inf).all()
    weight_t[100] = 0
    check(y[:1], x[:1], weight_t, tau, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_input_equal_to_tau_is_skipped_and_tiny_ones_are_compared_exactly(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 2  # subnormal
    x = torch.tensor([1, -1, 1, 0, tiny, tiny, -tiny, 0], dtype=dtype, device="cuda")
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    tau = torch.tensor([1, 1, below, 0, float(x[4]), 0, 0, -1], device="cuda")
    weight_t = torch.diag(torch.ones(8, dtype=dtype, device="cuda"))
    kept = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0], device="cuda", dtype=dtype)
    assert torch.equal(gated_linear(x, weight_t, tau, None), x * kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_any_address_and_x_in_any_order(dtype):
    x, (weight_t,), (tau,), (bias,) = problem(512, (256,), 2, dtype, 0.5)
    expected = gated_linear(x, weight_t, tau, bias)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)

    for arguments in [(shifted(x), weight_t, tau), (x, shifted(weight_t), tau), (x, weight_t, shifted(tau))]:
        check(gated_linear(*arguments, shifted(bias)), x, weight_t, tau, bias)
    assert torch.equal(gated_linear(x.t().contiguous().t(), weight_t, tau, bias), expected)
    assert torch.equal(gated_linear(x[:, None], weight_t, tau, bias), expected[:, None])
    y = gated_linear(x[1], weight_t, tau, bias)
    check(y, x[1], weight_t, tau, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 3, 8, 65])
def test_more_rows_and_none_go_through_the_dense_product(rows, dtype):
    x, (weight_t,), (tau,), (bias,) = problem(512, (256,), max(rows, 1), dtype, 0.5)
    x = x[:rows]
    assert cuda.products(x, [weight_t], [tau], [bias]) is None
    assert torch.equal(gated_linear(x, weight_t, tau, bias), reference.gated_linear(x, weight_t, tau, bias))


@pytest.mark.parametrize(("n_in", "outs"), LLAMA, ids=str)
def test_products_of_several_streams_at_once_keep_apart(n_in, outs):
    problems = [problem(n_in, outs, 1, torch.bfloat16, skipped) for skipped in (0.1, 0.3, 0.6, 0.8)]
    expected = [run(*arguments) for arguments in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], [[] for _ in problems]
    for _ in range(10):
        for stream, arguments, ys in zip(streams, problems, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(cuda.products(*arguments))
    torch.cuda.synchronize()
    for ys, right in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for repeat in ys for a, b in zip(repeat, right, strict=True))


def test_threads_with_a_stream_each_and_in_one_stream_compute_the_same():
    problems = [problem(14336, (4096,), 1, torch.bfloat16, skipped) for skipped in (0.2, 0.5, 0.5, 0.8)]
    expected = [run(*arguments)[0] for arguments in problems]
    cuda._cards.clear()  # the threads load the kernel anew, all at once
    torch.cuda.synchronize()
    wrong: list[object] = []
    barrier = threading.Barrier(2 * len(problems))

    def work(i: int, own: bool) -> None:
        try:
            barrier.wait()
            with torch.cuda.stream(torch.cuda.Stream() if own else torch.cuda.default_stream()):
                for _ in range(50):
                    (y,) = cuda.products(*problems[i])
                    if not torch.equal(y, expected[i]):
                        wrong.append((i, own))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i, own)) for i in range(len(problems)) for own in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize(("n_in", "outs"), [LLAMA[0], LLAMA[3], (4097, (33,))], ids=str)
def test_a_captured_product_follows_x_and_tau(n_in, outs, first):
    x, weights_t, taus, biases = problem(n_in, outs, 1, torch.bfloat16, 0.5)
    others = [(x * factor, [tau * 0.7 for tau in taus]) for factor in (0.5, 1.0, 2.0)]
    expected = [cuda.products(other, weights_t, lower, biases) for other, lower in others]
    if first:
        cuda._cards.clear()  # modules and counters are made while the stream is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            ys = cuda.products(x, weights_t, taus, biases)
    for (other, lower), right in zip(others, expected, strict=True):
        x.copy_(other)
        for tau, new in zip(taus, lower, strict=True):
            tau.copy_(new)
        for y in ys:
            y.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(ys, right, strict=True))


def test_graphs_captured_in_one_stream_may_run_at_once():
    problems = [problem(14336, (4096,), 1, torch.bfloat16, skipped) for skipped in (0.0, 0.3, 0.6, 0.8)]
    expected = [run(*arguments)[0] for arguments in problems]
    graphs, results = [torch.cuda.CUDAGraph() for _ in problems], []
    for graph, arguments in zip(graphs, problems, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(20):
                (y,) = cuda.products(*arguments)
        results.append(y)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(5):
        for y in results:
            y.fill_(torch.nan)
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = cuda.products(*problems[0])
        torch.cuda.synchronize()
        assert torch.equal(eager[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_compiled_model_replays_it_as_one_graph():
    x, (weight_t,), (tau,), (bias,) = problem(14336, (4096,), 1, torch.bfloat16, 0.5)

    def call(x: Tensor) -> Tensor:
        return gated_linear(2 * x, weight_t, tau, bias) + 1

    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for factor in (1, 0.5, 3, 2, 1):
        torch.testing.assert_close(compiled(factor * x).clone(), call(factor * x), rtol=0, atol=0)


def test_the_gradient_reaches_the_kept_inputs():
    x, (weight_t,), (tau,), (bias,) = problem(512, (256,), 1, torch.float32, 0.5)
    gated_linear(x.requires_grad_(), weight_t, tau, bias).sum().backward()
    keep = x.detach().abs() > tau
    torch.testing.assert_close(x.grad, weight_t.sum(1) * keep, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_accepts_the_op(dtype):
    x, (weight_t,), (tau,), (bias,) = problem(512, (256,), 1, dtype, 0.5)
    torch.library.opcheck(torch.ops.wina.gated_linear.default, (x, weight_t, tau, bias))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_card_than_the_current_one():
    x, (weight_t,), (tau,), (bias,) = problem(14336, (4096,), 1, torch.bfloat16, 0.5)
    expected = gated_linear(x, weight_t, tau, bias)
    there = [t.to("cuda:1") for t in (x, weight_t, tau, bias)]
    for _ in range(2):
        assert torch.equal(gated_linear(*there).to("cuda:0"), expected)
        assert torch.equal(gated_linear(x, weight_t, tau, bias), expected)
