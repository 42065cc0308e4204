"""Products on an NVIDIA GPU: one and two rows read only the weights of the inputs they keep, more go through one dense product.

The kernel is gated.cu, compiled at first use. Where that fails, torch operations compute the same, more slowly, and a warning
says so once. A product can be captured into a CUDA graph, also as the first one of a process.
"""

import struct
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import driver, nvrtc, reference
from .driver import DriverError
from .nvrtc import NvrtcError

ROWS = 2  # of a call; from three on the union of their kept inputs is so large that a dense product is as fast
MATRICES = 3  # of a launch
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
OLDEST = 80  # compute capability: bfloat16, and loads that pass the caches by
EARLY = 90  # compute capability from which a kernel may start before the one before it has ended

# As in gated.cu.
WARPS = 16
LANES = (32, 16, 8, 4)
CHUNK = 8
STATIC = 128  # bytes of shared memory beside what a launch asks for, at most

COUNTERS = 1024  # tiles of a launch whose inputs are split
SLOTS = 64  # allocated together

# Arguments of gated.cu, in two parts.
_pack_constant = struct.Struct("QQQii" * MATRICES + "iiii").pack
_pack_call = struct.Struct("QQQ" + "Q" * MATRICES).pack
_NO_MATRIX = (0,) * 5
PREPARED = 1 << 14  # products that are remembered for a GPU


@dataclass(frozen=True)
class Plan:
    """How a product is divided among the blocks of a launch.

    Attributes:
        lanes: threads that read one row of a tile, 16 bytes each: they set its width.
        splits: blocks that share the inputs of a tile.
        first: number of the first tile of each matrix.
        tiles: of all matrices.
        shared: bytes of dynamic shared memory of a block.
        partial: float32 values that the splits leave in memory.
    """

    lanes: int
    splits: int
    first: tuple[int, ...]
    tiles: int
    shared: int
    partial: int


@lru_cache(maxsize=1024)
def plan(n_in: int, outs: tuple[int, ...], itemsize: int, rows: int, multiprocessors: int, shared: int) -> Plan | None:
    """Divide a product by a rule; nothing is tried out, so that a result does not depend on what else runs.

    Below 8192 inputs a block lists all of them: no sums across blocks, and tiles as wide as still give about half of the
    multiprocessors one. More inputs are shared in a power of two, at most two blocks a multiprocessor. The numbers were fitted
    on an H100 to 16 shapes of models from one to seventy billion parameters and lose a few percent of the best choice there.

    Args:
        n_in: inputs.
        outs: outputs of each matrix.
        itemsize: bytes of a weight, 2 or 4.
        rows: of x, 1 or 2.
        multiprocessors: of the GPU.
        shared: bytes of shared memory a block may have.

    Returns:
        the plan, or None for a product that is too large for the counters.
    """
    lanes, splits = _shape(n_in, outs, itemsize, multiprocessors)
    chunks = -(-n_in // CHUNK)

    def needed(splits: int) -> int:
        listed = -(-chunks // splits) * CHUNK
        return 4 * WARPS * lanes * 16 // itemsize + 4 * listed * (1 + rows)

    while splits > chunks:  # a block without inputs
        splits //= 2
    while needed(splits) > shared and splits < chunks:
        splits *= 2
    width = lanes * 16 // itemsize
    counts = [-(-out // width) for out in outs]
    first = tuple(sum(counts[:i]) for i in range(len(outs)))
    if needed(splits) > shared or (splits > 1 and sum(counts) > COUNTERS):
        return None
    partial = rows * splits * sum(counts) * width if splits > 1 else 0
    return Plan(lanes, splits, first, sum(counts), needed(splits), partial)


def _shape(n_in: int, outs: tuple[int, ...], itemsize: int, multiprocessors: int) -> tuple[int, int]:
    """Lanes and splits."""

    def tiles(lanes: int) -> int:
        return sum(-(-out * itemsize // (lanes * 16)) for out in outs)

    if n_in < 8192:
        for lanes in LANES:
            if tiles(lanes) >= (0.5 if lanes > LANES[-1] else 0.45) * multiprocessors:
                return lanes, 1
    for lanes in LANES:
        splits = 1
        while splits < 16 and 2 * splits * tiles(lanes) <= 2 * multiprocessors:
            splits *= 2
        if splits * tiles(lanes) >= 0.8 * multiprocessors:
            break
    return lanes, splits


class Card:
    """The compiled kernels, the counters and the measures of one GPU."""

    def __init__(self, index: int) -> None:
        """Look at the GPU.

        Args:
            index: of the device in torch.

        Raises:
            DriverError, NvrtcError: the kernel does not do on it.
        """
        if torch.version.cuda is None:
            raise DriverError("this torch is built without CUDA")
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.arch = 10 * properties.major + properties.minor
        if self.arch < OLDEST:
            found = f"{properties.name} has compute capability {self.arch / 10:.1f}"
            raise DriverError(f"{found}; the kernels need {OLDEST / 10:.1f}")
        self.multiprocessors = properties.multi_processor_count
        self.shared = driver.shared_memory(index) - STATIC
        self.prepared: dict[object, Prepared] = {}
        self._kernels: dict[tuple[int, int, int, bool], int] = {}
        self._slots: dict[tuple[int, int], int] = {}
        self._free: list[int] = []
        self._lock = threading.Lock()

    def kernel(self, dtype: torch.dtype, rows: int, lanes: int, aligned: bool) -> int:
        """Handle of a variant of the kernel; the first call compiles it or reads it from the disk."""
        key = (TYPES[dtype], rows, lanes, aligned)
        if (found := self._kernels.get(key)) is not None:
            return found
        with self._lock:
            if key not in self._kernels:
                source = Path(__file__).with_name("gated.cu").read_text(encoding="utf-8")
                code = nvrtc.compiled(source, self.arch, macros(*key))
                self._kernels[key] = driver.load(code, "gated", self.shared)
            return self._kernels[key]

    def counters(self, stream: int) -> int:
        """Address of the counters for launches in this stream.

        Launches that can run at the same time must not share them: each stream has its own, and so has each captured graph,
        which may be replayed in any stream.
        """
        key = (stream, driver.capture_of(stream) if torch.cuda.is_current_stream_capturing() else 0)
        if (found := self._slots.get(key)) is not None:
            return found
        with self._lock:
            if key not in self._slots:
                if not self._free:
                    slab = driver.zeros(4 * COUNTERS * SLOTS)
                    self._free = [slab + 4 * COUNTERS * slot for slot in range(SLOTS)]
                self._slots[key] = self._free.pop()
            return self._slots[key]


def macros(dtype: int, rows: int, lanes: int, aligned: bool) -> dict[str, int]:
    """The definitions that select a variant of gated.cu."""
    return {"TYPE": dtype, "ROWS": rows, "LANES": lanes, "ALIGNED": int(aligned)}


def gated_linear(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x over the inputs with |x_j| > tau_j, accumulated in float32; shapes as in `kernels.op.gated_linear`."""
    ys = products(x, [weight_t], [tau], [bias])
    return reference.gated_linear(x, weight_t, tau, bias) if ys is None else ys[0]


def gated_linears(
    x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Products of one x with several matrices; shapes as in `kernels.op.gated_linears`."""
    ys = products(x, weights_t, taus, biases) if len(weights_t) <= MATRICES else None
    if ys is None:
        return [gated_linear(x, *others) for others in zip(weights_t, taus, biases, strict=True)]
    return ys


def products(
    x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor] | None:
    """Gated products of one x with up to three matrices, in one launch.

    Args:
        x: [..., in], one or two rows; float32, bfloat16 or float16.
        weights_t: [in, out] each, dtype of x.
        taus: [in] each, float32, read when the kernel runs.
        biases: [out] each, dtype of x, or None.

    Returns:
        [..., out] each, dtype of x; None where the kernel does not do.
    """
    if x.numel() > ROWS * x.shape[-1] or (card := _card(x.get_device())) is None:
        return None
    if not x.is_contiguous():
        x = x.contiguous()
    x_at = x.data_ptr()
    # Everything that decides how a product is launched; what follows from it is remembered, for a token has many products and
    # the processor little time for each.
    key = (
        (x.dtype, x.shape, x_at % 16),
        tuple([(w.data_ptr(), w.dtype, w.shape, w.stride(), w.get_device()) for w in weights_t]),
        tuple([(t.data_ptr(), t.dtype, t.shape, t.stride(), t.get_device()) for t in taus]),
        tuple([b if b is None else (b.data_ptr(), b.dtype, b.shape, b.stride(), b.get_device()) for b in biases]),
    )
    if (launch := card.prepared.get(key)) is None:
        launch = _prepare(card, x, weights_t, taus, biases)
        if launch is None:
            return None
        if len(card.prepared) >= PREPARED:  # weights that come and go, thresholds that change all the time
            card.prepared.clear()
        card.prepared[key] = launch
    if card.index != torch.cuda.current_device():
        with torch.cuda.device(card.index):
            return _run(card, launch, x)
    return _run(card, launch, x)


@dataclass(frozen=True)
class Prepared:
    """A product as it is launched, but for what differs from call to call.

    Attributes:
        kernel: handle of the variant.
        grid: blocks in x and y.
        shared: bytes of dynamic shared memory of a block.
        partial: float32 values that the splits leave in memory.
        shapes: of the results.
        constant: the first part of the kernel's arguments.
    """

    kernel: int
    grid: tuple[int, int]
    shared: int
    partial: int
    shapes: tuple[tuple[int, ...], ...]
    constant: bytes


def _prepare(
    card: Card, x: Tensor, weights_t: Sequence[Tensor], taus: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Prepared | None:
    """How to launch this product; None where the kernel does not do."""
    n_in = x.shape[-1]
    rows = x.numel() // n_in if n_in else 0
    if not (1 <= rows <= ROWS and x.dtype in TYPES and all(map(_fits, [x] * len(taus), weights_t, taus, biases))):
        return None
    outs = tuple([weight_t.shape[1] for weight_t in weights_t])
    division = plan(n_in, outs, x.element_size(), rows, card.multiprocessors, card.shared)
    if division is None:
        return None
    fields: list[int] = []
    bits = x.data_ptr()
    for weight_t, tau, bias, first in zip(weights_t, taus, biases, division.first, strict=True):
        weight_at, tau_at, out = weight_t.data_ptr(), tau.data_ptr(), weight_t.shape[1]
        bits |= weight_at | tau_at | out * x.itemsize
        fields += (weight_at, tau_at, 0 if bias is None else bias.data_ptr(), out, first)
    fields += _NO_MATRIX * (MATRICES - len(outs))
    aligned = n_in % CHUNK == 0 and bits % 16 == 0
    try:
        with torch.cuda.device(card.index):
            driver.bind(card.index)
            kernel = card.kernel(x.dtype, rows, division.lanes, aligned)
    except (DriverError, NvrtcError) as error:
        _refuse(card.index, error)
        return None
    return Prepared(
        kernel=kernel,
        grid=(division.tiles, division.splits),
        shared=division.shared,
        partial=division.partial,
        shapes=tuple([(*x.shape[:-1], out) for out in outs]),
        constant=_pack_constant(*fields, len(outs), n_in, division.splits, division.tiles),
    )


def _fits(x: Tensor, weight_t: Tensor, tau: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can read them; what does not fit together at all is torch's to refuse."""
    n_in, n_out = weight_t.shape
    return (
        n_in == x.shape[-1]
        and tau.shape == (n_in,)
        and n_out > 0
        and weight_t.dtype is x.dtype
        and tau.dtype is torch.float32
        and weight_t.is_contiguous()
        and tau.is_contiguous()
        and x.device == weight_t.device == tau.device
        and (
            bias is None
            or (bias.shape == (n_out,) and bias.dtype is x.dtype and bias.is_contiguous() and bias.device == x.device)
        )
    )


def _run(card: Card, prepared: Prepared, x: Tensor) -> list[Tensor]:
    """Launch a product on the current device with a contiguous x."""
    stream = torch._C._cuda_getCurrentRawStream(card.index)
    driver.bind(card.index)
    ys = [x.new_empty(shape) for shape in prepared.shapes]
    addresses = [y.data_ptr() for y in ys] + [0] * (MATRICES - len(ys))
    # From torch and given back on return: what uses it next runs behind this launch in the same stream, or graph.
    partial = x.new_empty(prepared.partial, dtype=torch.float32) if prepared.partial else None
    partial_at, counters = (0, 0) if partial is None else (partial.data_ptr(), card.counters(stream))
    arguments = prepared.constant + _pack_call(x.data_ptr(), partial_at, counters, *addresses)
    early = card.arch >= EARLY
    driver.launch(prepared.kernel, prepared.grid, 32 * WARPS, prepared.shared, stream, early, arguments)
    return ys


_cards: dict[int, Card | None] = {}  # None: the kernel does not do there
_cards_lock = threading.Lock()


def _card(index: int) -> Card | None:
    """The GPU, or None where the kernel does not do, which was said once."""
    if index in _cards:
        return _cards[index]
    try:
        card = Card(index)
    except (DriverError, NvrtcError) as error:
        _refuse(index, error)
        return None
    with _cards_lock:
        return _cards.setdefault(index, card)


def _refuse(index: int, error: Exception) -> None:
    """Leave this GPU to torch operations from now on, and say why, once."""
    with _cards_lock:
        if index in _cards and _cards[index] is None:
            return
        _cards[index] = None
    reason = " ".join(str(error).split())[:300]
    warnings.warn(
        f"the kernels for decoding do not work on GPU {index} ({reason}); "
        "gated products use torch operations there and are slower than dense ones",
        RuntimeWarning,
        stacklevel=2,
    )
