"""`wina bench --kernels`: single products against the dense one of torch and against memory bandwidth."""

from collections.abc import Callable, Sequence
from datetime import date
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import OptionError
from ..format.dtypes import FLOATS, check_dtype
from ..format.grid import check_sparsity
from ..progress import Progress, silent
from ..runtime.kernels import gated_linear
from ..runtime.rule import dropped
from . import benchmark
from .benchmark import SPARSITIES, Benchmark, ProductSpeed, machine, read, seconds

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (2048, 8192), (8192, 2048), (2048, 2048), (2048, 512))


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
    asked = [check_sparsity(sparsity) for sparsity in dict.fromkeys(sparsities)]
    check_dtype(dtype)
    number = FLOATS["bfloat16" if dtype == "auto" else dtype]
    if repeats < 1 or not shapes or any(size < 1 for shape in shapes for size in shape):
        raise OptionError(f"repeats is {repeats} and shapes are {list(shapes)}; give numbers of at least 1")
    timed: list[tuple[int, int, float | None, float, float]] = []  # in, out, sparsity, fraction read, seconds
    bandwidths: dict[tuple[int, int], float] = {}
    with progress("Timing", len(dict.fromkeys(shapes)) * repeats, "turn") as advance:
        for n_in, n_out in dict.fromkeys(shapes):
            copies = max(2, benchmark.WORKING_SET // (n_in * n_out * number.itemsize))
            # The same memory is [in, out] to the gated product and [out, in] to the dense one.
            memory = (0.02 * torch.randn(n_in * n_out)).to(number).repeat(copies, 1)
            x = torch.randn(1, n_in).to(number)
            kept: dict[float | None, float] = {None: 1.0}
            calls: dict[float | None, Callable[[Tensor], object]] = {None: _dense_call(x, n_out)}
            for sparsity in asked:
                tau = torch.full((n_in,), float(x.abs().float().quantile(sparsity)) if sparsity else -1.0)
                kept[sparsity] = 1 - dropped(x, tau).double().mean().item()
                calls[sparsity] = _gated_call(x, n_out, tau)
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
            timed += [(n_in, n_out, key, kept[key], median(took)) for key, took in clocks.items()]
    bandwidth = median(bandwidths.values())
    rows = []
    for n_in, n_out, key, fraction, took in timed:
        rate = fraction * n_in * n_out * number.itemsize / took
        dense = next(one[4] for one in timed if one[:3] == (n_in, n_out, None))
        rows.append(ProductSpeed(n_in, n_out, key, took, dense / took, rate, rate / bandwidths[n_in, n_out]))
    described = f"single products, {str(number).removeprefix('torch.')}"
    return Benchmark(machine(), date.today().isoformat(), described, bandwidth, True, products=tuple(rows))


def _dense_call(x: Tensor, n_out: int) -> Callable[[Tensor], object]:
    return lambda weight: linear(x, weight.view(n_out, -1))


def _gated_call(x: Tensor, n_out: int, tau: Tensor) -> Callable[[Tensor], object]:
    return lambda weight: gated_linear(x, weight.view(-1, n_out), tau, None)
