"""The host's side of the GPU kernel without a GPU: fallback and its warning, the op's fake, and what a launch is given.

Launches are carried out by a stand-in that reads the kernel's arguments from their bytes and the tensors from their addresses.
"""

import ctypes
import struct
import threading
import warnings
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wina_convert.runtime.kernels import cuda, driver, nvrtc, reference

DTYPES = list(cuda.TYPES)


@pytest.fixture(autouse=True)
def _no_cards_known(monkeypatch):
    monkeypatch.setattr(cuda, "_cards", {})


class Properties:
    name, major, minor, multi_processor_count = "Some card", 9, 0, 132


def problem(rows, n_in, n_out, dtype, seed=0):
    """x [rows, n_in], weight_t, tau, bias; about half of the inputs are skipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n_in, generator=generator).to(dtype)
    weight_t = torch.randn(n_in, n_out, generator=generator).to(dtype)
    tau = torch.rand(n_in, generator=generator)
    return x, weight_t, tau, torch.randn(n_out, generator=generator).to(dtype)


def tensor_at(address, dtype, *shape):
    """A view of memory; None at address 0."""
    if not address:
        return None
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


@pytest.fixture
def launches(monkeypatch):
    """Products run on the CPU as if it were a card; what each launch was given."""
    seen = []
    kernels = {}

    def launch(function, grid, threads, shared, stream, early, arguments):
        (code, rows, lanes, aligned) = next(key for key, handle in kernels.items() if handle == function)
        dtype = DTYPES[code]
        *fields, matrices, n_in, splits, tiles, x, partial, counters, y1, y2, y3 = struct.unpack(
            "QQQii" * 3 + "iiii" + "QQQQQQ", arguments
        )
        seen.append({"rows": rows, "aligned": aligned, "early": early})
        assert grid == (tiles, splits)
        assert threads == 512
        assert bool(partial) == bool(counters) == (splits > 1)
        x = tensor_at(x, dtype, rows, n_in)
        width = lanes * 16 // dtype.itemsize
        for i in range(matrices):
            weight_t, tau, bias, n_out, first = fields[5 * i : 5 * i + 5]
            y = (y1, y2, y3)[i]
            end = fields[5 * i + 9] if i + 1 < matrices else tiles
            assert end - first == -(-n_out // width)
            weight_t, tau = tensor_at(weight_t, dtype, n_in, n_out), tensor_at(tau, torch.float32, n_in)
            exact = reference.gated_linear(x, weight_t, tau, tensor_at(bias, dtype, n_out))
            tensor_at(y, dtype, rows, n_out).copy_(exact)

    def load(code, name, shared):
        return len(kernels) + 1

    class Card(cuda.Card):
        def kernel(self, *key):
            found = super().kernel(*key)
            kernels[(cuda.TYPES[key[0]], *key[1:])] = found
            return found

    monkeypatch.setattr(cuda, "Card", Card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device says of a CPU tensor
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(nvrtc, "compiled", lambda source, arch, macros: b"")
    for name, stand_in in {
        "bind": lambda index: None,
        "shared_memory": lambda index: 232448,
        "load": load,
        "zeros": lambda nbytes: 1 << 20,
        "launch": launch,
    }.items():
        monkeypatch.setattr(driver, name, stand_in)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 64), (8, 8), (9, 7), (1, 1), (2056, 1000), (9000, 40)])
def test_a_launch_is_given_what_the_product_needs(n_in, n_out, rows, dtype, launches):
    arguments = problem(rows, n_in, n_out, dtype)
    assert torch.equal(cuda.gated_linear(*arguments), reference.gated_linear(*arguments))
    assert torch.equal(cuda.gated_linear(*arguments[:3], None), reference.gated_linear(*arguments[:3], None))
    assert [launch["rows"] for launch in launches] == [rows, rows]
    assert launches[0]["aligned"] == (n_in % 8 == 0 and n_out * dtype.itemsize % 16 == 0)


@pytest.mark.parametrize(("major", "minor", "early"), [(8, 0, False), (8, 9, False), (9, 0, True), (12, 0, True)])
def test_a_launch_overlaps_the_kernel_before_where_the_card_can(major, minor, early, launches, monkeypatch):
    monkeypatch.setattr(Properties, "major", major)
    monkeypatch.setattr(Properties, "minor", minor)
    monkeypatch.setattr(cuda, "_cards", {})
    cuda.gated_linear(*problem(1, 64, 32, torch.bfloat16))
    assert [launch["early"] for launch in launches] == [early]


def test_several_matrices_share_one_launch(launches):
    x, first, tau, bias = problem(1, 64, 512, torch.bfloat16)
    others = [problem(1, 64, n_out, torch.bfloat16, seed=n_out) for n_out in (8, 264)]
    weights = [first, *[other[1] for other in others]]
    taus, biases = [tau, *[other[2] for other in others]], [None, others[0][3], bias[:264]]
    ys = cuda.products(x, weights, taus, biases)
    assert len(launches) == 1
    for y, *arguments in zip(ys, weights, taus, biases, strict=True):
        assert torch.equal(y, reference.gated_linear(x, *arguments))


def test_memory_that_starts_between_multiples_of_sixteen_bytes_is_read_by_the_careful_variant(launches):
    x, weight_t, tau, _ = problem(1, 64, 64, torch.bfloat16)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, weight_t, tau)]
    for arguments in [(shifted[0], weight_t, tau), (x, shifted[1], tau), (x, weight_t, shifted[2])]:
        assert torch.equal(cuda.gated_linear(*arguments, None), reference.gated_linear(x, weight_t, tau, None))
    assert [launch["aligned"] for launch in launches] == [False] * 3


def test_any_leading_shape_and_memory_order_of_x(launches):
    x, weight_t, tau, bias = problem(2, 64, 8, torch.float32)
    for view in (x[0], x[:1, None], x.t().contiguous().t(), x[None], x[:1].expand(2, -1)):
        y = cuda.gated_linear(view, weight_t, tau, bias)
        assert torch.equal(y, reference.gated_linear(view.contiguous(), weight_t, tau, bias))
    assert len(launches) == 5


def test_what_the_kernel_cannot_read_goes_to_torch(launches):
    x, weight_t, tau, bias = problem(3, 64, 8, torch.float32)
    cases = [
        (x, weight_t, tau, bias),  # three rows
        (x[:0], weight_t, tau, bias),
        (x[:1], weight_t.t().contiguous().t(), tau, bias),
        (x[:1], weight_t, tau.repeat_interleave(2)[::2], bias),
        (x[:1].double(), weight_t.double(), tau, bias.double()),
        (x[:1], weight_t, tau.double(), bias),
        (x[:1], weight_t, tau, bias.repeat_interleave(2)[::2]),
    ]
    for case in cases:
        torch.testing.assert_close(cuda.gated_linear(*case), reference.gated_linear(*case), rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        cuda.gated_linear(x[:1], weight_t[:, :4], tau, bias)
    assert not launches


def test_each_stream_and_each_capture_counts_for_itself(launches, monkeypatch):
    addresses = iter(range(1 << 20, 1 << 30, 1 << 20))
    monkeypatch.setattr(driver, "zeros", lambda nbytes: next(addresses))
    card = cuda.Card(0)
    plain = [card.counters(stream) for stream in range(100)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(driver, "capture_of", lambda stream: 1)
    first = card.counters(3)
    monkeypatch.setattr(driver, "capture_of", lambda stream: 2)
    second = card.counters(3)
    given = sorted([*plain, first, second])
    assert all(b - a >= 4 * cuda.COUNTERS for a, b in pairwise(given))
    assert card.counters(3) == second
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [card.counters(stream) for stream in range(100)] == plain


def test_threads_that_need_a_variant_at_once_compile_it_once(launches, monkeypatch):
    compiled = []
    monkeypatch.setattr(nvrtc, "compiled", lambda *arguments: compiled.append(arguments) or b"")
    card, barrier = cuda.Card(0), threading.Barrier(4)

    def work():
        barrier.wait()
        card.kernel(torch.float32, 1, 32, True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def refusals(monkeypatch):
    """What can be missing, and the words of the warning."""
    yield "built without CUDA", lambda: monkeypatch.setattr(torch.version, "cuda", None)
    old = type("Old", (Properties,), {"major": 7, "minor": 5})
    yield (
        r"compute capability 7\.5; the kernels need 8\.0",
        lambda: monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old),
    )

    def broken(error):
        def fail(*_):
            raise error

        return fail

    missing = nvrtc.NvrtcError("NVRTC is missing")
    yield "NVRTC is missing", lambda: monkeypatch.setattr(nvrtc, "compiled", broken(missing))
    refused = driver.DriverError("cuModuleLoadData: no kernel image is available (209)")
    yield "no kernel image", lambda: monkeypatch.setattr(driver, "load", broken(refused))


@pytest.mark.parametrize("case", range(4))
def test_where_the_kernel_does_not_do_torch_computes_and_one_warning_says_why(case, launches, monkeypatch):
    words, apply = list(refusals(monkeypatch))[case]
    apply()
    arguments = problem(1, 64, 8, torch.float32)
    with pytest.warns(RuntimeWarning, match=words):
        y = cuda.gated_linear(*arguments)
    assert torch.equal(y, reference.gated_linear(*arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cuda.gated_linear(*arguments), y)
    assert not launches


def test_a_launch_that_fails_is_an_error_and_no_reason_to_fall_back(launches, monkeypatch):
    def fail(*_):
        raise driver.DriverError("cuLaunchKernel: an illegal memory access was encountered (700)")

    monkeypatch.setattr(driver, "launch", fail)
    with pytest.raises(driver.DriverError, match="illegal memory access"):
        cuda.gated_linear(*problem(1, 64, 8, torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the driver")
def test_a_machine_without_the_driver_is_told_so():
    with pytest.raises(driver.DriverError, match="driver cannot be loaded"):
        driver.shared_memory(0)


@pytest.mark.parametrize("leading", [(), (1,), (2, 1), (2, 3, 4), (0,)])
def test_the_fake_of_the_op_knows_the_result_on_a_card(leading):
    with FakeTensorMode():
        x = torch.empty(*leading, 64, dtype=torch.bfloat16, device="cuda")
        weight_t = torch.empty(64, 24, dtype=torch.bfloat16, device="cuda")
        y = torch.ops.wina.gated_linear(x, weight_t, torch.empty(64, device="cuda"), None)
    assert y.device.type == "cuda"
    assert y.dtype is torch.bfloat16
    assert y.shape == (*leading, 24)
    assert y.is_contiguous()


def test_the_op_has_the_kernel_behind_it_on_a_card():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("wina::gated_linear", "CUDA")
