"""Products of one to a few rows with a matrix, at the speed at which a CPU reads the matrix.

`columns` is the gated product: it reads only the rows of the transposed weight whose inputs are kept. Each thread has some of the
outputs. It walks the kept rows, a few side by side, and adds them to sums of its own that stay in its cache; while it reads
some, the next ones are fetched. All rows of x take part at once: a weight is read and widened once, and the sums of a few
outputs are in registers meanwhile. A sum is made in the order of the inputs: neither the rows beside it nor the number of
threads changes a bit of it. `dots` is the dense product with a plain [out, in] weight.

`bodies` holds what runs in each thread; `machine` has it compiled on first use and kept on the disk. The threads are those of
torch's own OpenMP runtime: two pools on the same cores would wait for each other. Nothing is locked, so several Python threads
may call at once.
"""

import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .machine import address
from .openmp import openmp
from .task import AHEAD, LINE, WIDEST

GRAIN = 1 << 15  # weights below which a second thread costs more than it brings
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_parallel = openmp()["GOMP_parallel"]
_local = threading.local()


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
        scratch += (lists + 4 * rows * (n_out + threads * 4 * WIDEST) + 63) // 64 * 64
    if rows:
        _run(address("columns", NAMES[x.dtype], rows), threads, _scratch(scratch), tasks)
    return ys


def dots(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Dense product of a few rows; shapes as in `kernels.op.dense_linear`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_out, n_in = weight.shape
    y, rows = _output(x, weight, bias, n_in, n_out), x.shape[:-1].numel()
    task = (x, weight, None, bias), y, 0, rows, n_in, n_out
    if rows:
        threads = _threads_for(n_in * n_out)
        scratch = _scratch(4 * rows * n_in + 64 + 16 * LINE * threads)
        _run(address("dots", NAMES[x.dtype], rows), threads, scratch, [task])
    return y


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one token a sequence that looks at all keys, in float32; shapes as in `kernels.op.attend`.

    Each thread has some of the heads of keys and goes through their keys once, and through their values once.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    batch, kv_heads, keys, size = key.shape
    fits = (len(query), query.shape[2]) == (batch, 1) and query.shape[3] == size and query.shape[1] % kv_heads == 0
    if not fits or value.shape[:3] != key.shape[:3] or not query.dtype is key.dtype is value.dtype:
        got = ", ".join([f"{tensor.dtype} {list(tensor.shape)}" for tensor in (query, key, value)])
        raise ValueError(
            f"query, key and value are {got}; one token a sequence and keys of its size are needed, of one dtype"
        )
    query, (key, key_stride), (value, value_stride) = query.contiguous(), _by_head(key), _by_head(value)
    group, width, heads = query.shape[1] // kv_heads, value.shape[3], batch * kv_heads
    y = query.new_empty(batch, 1, query.shape[1], width)
    if y.numel() and keys:
        threads = _threads_for(heads * keys * (size + width)) if heads > 1 else 1
        room = (16 * LINE + 4 * group * (width + WIDEST + size + keys + AHEAD) + 63) // 64 * 64
        places = query.data_ptr(), key.data_ptr(), value.data_ptr(), y.data_ptr(), _scratch(threads * room)
        given = struct.pack("12qd", *places, room, heads, keys, size, width, key_stride, value_stride, scaling)
        _parallel(address("attend", NAMES[query.dtype], group), given, threads, 0)
    return y


def _by_head(kept: Tensor) -> tuple[Tensor, int]:
    """Keys or values [batch, kv_heads, keys, size], each head's contiguous and all equally far apart; and how far, in bytes."""
    batch, heads, keys, size = kept.shape
    of_batch, of_head, *inside = kept.stride()
    if inside == [size, 1] and (batch == 1 or heads == 1 or of_batch == heads * of_head):
        return kept, kept.itemsize * (of_head if heads > 1 else of_batch)
    return kept.contiguous(), kept.itemsize * keys * size  # strides of a dimension of one say nothing


def read(memory: Tensor) -> None:
    """Read a contiguous tensor once with all threads."""
    threads = torch.get_num_threads()
    sums = torch.empty(threads, dtype=torch.int64, device="cpu")
    _run(address("read", "float32"), threads, 0, [((None, memory, None, None), sums, 0, 0, memory.nbytes // 8, 0)])


def _threads_for(weights: int) -> int:
    """All threads or one: where a region has fewer than the one before, the runtime ends the others and starts them anew."""
    threads = torch.get_num_threads()
    return threads if 2 * weights >= GRAIN * threads else 1


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
