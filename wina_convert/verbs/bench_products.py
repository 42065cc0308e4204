"""`wina bench --kernels`: single products against the dense one of torch and against memory bandwidth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..defaults import torch_defaults
from ..errors import OptionError
from ..format.dtypes import FLOATS, dtype_name
from ..format.grid import check_sparsity
from ..progress import Progress, silent
from ..runtime.kernels import gated_linear
from ..runtime.rule import dropped
from . import benchmark
from .benchmark import SPARSITIES, Benchmark, ProductSpeed, machine, read, seconds

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (2048, 8192), (8192, 2048), (2048, 2048), (2048, 512))


@dataclass(frozen=True)
class Timed:
    """A product that was timed.

    Attributes:
        n_in, n_out: inputs and outputs.
        sparsity: None: the dense product.
        kept: fraction of its inputs that are not skipped.
        seconds: median.
    """

    n_in: int
    n_out: int
    sparsity: float | None
    kept: float
    seconds: float


@torch_defaults()
@torch.inference_mode()
def bench_products(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    dtype: str = "auto",
    repeats: int = 31,
    progress: Progress = silent,
) -> Benchmark:
    """Time single products at batch 1: the dense one of torch and the gated one.

    Args:
        shapes: (inputs, outputs) of each.
        sparsities: fractions of inputs to skip.
        dtype: "auto" (bfloat16), "float32", "bfloat16" or "float16".
        repeats: calls of each, of which the median counts.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
    """
    asked, number = asked_of(shapes, sparsities, dtype, repeats)
    timed: list[Timed] = []
    bandwidths: dict[tuple[int, int], float] = {}
    with progress("Timing", len(dict.fromkeys(shapes)) * repeats, "turn") as advance:
        for n_in, n_out in dict.fromkeys(shapes):
            copies = max(2, benchmark.WORKING_SET // (n_in * n_out * number.itemsize))
            # The same memory is [in, out] to the gated product and [out, in] to the dense one.
            memory = (0.02 * torch.randn(n_in * n_out)).to(number).repeat(copies, 1)
            calls, kept = product_calls(torch.randn(1, n_in).to(number), n_out, asked)
            clocks: dict[float | None, list[float]] = {key: [] for key in calls}
            reads = []
            turn = 0
            for _ in range(repeats):
                for key, call in calls.items():
                    clocks[key].append(seconds(call, memory[turn % copies]))
                    turn += 1
                reads.append(seconds(read, memory))
                advance(1)
            bandwidths[n_in, n_out] = memory.nbytes / median(reads)
            timed += [Timed(n_in, n_out, key, kept[key], median(took)) for key, took in clocks.items()]
    rows = product_rows(timed, number.itemsize, bandwidths)
    described = f"single products, {str(number).removeprefix('torch.')}"
    bandwidth = median(bandwidths.values())
    return Benchmark(machine(), date.today().isoformat(), described, bandwidth, True, products=rows)


def asked_of(
    shapes: Sequence[tuple[int, int]], sparsities: Sequence[float], dtype: str, repeats: int
) -> tuple[list[float], torch.dtype]:
    """The sparsities, each once, and the dtype; the arguments are those of `bench_products`.

    Raises:
        OptionError: one of them cannot be used.
    """
    asked = [check_sparsity(sparsity) for sparsity in dict.fromkeys(sparsities)]
    dtype = dtype_name(dtype)
    if repeats < 1 or not shapes or any(size < 1 for shape in shapes for size in shape):
        raise OptionError(f"repeats is {repeats} and shapes are {list(shapes)}; give numbers of at least 1")
    return asked, FLOATS["bfloat16" if dtype == "auto" else dtype]


def product_calls(
    x: Tensor, n_out: int, sparsities: Sequence[float]
) -> tuple[dict[float | None, Callable[[Tensor], object]], dict[float | None, float]]:
    """The dense product (None) and the gated ones, to be called with a weight [inputs * outputs]; what part of x each keeps.

    Args:
        x: [1, inputs].
        n_out: outputs.
        sparsities: fractions of x to skip.
    """
    kept: dict[float | None, float] = {None: 1.0}
    calls: dict[float | None, Callable[[Tensor], object]] = {None: _dense_call(x, n_out)}
    for sparsity in sparsities:
        limit = float(x.abs().float().quantile(sparsity)) if sparsity else -1.0
        tau = torch.full((x.shape[1],), limit, device=x.device)
        kept[sparsity] = 1 - dropped(x, tau).double().mean().item()
        calls[sparsity] = _gated_call(x, n_out, tau)
    return calls, kept


def product_rows(
    timed: Sequence[Timed], itemsize: int, bandwidths: Mapping[tuple[int, int], float]
) -> tuple[ProductSpeed, ...]:
    """Each product against the dense one of its shape and the bandwidth measured for that shape, bytes a second."""
    rows = []
    for one in timed:
        shape = (one.n_in, one.n_out)
        rate = one.kept * one.n_in * one.n_out * itemsize / one.seconds
        dense = next(other.seconds for other in timed if (other.n_in, other.n_out, other.sparsity) == (*shape, None))
        rows.append(
            ProductSpeed(*shape, one.sparsity, one.seconds, dense / one.seconds, rate, rate / bandwidths[shape])
        )
    return tuple(rows)


def _dense_call(x: Tensor, n_out: int) -> Callable[[Tensor], object]:
    return lambda weight: linear(x, weight.view(n_out, -1))


def _gated_call(x: Tensor, n_out: int, tau: Tensor) -> Callable[[Tensor], object]:
    return lambda weight: gated_linear(x, weight.view(-1, n_out), tau, None)
