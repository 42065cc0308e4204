"""Products of one to a few rows with a matrix, at the speed at which a CPU reads the matrix.

`columns` is the gated product: it reads only the rows of the transposed weight whose inputs are kept. Each thread has some of the
outputs. It walks the kept rows, a few side by side, and adds them to sums of its own that stay in its cache; while it reads
some, the next ones are fetched. All rows of x take part at once: a weight is read and widened once, and the sums of a few
outputs are in registers meanwhile. A sum is made in the order of the inputs: neither the rows beside it nor the number of
threads changes a bit of it. `dots` is the dense product with a plain [out, in] weight.

Compiled by numba on first use and cached on disk. The threads are those of torch's own OpenMP runtime: two pools on the same
cores would wait for each other. Nothing is locked, so several Python threads may call at once.
"""

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from .vectors import LANES, STRIP, accumulate, narrow, pointer, widen

AHEAD = 16  # rows of the weight that are fetched ahead
GRAIN = 1 << 15  # weights below which another thread costs more than it brings
LINE = 16  # float32 in a cache line

# bfloat16 and float16 are told apart by the sign of the integer that holds their bits.
STORAGE = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}

# Addresses and sizes of a product, and how many products the call has.
FIELDS = ("x", "weight", "tau", "bias", "y", "scratch", "rows", "n_in", "n_out", "count")
TASK = np.dtype([(name, np.int64) for name in FIELDS])
_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}
_SUM_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
_local = threading.local()
_log = logging.getLogger(__name__)


def _openmp() -> Callable[..., None]:
    """The entry into a parallel region of the OpenMP runtime that torch is linked with, its threads shared.

    Raises:
        OSError, AttributeError: torch has no such runtime here.
    """
    library = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))), Path("libtorch_cpu"))
    runtime = ctypes.CDLL(str(library))  # symbols are looked up in the libraries it is linked with as well
    for symbol in ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(runtime, symbol), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"wina_{symbol}", address)
    parallel = runtime.GOMP_parallel  # a call releases the interpreter lock
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


_parallel = _openmp()
_barrier = types.ExternalFunction("wina_GOMP_barrier", types.void())
_thread = types.ExternalFunction("wina_omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("wina_omp_get_num_threads", types.int32())


@numba.njit(**_OPTIONS)
def _compact(x, tau, rows, n_in, start, stop, index, value):
    """List the inputs of [start, stop) that some row keeps, from `index[start]`; their values, 0 where a row drops them."""
    n = start
    for j in range(start, stop):
        kept = False
        for r in range(rows):
            v = widen(x[r * n_in + j])
            keep = not (abs(v) <= tau[j])  # a NaN is kept
            value[n * rows + r] = v if keep else np.float32(0)
            kept |= keep
        index[n] = j
        n += kept
    return n - start


@numba.njit(**_OPTIONS)
def _kept_by(counts, threads):
    """How many inputs the first threads have listed."""
    kept = 0
    for t in range(threads):
        kept += counts[t * LINE]
    return kept


@numba.njit(**_OPTIONS)
def _gather(task, part_at, index_at, counts, address, value, row_bytes):
    """Copy what this thread has listed behind what the threads before it have.

    address[k]: of the weights of the k-th; value[k, r]: what row r has there, 0 where it drops the input.
    """
    rows, n_in = task.rows, task.n_in
    me, threads = _thread(), _threads()
    start, mine = n_in * me // threads, counts[me * LINE]
    part, index = (
        carray(pointer(part_at), (rows * n_in,), types.float32),
        carray(pointer(index_at), (n_in,), types.int32),
    )
    before, active = _kept_by(counts, me), _kept_by(counts, threads)
    for k in range(mine):
        address[before + k] = task.weight + index[start + k] * row_bytes
    for i in range(mine * rows):
        value[before * rows + i] = part[start * rows + i]
    if me == 0:  # what is fetched ahead of the last ones
        address[active : active + AHEAD] = task.weight


@numba.njit(error_model="numpy")
def _finish(total, bias, added, y, pairs, strips, rest):
    """y = total + bias, rounded; `pairs`: in a strip the even columns come before the odd ones."""
    for s in range(strips):
        left = s * STRIP
        for p in range(LANES):
            first, second = (2 * p, 2 * p + 1) if pairs else (p, LANES + p)
            # Adding 0 makes a negative zero positive, which is all that a dropped input could have done to a sum.
            even, odd = total[left + p] + np.float32(0), total[left + LANES + p] + np.float32(0)
            if added:
                even, odd = even + widen(bias[left + first]), odd + widen(bias[left + second])
            y[left + first], y[left + second] = narrow(even, y[0]), narrow(odd, y[0])
    for o in range(strips * STRIP, strips * STRIP + rest):
        sum_ = total[o] + np.float32(0)
        y[o] = narrow(sum_ + widen(bias[o]) if added else sum_, y[0])


@numba.njit(**_SUM_OPTIONS)
def _dots(task, x, weight, bias, y, value):
    """y[r] = bias + weight @ x[r]; in each thread of a region."""
    rows, n_in, n_out = task.rows, task.n_in, task.n_out
    me, threads = _thread(), _threads()
    for i in range(rows * n_in * me // threads, rows * n_in * (me + 1) // threads):
        value[i] = widen(x[i])
    _barrier()
    start, stop = n_out * me // threads, n_out * (me + 1) // threads
    quarter = (stop - start + 3) // 4
    for o in range(start, start + quarter):
        # Four streams; the last may be shorter: then some outputs are computed more than once.
        o1, o2, o3 = min(o + quarter, stop - 1), min(o + 2 * quarter, stop - 1), min(o + 3 * quarter, stop - 1)
        w0, w1, w2, w3 = weight[o * n_in :], weight[o1 * n_in :], weight[o2 * n_in :], weight[o3 * n_in :]
        for r in range(rows):
            v = value[r * n_in :]
            s0 = s1 = s2 = s3 = np.float32(0)
            for j in range(n_in):
                s0 += v[j] * widen(w0[j])
                s1 += v[j] * widen(w1[j])
                s2 += v[j] * widen(w2[j])
                s3 += v[j] * widen(w3[j])
            if task.bias:
                s0, s1, s2, s3 = (
                    s0 + widen(bias[o]),
                    s1 + widen(bias[o1]),
                    s2 + widen(bias[o2]),
                    s3 + widen(bias[o3]),
                )
            y[r * n_out + o3] = narrow(s3, weight[0])
            y[r * n_out + o2] = narrow(s2, weight[0])
            y[r * n_out + o1] = narrow(s1, weight[0])
            y[r * n_out + o] = narrow(s0, weight[0])


@numba.njit(**_SUM_OPTIONS)
def _read(task, weight, y):
    """y[thread] = a sum over the thread's part of `weight`, read in four streams: how fast memory can be read at all."""
    me, threads = _thread(), _threads()
    quarter = task.n_in // (4 * threads)
    w0, w1 = weight[4 * me * quarter :], weight[(4 * me + 1) * quarter :]
    w2, w3 = weight[(4 * me + 2) * quarter :], weight[(4 * me + 3) * quarter :]
    total = 0
    for i in range(quarter):
        total += (w0[i] + w1[i]) + (w2[i] + w3[i])
    y[me] = total


_SIGNATURE = types.void(types.CPointer(numba.from_dtype(TASK)))


def _compile(body: Callable[[Any], None]) -> int:
    """Address of the machine code of `body`; from the disk if it was compiled before, on this kind of processor."""
    begin = perf_counter()
    try:
        compiled = numba.cfunc(_SIGNATURE, cache=True, **_OPTIONS)(body)
    except RuntimeError:  # no folder to cache in can be written
        compiled = numba.cfunc(_SIGNATURE, **_OPTIONS)(body)
    if not compiled.cache_hits:
        _log.info("compiled the CPU kernel %r in %.1f s; this machine keeps it", body.__name__, perf_counter() - begin)
    _kept.append(compiled)  # the code lives as long as this object
    return compiled.address  # type: ignore[no-any-return]


_kept: list[Any] = []


@numba.njit(**_OPTIONS)
def _lists(task, rows, threads):
    """Addresses of a task's lists behind the counts: addresses, values, of the threads' parts values and indices, and the end."""
    address_at = task.scratch + 8 * threads * LINE
    value_at = address_at + 8 * (task.n_in + AHEAD)
    part_at = value_at + 4 * rows * task.n_in
    index_at = part_at + 4 * rows * task.n_in
    return address_at, value_at, part_at, index_at, (index_at + 4 * task.n_in + 63) // 64 * 64


@cache
def _columns_code(storage: Any, rows: int) -> int:
    streams = 12 if rows == 1 else 8  # rows of the weight that are read side by side
    size, pairs = storage.bitwidth // 8, storage == types.uint16

    def columns(given):
        count = carray(given, (1,))[0].count
        tasks, me, threads = carray(given, (count,)), _thread(), _threads()
        for number in range(count):
            task = tasks[number]
            n_in = task.n_in
            start, stop = n_in * me // threads, n_in * (me + 1) // threads
            _, _, part_at, index_at, _ = _lists(task, rows, threads)
            counts = carray(pointer(task.scratch), (threads * LINE,), types.int64)
            x = carray(pointer(task.x), (rows * n_in,), storage)
            tau = carray(pointer(task.tau), (n_in,), types.float32)
            index = carray(pointer(index_at), (n_in,), types.int32)
            part = carray(pointer(part_at), (rows * n_in,), types.float32)
            counts[me * LINE] = _compact(x, tau, rows, n_in, start, stop, index, part)
        _barrier()
        for number in range(count):
            task = tasks[number]
            address_at, value_at, part_at, index_at, _ = _lists(task, rows, threads)
            _gather(
                task,
                part_at,
                index_at,
                carray(pointer(task.scratch), (threads * LINE,), types.int64),
                carray(pointer(address_at), (task.n_in + AHEAD,), types.int64),
                carray(pointer(value_at), (rows * task.n_in,), types.float32),
                task.n_out * size,
            )
        _barrier()
        for number in range(count):
            task = tasks[number]
            n_out, active = task.n_out, _kept_by(carray(pointer(task.scratch), (threads * LINE,), types.int64), threads)
            address_at, value_at, _, _, sums_at = _lists(task, rows, threads)
            stride = n_out // threads // LINE * LINE + 4 * STRIP
            sums_at += 4 * me * rows * stride
            weight = carray(pointer(task.weight), (task.n_in * n_out,), storage)
            bias = carray(pointer(task.bias), (n_out,), storage)
            y = carray(pointer(task.y), (rows * n_out,), storage)
            sums = carray(pointer(sums_at), (rows * stride,), types.float32)
            # The threads share the strips; the last one takes the columns behind them as well.
            first = n_out // STRIP * me // threads
            strips = n_out // STRIP * (me + 1) // threads - first
            rest = n_out % STRIP if me == threads - 1 else 0
            offset, behind = first * STRIP * size, (first + strips) * STRIP * size
            rest_at = sums_at + 4 * strips * STRIP
            sums[:] = 0
            k = 0
            while k + streams <= active:
                at, v = address_at + 8 * k, value_at + 4 * rows * k
                accumulate(weight, streams, rows, LANES, at, offset, v, sums_at, 4 * stride, strips)
                k += streams
            while k < active:
                at, v = address_at + 8 * k, value_at + 4 * rows * k
                accumulate(weight, 1, rows, LANES, at, offset, v, sums_at, 4 * stride, strips)
                k += 1
            if rest:
                for k in range(active):
                    at, v = address_at + 8 * k, value_at + 4 * rows * k
                    accumulate(weight, 1, rows, 1, at, behind, v, rest_at, 4 * stride, rest)
            for r in range(rows):
                left = first * STRIP
                _finish(sums[r * stride :], bias[left:], task.bias != 0, y[r * n_out + left :], pairs, strips, rest)

    return _compile(columns)


@cache
def _dots_code(storage: Any) -> int:
    def dots(given):
        task = carray(given, (1,))[0]
        rows, n_in, n_out = task.rows, task.n_in, task.n_out
        _dots(
            task,
            carray(pointer(task.x), (rows * n_in,), storage),
            carray(pointer(task.weight), (n_in * n_out,), storage),
            carray(pointer(task.bias), (n_out,), storage),
            carray(pointer(task.y), (rows * n_out,), storage),
            carray(pointer(task.scratch), (rows * n_in,), types.float32),
        )

    return _compile(dots)


@cache
def _read_code() -> int:
    def read(given):
        task = carray(given, (1,))[0]
        weight = carray(pointer(task.weight), (task.n_in,), types.int64)
        _read(task, weight, carray(pointer(task.y), (_threads(),), types.int64))

    return _compile(read)


def columns(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """Gated product of a few rows; shapes as in `kernels.op.gated_linear`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    return several_columns(x, (weight_t,), (tau,), (bias,))[0]


def several_columns(
    x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gated products of the same few rows in one parallel region; shapes as in `kernels.op.gated_linears`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_in = x.shape[-1]
    rows = x.shape[:-1].numel()
    threads = _threads_for(n_in * sum([weight_t.shape[1] for weight_t in weights_t]))
    lists = 8 * LINE * threads + 8 * (n_in + AHEAD) + 4 * n_in * (2 * rows + 1) + 64
    ys, tasks, scratch = [], [], 0
    for weight_t, tau, bias in zip(weights_t, taus, biases, strict=True):
        n_out = weight_t.shape[1]
        ys.append(_output(x, weight_t, bias, weight_t.shape[0], n_out))
        if tau.shape != (n_in,) or tau.dtype is not torch.float32:
            raise ValueError(f"tau is {tau.dtype} {list(tau.shape)}; float32 [{n_in}] is needed")
        tasks.append(((x, weight_t, tau, bias), ys[-1], scratch, rows, n_in, n_out))
        scratch += (lists + 4 * rows * (n_out + threads * 4 * STRIP) + 63) // 64 * 64
    if rows:
        _run(_columns_code(STORAGE[x.dtype], rows), threads, _scratch(scratch), tasks)
    return ys


def dots(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Dense product of a few rows; shapes as in `kernels.op.dense_linear`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_out, n_in = weight.shape
    y, rows = _output(x, weight, bias, n_in, n_out), x.shape[:-1].numel()
    task = (x, weight, None, bias), y, 0, rows, n_in, n_out
    _run(_dots_code(STORAGE[x.dtype]), _threads_for(n_in * n_out), _scratch(4 * rows * n_in), [task])
    return y


def read(memory: Tensor) -> None:
    """Read a contiguous tensor once with all threads."""
    threads = torch.get_num_threads()
    sums = torch.empty(threads, dtype=torch.int64, device="cpu")
    _run(_read_code(), threads, 0, [((None, memory, None, None), sums, 0, 0, memory.nbytes // 8, 0)])


def _threads_for(weights: int) -> int:
    return min(torch.get_num_threads(), 1 + weights // GRAIN)


def _output(x: Tensor, weight: Tensor, bias: Tensor | None, n_in: int, n_out: int) -> Tensor:
    """Output memory of a call, its shapes checked: the machine code trusts them."""
    if x.shape[-1] != n_in or x.dtype is not weight.dtype:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; {weight.dtype} with {n_in} last is needed")
    if bias is not None and (bias.shape != (n_out,) or bias.dtype is not weight.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; {weight.dtype} [{n_out}] is needed")
    return x.new_empty((*x.shape[:-1], n_out))


# x, weight, tau and bias of a product; its y, offset in the scratch memory, rows, n_in and n_out
Task = tuple[tuple[Tensor | None, ...], Tensor, int, int, int, int]


def _run(code: int, threads: int, scratch: int, tasks: Sequence[Task]) -> None:
    """Enter a parallel region in which every thread runs the code on all tasks."""
    numbers: list[int] = []
    copies = []  # of what is not contiguous; they live until the call ends
    for tensors, y, offset, *sizes in tasks:
        for tensor in tensors:
            if tensor is not None and not tensor.is_contiguous():
                tensor = tensor.contiguous()
                copies.append(tensor)
            numbers.append(0 if tensor is None else tensor.data_ptr())
        numbers += y.data_ptr(), scratch + offset, *sizes, len(tasks)
    _parallel(code, struct.pack(f"{len(numbers)}q", *numbers), threads, 0)


def _scratch(nbytes: int) -> int:
    """Address of this Python thread's scratch memory."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = _local.buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return buffer.data_ptr()
