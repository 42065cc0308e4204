"""Pieces of the compiled CPU kernels that are written in LLVM's own terms: stored numbers, vectors, sums in registers.

numba calls them as functions. What is unrolled here is known when a kernel is compiled: how many rows of x, how many rows of
the weight at once, how many numbers in a vector.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic


def _features() -> frozenset[str]:
    """What the processor that numba compiles for can do: this one, unless variables of numba's name another."""
    if config.CPU_FEATURES is not None:
        return frozenset(config.CPU_FEATURES.replace("+", "").split(","))
    return frozenset(name for name, there in llvmlite.binding.get_host_cpu_features().items() if there)


FEATURES = _features()
LANES = 16 if "avx512f" in FEATURES else 8 if "avx" in FEATURES else 4  # numbers of float32 in a vector register
STRIP = 2 * LANES  # columns whose sums are in registers at a time: two vectors for each row of x
ROWS = 4  # of x whose sums fit into the registers; more take turns on weights that are in the first-level cache
SUMS = 24 if LANES == 16 else 12  # of `add_dots` that fit into the registers
HELD = 10 if LANES == 16 else 0  # factors that are kept in the registers that sums and weights leave
TURN = 16  # strips after which they take turns

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


@intrinsic
def pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], _I8.as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def widen(typing_context, value):
    """A stored weight or activation as float32."""

    def generate(context, builder, signature, args):
        if value == types.uint16:
            bits = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
            return builder.bitcast(bits, _F32)
        if value == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        return args[0]

    return types.float32(value), generate


@intrinsic
def narrow(typing_context, value, like):
    """float32 rounded to nearest even in the storage of `like`."""

    def generate(context, builder, signature, args):
        if like == types.uint16:
            bits = builder.bitcast(args[0], _I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
            quiet = builder.or_(bits, ir.Constant(_I32, 0x400000))
            is_nan = builder.fcmp_unordered("uno", args[0], args[0])
            return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), ir.Constant(_I32, 16)), _I16)
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        return args[0]

    return like(types.float32, like), generate


@intrinsic
def power_of_two(typing_context, exponent):
    """2 to the power of an int32 within [-126, 127], as float32."""

    def generate(context, builder, signature, args):
        biased = builder.add(args[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), generate


@intrinsic(prefer_literal=True)
def accumulate(typing_context, weight, streams, rows, lanes, address, offset, value, sums, stride, strips):
    """sums[r] += value[k, r] * row k of the weight, for a few rows of the weight side by side and all rows of x.

    Each sum is made in the order of k, with one rounding a term where the processor can: how many rows of x or of the weight
    take part changes no bit of it. While this group is read the next one is fetched, whose addresses follow.

    Args:
        weight: an array of the stored type.
        streams: rows of the weight, literal.
        rows: of x, literal.
        lanes: LANES, or 1 for the columns behind the last strip; literal.
        address: of the addresses of the rows of the weight, 2 * streams int64.
        offset: bytes from there to the first column.
        value: address of value [streams, rows], float32.
        sums: address of the first sum, float32. In a strip of bfloat16 the even columns come first, then the odd ones.
        stride: bytes from one row of sums to the next.
        strips: how many; columns where lanes is 1.
    """
    streams_, rows_, lanes_ = streams.literal_value, rows.literal_value, lanes.literal_value

    def generate(context, builder, signature, args):
        address, offset, value, sums, stride, strips = args[4:]
        _accumulate(builder, weight.dtype, streams_, rows_, lanes_, address, offset, value, sums, stride, strips)
        return context.get_dummy_value()

    return types.void(weight, streams, rows, lanes, *[types.int64] * 6), generate


def _accumulate(builder, storage, streams, rows, lanes, address, offset, value, sums, stride, strips):
    row = [builder.add(_load(builder, _plus(builder, address, 8 * k), _I64, 8), offset) for k in range(2 * streams)]
    total = [builder.add(sums, builder.mul(stride, ir.Constant(_I64, r))) for r in range(rows)]
    width = (4 if storage == types.float32 else 2) * (1 if lanes == 1 else 2 * lanes)  # bytes of a strip
    number, fused = _vector(lanes), _fused(builder, lanes)
    turn = ir.Constant(_I64, TURN)
    with cgutils.for_range_slice(builder, ir.Constant(_I64, 0), strips, turn, intp=_I64) as (begin, _):
        left = builder.sub(strips, begin)
        count = builder.select(builder.icmp_signed("<", left, turn), left, turn)
        for first in range(0, rows, ROWS):
            members = range(first, min(first + ROWS, rows))
            terms = [(k, r) for k in range(streams) for r in members][: HELD if lanes > 1 else 0]
            held = {one: _factor(builder, value, rows, *one, lanes) for one in terms}
            with cgutils.for_range(builder, count, intp=_I64) as loop:
                strip = builder.add(begin, loop.index)
                column = builder.mul(strip, ir.Constant(_I64, width))
                place = builder.mul(strip, ir.Constant(_I64, 4 if lanes == 1 else 8 * lanes))
                places = {r: _halves(builder, builder.add(total[r], place), lanes) for r in members}
                made = {r: [_load(builder, one, number, 4) for one in places[r]] for r in members}
                for k in range(streams):
                    if first == 0 and lanes > 1:
                        _fetch(builder, builder.add(row[streams + k], column), width)
                    numbers = _widened(builder, storage, builder.add(row[k], column), lanes)
                    for r in members:
                        factor = held.get((k, r)) or _factor(builder, value, rows, k, r, lanes)
                        made[r] = [builder.call(fused, [factor, w, s]) for w, s in zip(numbers, made[r], strict=True)]
                for r in members:
                    for one, sum_ in zip(places[r], made[r], strict=True):
                        builder.store(sum_, builder.inttoptr(one, number.as_pointer())).align = 4


@intrinsic(prefer_literal=True)
def add_dots(typing_context, weight, streams, rows, lanes, address, value, stride, strips, sums):
    """sums[k, r] += row k of the weight @ value[r], for a few rows of the weight side by side and all rows of x.

    Every sum is made in vectors of its own, whose numbers are added up in pairs at the end: how many rows of x or of the weight
    take part changes no bit of it.

    Args:
        weight: an array of the stored type.
        streams: rows of the weight, literal.
        rows: of x, literal.
        lanes: LANES, or 1 for the inputs behind the last strip; literal.
        address: of the addresses at which the rows of the weight begin, int64 [streams].
        value: address of value [rows, ...], float32. In a strip of bfloat16 the even inputs come first, then the odd ones.
        stride: bytes from one row of value to the next.
        strips: how many; inputs where lanes is 1.
        sums: address of the sums [streams, rows], float32.
    """
    streams_, rows_, lanes_ = streams.literal_value, rows.literal_value, lanes.literal_value

    def generate(context, builder, signature, args):
        _add_dots(builder, weight.dtype, streams_, rows_, lanes_, *args[4:])
        return context.get_dummy_value()

    return types.void(weight, streams, rows, lanes, *[types.int64] * 5), generate


def _add_dots(builder, storage, streams, rows, lanes, address, value, stride, strips, sums):
    number, fused = _vector(lanes), _fused(builder, lanes)
    width = (4 if storage == types.float32 else 2) * (1 if lanes == 1 else 2 * lanes)  # bytes of a strip
    row = [_load(builder, _plus(builder, address, 8 * k), _I64, 8) for k in range(streams)]
    values = [builder.add(value, builder.mul(stride, ir.Constant(_I64, r))) for r in range(rows)]
    places = [_plus(builder, sums, 4 * i) for i in range(streams * rows)]
    if lanes == 1:
        start = [_load(builder, place, _F32, 4) for place in places]
    else:
        start = [ir.Constant(number, [0.0] * lanes)] * len(places)
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", strips, ir.Constant(_I64, 0)), loop, after)
    builder.position_at_end(loop)
    strip = builder.phi(_I64)
    made = [builder.phi(number) for _ in places]
    column = builder.mul(strip, ir.Constant(_I64, width))
    behind = builder.mul(strip, ir.Constant(_I64, 4 if lanes == 1 else 8 * lanes))
    weights = [_widened(builder, storage, builder.add(row[k], column), lanes) for k in range(streams)]
    ends = list(made)
    for r in range(rows):
        parts = [_load(builder, one, number, 4) for one in _halves(builder, builder.add(values[r], behind), lanes)]
        for k in range(streams):
            for part, w in zip(parts, weights[k], strict=True):
                ends[k * rows + r] = builder.call(fused, [part, w, ends[k * rows + r]])
    following = _plus(builder, strip, 1)
    for phi, first, last in zip([strip, *made], [ir.Constant(_I64, 0), *start], [following, *ends], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, loop)
    builder.cbranch(builder.icmp_signed("<", following, strips), loop, after)
    builder.position_at_end(after)
    totals = [builder.phi(number) for _ in places]
    for phi, first, last in zip(totals, start, ends, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, loop)
    for place, total in zip(places, totals, strict=True):
        if lanes > 1:
            total = builder.fadd(_load(builder, place, _F32, 4), _total(builder, total, lanes))
        builder.store(total, builder.inttoptr(place, _F32.as_pointer())).align = 4


def _total(builder, vector, lanes):
    """The sum of a vector's numbers: the upper half is added to the lower one until a single one is left."""
    while lanes > 1:
        lanes //= 2
        lower, upper = (
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes)))
            )
            for first in (0, lanes)
        )
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _fused(builder, lanes):
    """The function a * b + c of vectors, with one rounding where the processor can."""
    number = _vector(lanes)
    name = f"llvm.fmuladd.{'f32' if lanes == 1 else f'v{lanes}f32'}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number] * 3), name)


def _vector(lanes: int) -> Any:
    return _F32 if lanes == 1 else ir.VectorType(_F32, lanes)


def _plus(builder, address, nbytes):
    return builder.add(address, ir.Constant(_I64, nbytes)) if nbytes else address


def _load(builder, address, of, align):
    loaded = builder.load(builder.inttoptr(address, of.as_pointer()))
    loaded.align = align
    return loaded


def _halves(builder, address, lanes):
    """Addresses of the one or two vectors of a strip of sums."""
    return [address] if lanes == 1 else [address, _plus(builder, address, 4 * lanes)]


def _fetch(builder, address, nbytes):
    """Ask for these bytes to be brought to the second-level cache; any address will do."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(0, nbytes, 64):
        place = builder.inttoptr(_plus(builder, address, line), _I8.as_pointer())
        builder.call(fetch, [place, *[ir.Constant(_I32, flag) for flag in (0, 2, 1)]])


def _factor(builder, value, rows, k, r, lanes):
    """value[k, r] in every place of a vector."""
    loaded = _load(builder, _plus(builder, value, 4 * (k * rows + r)), _F32, 4)
    if lanes == 1:
        return loaded
    nothing, first = ir.Constant(_vector(lanes), ir.Undefined), ir.Constant(_I32, 0)
    one = builder.insert_element(nothing, loaded, first)
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _widened(builder, storage, address, lanes):
    """The one or two vectors of float32 of a strip of weights."""
    if storage == types.uint16:
        if lanes == 1:
            bits = builder.zext(_load(builder, address, _I16, 2), _I32)
            return [builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)]
        pairs, number = ir.VectorType(_I32, lanes), _vector(lanes)
        both = _load(builder, address, pairs, 2)
        even = builder.shl(both, ir.Constant(pairs, [16] * lanes))
        odd = builder.and_(both, ir.Constant(pairs, [0xFFFF0000] * lanes))
        return [builder.bitcast(even, number), builder.bitcast(odd, number)]
    stored = ir.HalfType() if storage == types.int16 else _F32
    size = 2 if storage == types.int16 else 4
    kind = stored if lanes == 1 else ir.VectorType(stored, lanes)
    addresses = [address] if lanes == 1 else [address, _plus(builder, address, size * lanes)]
    loaded = [_load(builder, one, kind, size) for one in addresses]
    return [builder.fpext(one, _vector(lanes)) for one in loaded] if size == 2 else loaded
