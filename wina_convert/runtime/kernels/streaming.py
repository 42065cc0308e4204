"""Products of one to a few rows with a matrix, at the speed at which a CPU reads the matrix.

`columns` is the gated product: it reads only the rows of the transposed weight whose inputs are kept. The active rows, not the
outputs, are divided among the threads: each thread walks whole rows, eight side by side, into an accumulator of its own that
stays in its cache, and the accumulators are added at the end. Every stream goes forward through memory, which is what the
processor's prefetching is made for. `dots` is the dense product with a plain [out, in] weight.

Compiled by numba on first use and cached on disk. The threads are those of torch's own OpenMP runtime: two pools on the same
cores would wait for each other. Nothing is locked, so several Python threads may call at once.
"""

import ctypes
import struct
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

TILE = 1024  # columns of eight weight rows that stay in the first-level cache while several rows of x use them
GRAIN = 1 << 15  # weights below which another thread costs more than it brings
LINE = 16  # float32 in a cache line

# bfloat16 and float16 are told apart by the sign of the integer that holds their bits.
STORAGE = {torch.float32: types.float32, torch.bfloat16: types.uint16, torch.float16: types.int16}

FIELDS = ("x", "weight", "tau", "bias", "y", "scratch", "rows", "n_in", "n_out")  # addresses and sizes
TASK = np.dtype([(name, np.int64) for name in FIELDS])
_pack = struct.Struct(f"{len(FIELDS)}q").pack
_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}
_SUM_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
_local = threading.local()


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


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _widen(typing_context, value):
    """A stored weight or activation as float32."""

    def generate(context, builder, signature, args):
        if value == types.uint16:
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(value), generate


@intrinsic
def _narrow(typing_context, value, like):
    """float32 rounded to nearest even in the storage of `like`."""

    def generate(context, builder, signature, args):
        i16, i32 = ir.IntType(16), ir.IntType(32)
        if like == types.uint16:
            bits = builder.bitcast(args[0], i32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd)
            quiet = builder.or_(bits, ir.Constant(i32, 0x400000))
            is_nan = builder.fcmp_unordered("uno", args[0], args[0])
            return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), ir.Constant(i32, 16)), i16)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), i16)
        return args[0]

    return like(types.float32, like), generate


@numba.njit(**_OPTIONS)
def _compact(x, tau, rows, n_in, start, stop, index, value):
    """List the inputs of [start, stop) that some row keeps, from `index[start]`; their values, 0 where a row drops them."""
    n = start
    for j in range(start, stop):
        kept = False
        for r in range(rows):
            v = _widen(x[r * n_in + j])
            keep = not (abs(v) <= tau[j])  # a NaN is kept
            value[n * rows + r] = v if keep else np.float32(0)
            kept |= keep
        index[n] = j
        n += kept
    return n - start


@numba.njit(**_OPTIONS)
def _accumulate(weight, index, value, rows, n_out, begin, end, sums, stride):
    """sums[r] += value[k, r] * weight[index[k]] over k of [begin, end), in eight streams that are far from each other."""
    tile = n_out if rows == 1 else TILE
    step = max(end - begin, 0) // 8
    for k in range(begin, begin + step):
        for left in range(0, n_out, tile):
            w0, w1 = weight[index[k] * n_out + left :], weight[index[k + step] * n_out + left :]
            w2, w3 = weight[index[k + 2 * step] * n_out + left :], weight[index[k + 3 * step] * n_out + left :]
            w4, w5 = weight[index[k + 4 * step] * n_out + left :], weight[index[k + 5 * step] * n_out + left :]
            w6, w7 = weight[index[k + 6 * step] * n_out + left :], weight[index[k + 7 * step] * n_out + left :]
            for r in range(rows):
                v, next_ = value[k * rows + r :], step * rows
                v0, v1, v2, v3 = v[0], v[next_], v[2 * next_], v[3 * next_]
                v4, v5, v6, v7 = v[4 * next_], v[5 * next_], v[6 * next_], v[7 * next_]
                row = sums[r * stride + left :]
                for o in range(min(tile, n_out - left)):
                    total = row[o] + v0 * _widen(w0[o]) + v1 * _widen(w1[o]) + v2 * _widen(w2[o]) + v3 * _widen(w3[o])
                    row[o] = total + v4 * _widen(w4[o]) + v5 * _widen(w5[o]) + v6 * _widen(w6[o]) + v7 * _widen(w7[o])
    for k in range(begin + 8 * step, end):
        w0 = weight[index[k] * n_out :]
        for r in range(rows):
            v0 = value[k * rows + r]
            row = sums[r * stride :]
            for o in range(n_out):
                row[o] += v0 * _widen(w0[o])


@numba.njit(**_OPTIONS)
def _columns(task, x, weight, tau, bias, y, sums, value, index, counts, stride):
    """y[r] = bias + sum over the inputs with |x[r, j]| > tau[j] of x[r, j] * weight[j]; in each thread of a region."""
    rows, n_in, n_out = task.rows, task.n_in, task.n_out
    me, threads = _thread(), _threads()
    counts[me * LINE] = _compact(x, tau, rows, n_in, n_in * me // threads, n_in * (me + 1) // threads, index, value)
    mine = sums[me * rows * stride : (me + 1) * rows * stride]
    mine[:] = 0
    _barrier()
    # The threads share the active inputs evenly, whichever slice of the inputs they came from.
    active = 0
    for t in range(threads):
        active += counts[t * LINE]
    first, last, before = active * me // threads, active * (me + 1) // threads, 0
    for t in range(threads):
        start, count = n_in * t // threads, counts[t * LINE]
        begin, end = max(first - before, 0), min(last - before, count)
        _accumulate(weight, index, value, rows, n_out, start + begin, start + end, mine, stride)
        before += count
    _barrier()
    left, count = n_out * me // threads, n_out * (me + 1) // threads - n_out * me // threads
    for r in range(rows):
        total, out = sums[r * stride + left :], y[r * n_out + left :]
        for t in range(1, threads):
            part = sums[(t * rows + r) * stride + left :]
            for o in range(count):
                total[o] += part[o]
        if task.bias:
            for o in range(count):
                total[o] += _widen(bias[left + o])
        for o in range(count):
            out[o] = _narrow(total[o], weight[0])


@numba.njit(**_SUM_OPTIONS)
def _dots(task, x, weight, bias, y, value):
    """y[r] = bias + weight @ x[r]; in each thread of a region."""
    rows, n_in, n_out = task.rows, task.n_in, task.n_out
    me, threads = _thread(), _threads()
    for i in range(rows * n_in * me // threads, rows * n_in * (me + 1) // threads):
        value[i] = _widen(x[i])
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
                s0 += v[j] * _widen(w0[j])
                s1 += v[j] * _widen(w1[j])
                s2 += v[j] * _widen(w2[j])
                s3 += v[j] * _widen(w3[j])
            if task.bias:
                s0, s1, s2, s3 = (
                    s0 + _widen(bias[o]),
                    s1 + _widen(bias[o1]),
                    s2 + _widen(bias[o2]),
                    s3 + _widen(bias[o3]),
                )
            y[r * n_out + o3] = _narrow(s3, weight[0])
            y[r * n_out + o2] = _narrow(s2, weight[0])
            y[r * n_out + o1] = _narrow(s1, weight[0])
            y[r * n_out + o] = _narrow(s0, weight[0])


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
    try:
        compiled = numba.cfunc(_SIGNATURE, cache=True, **_OPTIONS)(body)
    except RuntimeError:  # no folder to cache in can be written
        compiled = numba.cfunc(_SIGNATURE, **_OPTIONS)(body)
    _kept.append(compiled)  # the code lives as long as this object
    return compiled.address  # type: ignore[no-any-return]


_kept: list[Any] = []


@cache
def _columns_code(storage: Any) -> int:
    def columns(pointer):
        task = carray(pointer, (1,))[0]
        rows, n_in, n_out, threads = task.rows, task.n_in, task.n_out, _threads()
        stride = (n_out + LINE - 1) // LINE * LINE
        counts = carray(_pointer(task.scratch), (threads * LINE,), types.int64)
        floats = carray(_pointer(task.scratch + 8 * threads * LINE), (rows * (threads * stride + n_in),), types.float32)
        sums, value = floats[: threads * rows * stride], floats[threads * rows * stride :]
        index = carray(_pointer(task.scratch + 8 * threads * LINE + 4 * len(floats)), (n_in,), types.int32)
        _columns(
            task,
            carray(_pointer(task.x), (rows * n_in,), storage),
            carray(_pointer(task.weight), (n_in * n_out,), storage),
            carray(_pointer(task.tau), (n_in,), types.float32),
            carray(_pointer(task.bias), (n_out,), storage),
            carray(_pointer(task.y), (rows * n_out,), storage),
            sums,
            value,
            index,
            counts,
            stride,
        )

    return _compile(columns)


@cache
def _dots_code(storage: Any) -> int:
    def dots(pointer):
        task = carray(pointer, (1,))[0]
        rows, n_in, n_out = task.rows, task.n_in, task.n_out
        _dots(
            task,
            carray(_pointer(task.x), (rows * n_in,), storage),
            carray(_pointer(task.weight), (n_in * n_out,), storage),
            carray(_pointer(task.bias), (n_out,), storage),
            carray(_pointer(task.y), (rows * n_out,), storage),
            carray(_pointer(task.scratch), (rows * n_in,), types.float32),
        )

    return _compile(dots)


@cache
def _read_code() -> int:
    def read(pointer):
        task = carray(pointer, (1,))[0]
        weight = carray(_pointer(task.weight), (task.n_in,), types.int64)
        _read(task, weight, carray(_pointer(task.y), (_threads(),), types.int64))

    return _compile(read)


def columns(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """Gated product of a few rows; shapes as in `kernels.op.gated_linear`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_in, n_out = weight_t.shape
    if tau.shape != (n_in,) or tau.dtype is not torch.float32:
        raise ValueError(f"tau is {tau.dtype} {list(tau.shape)}; float32 [{n_in}] is needed")
    y, rows, threads = _prepare(x, weight_t, bias, n_in, n_out)
    scratch = _scratch(8 * LINE * threads + 4 * (rows * (threads * (n_out + LINE) + n_in) + n_in))
    _run(_columns_code(STORAGE[x.dtype]), threads, x, weight_t, tau, bias, y, scratch, rows, n_in, n_out)
    return y


def dots(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Dense product of a few rows; shapes as in `kernels.op.dense_linear`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_out, n_in = weight.shape
    y, rows, threads = _prepare(x, weight, bias, n_in, n_out)
    scratch = _scratch(4 * rows * n_in)
    _run(_dots_code(STORAGE[x.dtype]), threads, x, weight, None, bias, y, scratch, rows, n_in, n_out)
    return y


def read(memory: Tensor) -> None:
    """Read a contiguous tensor once with all threads."""
    threads = torch.get_num_threads()
    sums = torch.empty(threads, dtype=torch.int64, device="cpu")
    _run(_read_code(), threads, None, memory, None, None, sums, 0, 0, memory.nbytes // 8, 0)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, n_in: int, n_out: int) -> tuple[Tensor, int, int]:
    """Output memory, rows and threads of a call, its shapes checked: the machine code trusts them."""
    if x.shape[-1] != n_in or x.dtype is not weight.dtype:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; {weight.dtype} with {n_in} last is needed")
    if bias is not None and (bias.shape != (n_out,) or bias.dtype is not weight.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; {weight.dtype} [{n_out}] is needed")
    threads = min(torch.get_num_threads(), 1 + n_in * n_out // GRAIN)
    return x.new_empty((*x.shape[:-1], n_out)), x.shape[:-1].numel(), threads


def _run(
    code: int,
    threads: int,
    x: Tensor | None,
    weight: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    scratch: int,
    rows: int,
    n_in: int,
    n_out: int,
) -> None:
    # The copies of what is not contiguous live until the call ends.
    tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in (x, weight, tau, bias)]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    _parallel(code, _pack(*addresses, y.data_ptr(), scratch, rows, n_in, n_out), threads, 0)


def _scratch(nbytes: int) -> int:
    """Address of this Python thread's scratch memory."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = _local.buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return buffer.data_ptr()
