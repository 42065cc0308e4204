"""What each thread does in a parallel region of the CPU kernels, as numba compiles it. `streaming` says how they work.

Only what compiles imports this: numba takes a hundred megabytes.
"""

import platform
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import carray, types

from .openmp import CALLED, openmp
from .task import AHEAD, ATTENTION, FIELDS, LINE
from .vectors import FEATURES, LANES, STRIP, SUMS, accumulate, add_dots, narrow, pointer, power_of_two, widen

# bfloat16 and float16 are told apart by the sign of the integer that holds their bits.
STORAGE = {"float32": types.float32, "bfloat16": types.uint16, "float16": types.int16}
TASK = np.dtype([(name, np.int64) for name in FIELDS])
HEADS = np.dtype([*[(name, np.int64) for name in ATTENTION], ("scaling", np.float64)])
_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}
_SUM_OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

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


@numba.njit(**_OPTIONS)
def _arrange(x, value, begin, end, n_in, pairs):
    """value = x [rows, n_in] in float32, from `begin` to `end`; `pairs`: in a strip the even inputs come before the odd ones."""
    for i in range(begin, end):
        j = i % n_in
        place = j % STRIP
        if pairs and j - place + STRIP <= n_in:
            value[i - place + place // 2 + place % 2 * LANES] = widen(x[i])
        else:
            value[i] = widen(x[i])


@numba.njit(**_SUM_OPTIONS)
def _sum(task, weight, y):
    """y[thread] = a sum over the thread's part of `weight`, read in four streams: how fast memory can be read at all."""
    me, threads = _thread(), _threads()
    quarter = task.n_in // (4 * threads)
    w0, w1 = weight[4 * me * quarter :], weight[(4 * me + 1) * quarter :]
    w2, w3 = weight[(4 * me + 2) * quarter :], weight[(4 * me + 3) * quarter :]
    total = 0
    for i in range(quarter):
        total += (w0[i] + w1[i]) + (w2[i] + w3[i])
    y[me] = total


@numba.njit(**_OPTIONS)
def _lists(task, rows, threads):
    """Addresses of a task's lists behind the counts: addresses, values, of the threads' parts values and indices, and the end."""
    address_at = task.scratch + 8 * threads * LINE
    value_at = address_at + 8 * (task.n_in + AHEAD)
    part_at = value_at + 4 * rows * task.n_in
    index_at = part_at + 4 * rows * task.n_in
    return address_at, value_at, part_at, index_at, (index_at + 4 * task.n_in + 63) // 64 * 64


def _columns(storage: Any, rows: int) -> Any:
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

    return columns


def _dots(storage: Any, rows: int) -> Any:
    streams = 4 if rows == 1 else max(1, min(6, SUMS // rows))  # rows of the weight that are read side by side
    size, pairs = storage.bitwidth // 8, storage == types.uint16

    def dots(given):
        task, me, threads = carray(given, (1,))[0], _thread(), _threads()
        n_in, n_out = task.n_in, task.n_out
        weight = carray(pointer(task.weight), (n_in * n_out,), storage)
        bias = carray(pointer(task.bias), (n_out,), storage)
        y = carray(pointer(task.y), (rows * n_out,), storage)
        value = carray(pointer(task.scratch), (rows * n_in,), types.float32)
        x = carray(pointer(task.x), (rows * n_in,), storage)
        _arrange(x, value, rows * n_in * me // threads, rows * n_in * (me + 1) // threads, n_in, pairs)
        _barrier()
        address_at = task.scratch + (4 * rows * n_in + 63) // 64 * 64 + 16 * LINE * me
        sums_at = address_at + 8 * LINE
        address = carray(pointer(address_at), (streams,), types.int64)
        sums = carray(pointer(sums_at), (streams * rows,), types.float32)
        strips, rest = n_in // STRIP, n_in % STRIP
        start, stop = n_out * me // threads, n_out * (me + 1) // threads
        part = (stop - start + streams - 1) // streams
        for o in range(start, start + part):
            # Each stream has a part of its own; the last may be shorter: then some outputs are computed more than once.
            for k in range(streams):
                address[k] = task.weight + min(o + k * part, stop - 1) * n_in * size
            sums[:] = 0
            add_dots(weight, streams, rows, LANES, address_at, task.scratch, 4 * n_in, strips, sums_at)
            if rest:
                for k in range(streams):
                    address[k] += strips * STRIP * size
                rest_at = task.scratch + 4 * strips * STRIP
                add_dots(weight, streams, rows, 1, address_at, rest_at, 4 * n_in, rest, sums_at)
            for k in range(streams):
                column = min(o + k * part, stop - 1)
                for r in range(rows):
                    total = sums[k * rows + r]
                    y[r * n_out + column] = narrow(total + widen(bias[column]) if task.bias else total, y[0])

    return dots


@numba.njit(**_OPTIONS)
def _exp(x):
    """e to the power of x, at most 0, in float32: 2^n e^r with the Taylor series of e^r; libm's would take a call a number."""
    x = np.float32(-87) if x < np.float32(-87) else x  # a NaN stays one
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # ln 2 in two parts
    series = np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = series * r + np.float32(1)
    return (series * r + np.float32(1)) * power_of_two(np.int32(n))


def _attend(storage: Any, rows: int) -> Any:
    streams = 4 if rows == 1 else max(1, min(6, SUMS // rows))  # keys whose scores are made side by side
    together = 8  # values that are added side by side
    size, pairs = storage.bitwidth // 8, storage == types.uint16

    def attend(given):
        task, me, threads = carray(given, (1,))[0], _thread(), _threads()
        n, width, keys = task.size, task.width, task.keys
        stride = width + STRIP  # of sums
        address_at = task.scratch + me * task.room
        sums_at = address_at + 16 * LINE
        query_at = sums_at + 4 * rows * stride
        scores_at = query_at + 4 * rows * n
        totals_at = scores_at + 4 * rows * (keys + streams)
        address = carray(pointer(address_at), (2 * together,), types.int64)
        sums = carray(pointer(sums_at), (rows * stride,), types.float32)
        query = carray(pointer(query_at), (rows * n,), types.float32)
        scores = carray(pointer(scores_at), (rows * (keys + streams),), types.float32)
        totals = carray(pointer(totals_at), (rows,), types.float32)
        strips, rest, out_strips, out_rest = n // STRIP, n % STRIP, width // STRIP, width % STRIP
        for head in range(task.heads * me // threads, task.heads * (me + 1) // threads):
            x = carray(pointer(task.query + head * rows * n * size), (rows * n,), storage)
            y = carray(pointer(task.y + head * rows * width * size), (rows * width,), storage)
            _arrange(x, query, 0, rows * n, n, pairs)
            for i in range(rows * n):
                query[i] *= np.float32(task.scaling)
            scores[:] = 0
            at = task.key + head * task.key_stride
            for k in range(0, keys, streams):
                for s in range(streams):  # behind the last key it comes again, for scores that nobody reads
                    address[s] = at + min(k + s, keys - 1) * n * size
                add_dots(x, streams, rows, LANES, address_at, query_at, 4 * n, strips, scores_at + 4 * k * rows)
                if rest:
                    for s in range(streams):
                        address[s] += strips * STRIP * size
                    rest_at = query_at + 4 * strips * STRIP
                    add_dots(x, streams, rows, 1, address_at, rest_at, 4 * n, rest, scores_at + 4 * k * rows)
            for r in range(rows):
                totals[r] = scores[r]
            for k in range(keys):
                for r in range(rows):
                    totals[r] = max(totals[r], scores[k * rows + r])
            for k in range(keys):
                for r in range(rows):
                    scores[k * rows + r] -= totals[r]
            for i in range(rows * keys):
                scores[i] = _exp(scores[i])
            totals[:] = 0
            for k in range(keys):
                for r in range(rows):
                    totals[r] += scores[k * rows + r]
            sums[:] = 0
            at, k = task.value + head * task.value_stride, 0
            while k < keys:
                left = keys - k
                for s in range(2 * together):
                    address[s] = at + min(k + s, keys - 1) * width * size
                weights_at = scores_at + 4 * k * rows
                behind, sums_behind = out_strips * STRIP * size, sums_at + 4 * out_strips * STRIP
                if left >= together:
                    accumulate(x, together, rows, LANES, address_at, 0, weights_at, sums_at, 4 * stride, out_strips)
                    accumulate(x, together, rows, 1, address_at, behind, weights_at, sums_behind, 4 * stride, out_rest)
                    k += together
                else:
                    accumulate(x, 1, rows, LANES, address_at, 0, weights_at, sums_at, 4 * stride, out_strips)
                    accumulate(x, 1, rows, 1, address_at, behind, weights_at, sums_behind, 4 * stride, out_rest)
                    k += 1
            for r in range(rows):
                for i in range(r * stride, r * stride + width):
                    sums[i] /= totals[r]
                _finish(sums[r * stride :], x, False, y[r * width :], pairs, out_strips, out_rest)

    return attend


def _read(storage: Any, rows: int) -> Any:
    def read(given):
        task = carray(given, (1,))[0]
        weight = carray(pointer(task.weight), (task.n_in,), types.int64)
        _sum(task, weight, carray(pointer(task.y), (_threads(),), types.int64))

    return read


KERNELS = {"columns": _columns, "dots": _dots, "attend": _attend, "read": _read}


def compiled(kernel: str, dtype: str, rows: int, keep: bool) -> Any:
    """numba's object of a kernel: with its `address`, for as long as it lives.

    Args:
        kernel: of `KERNELS`.
        dtype: of `STORAGE`.
        rows: of x, a constant of the code; 0 where the kernel takes any number.
        keep: let numba keep the code on the disk and read it from there.

    Raises:
        RuntimeError: the processor cannot convert float16.
    """
    if dtype == "float16" and platform.machine().lower() in ("x86_64", "amd64") and "f16c" not in FEATURES:
        raise RuntimeError("the processor has no instructions that convert float16 (F16C)")
    for name in CALLED:
        llvmlite.binding.add_symbol(f"wina_{name}", openmp()[name])
    body = KERNELS[kernel](STORAGE[dtype], rows)
    signature = types.void(types.CPointer(numba.from_dtype(HEADS if kernel == "attend" else TASK)))
    if keep:
        try:
            return numba.cfunc(signature, cache=True, **_OPTIONS)(body)
        except RuntimeError:  # no folder to cache in can be written
            pass
    return numba.cfunc(signature, **_OPTIONS)(body)
