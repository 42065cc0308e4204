"""Finds an orthogonal basis of the residual stream in which more can be skipped.

Principal axes put the most energy into the fewest inputs. But what a threshold drops are the small scores of single tokens, so
the basis is then fitted to that: it minimises the squared scores that are dropped, the bound on a projection's error that the
rule rests on (arXiv 2505.19427, section 3), over everything that reads the stream, at several sparsities in turn.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from ..progress import Progress
from .basis import Geometry, fix_signs
from .moments import Site

STEPS = 300
LEVELS = (0.4, 0.5, 0.65)  # sparsities, a step each in turn
WARM_UP = 10  # steps
RATE = 3e-3  # Adam's; the rate decays along a cosine to LAST of it
LAST = 0.02
TOKENS = 1024  # of a norm in a step
QUANTILE_STRIDE = 7  # a threshold is taken from one score in so many; prime, so that every input is among them
KEPT = 16384  # tokens of a norm in all
FEWEST_STEPS, FEWEST_NORMS = 150, 3  # with fewer steps, or fewer norms in each, a fit is not worth its time
SHARE = 4  # a step takes one norm in so many, or FEWEST_NORMS

# What a fit may take. Operations: about ten minutes on two cores, or on a data-centre GPU. Bytes: on a CPU little beside what
# a conversion holds; beside a GPU, in the host's memory, no more than half of that.
OPERATIONS = {"cpu": 3e13, "cuda": 1.2e16}
BYTES = {"cpu": 1 << 28, "cuda": 16 << 30}


@dataclass(frozen=True)
class Effort:
    """What a fit takes. It follows from the model's shapes and the kind of device alone, so that a fit can be repeated.

    Attributes:
        steps: of the optimiser.
        norms: how many norms a step looks at.
        tokens: of each norm in a step.
        kept: tokens of each norm in the sample.
        operations: floating-point operations of all steps.
        nbytes: of sample, weights and optimiser, at most: in float32.
        enough: whether the limits leave it what it needs to be worth its time.
    """

    steps: int
    norms: int
    tokens: int
    kept: int
    operations: float
    nbytes: int
    enough: bool

    def shown(self) -> str:
        """In words, for a plan and a report."""
        return (
            f"{self.steps} steps of {self.tokens} tokens behind {self.norms} norms, "
            f"{self.operations / 1e12:.2g} TFLOP, {self.nbytes / 2**20:.0f} MiB"
        )


def effort_of(sizes: Geometry, readers: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> Effort:
    """What a fit may take on a device, by its type and, for a GPU, the host's memory.

    Args:
        sizes: of the model.
        readers: for every norm, the shapes [outputs, inputs] of the projections that read it.
        device: to fit on.
    """
    hidden, norms = sizes.hidden, len(readers)
    operations, nbytes = OPERATIONS.get(device.type, OPERATIONS["cpu"]), BYTES.get(device.type, BYTES["cpu"])
    if device.type != "cpu":
        nbytes = min(nbytes, psutil.virtual_memory().total // 2)
    rows = sum(min(shape[0], hidden) for shapes in readers for shape in shapes)
    # Forward and backward each multiply a step's tokens and rows by Q; Cayley's map costs about three inversions.
    a_norm = 4 * hidden**2 * (TOKENS + rows / norms)
    a_map = 8 * hidden**3
    taken = min(norms, max(FEWEST_NORMS, norms // SHARE))
    steps = max(1, min(STEPS, int(operations / (taken * a_norm + a_map))))
    fixed = 4 * rows * hidden + 40 * hidden**2
    kept = min(KEPT, max(0, nbytes - fixed) // (4 * norms * hidden))
    return Effort(
        steps=steps,
        norms=taken,
        tokens=TOKENS,
        kept=max(kept, TOKENS),
        operations=steps * (taken * a_norm + a_map),
        nbytes=fixed + 4 * norms * hidden * max(kept, TOKENS),
        enough=steps >= FEWEST_STEPS and kept >= 2 * TOKENS,
    )


def principal_axes(moments: Tensor) -> Tensor:
    """Eigenvectors of second moments, those of the largest eigenvalue first.

    Args:
        moments: [hidden, hidden], float64, symmetric.

    Returns:
        [hidden, hidden], float64, orthogonal, its columns the axes.
    """
    return fix_signs(torch.linalg.eigh(moments).eigenvectors.flip(-1))


def fit_basis(start: Tensor, sites: Sequence[Site], effort: Effort, seed: int, progress: Progress) -> Tensor:
    """Turn a basis so that what a threshold drops is small.

    Adam on a free matrix P, of which Cayley's map of P - P' makes a rotation, from P = 0. A step looks at a few of the norms,
    all of them in turn, and at a run of tokens of each, which with the weights behind it is brought to the device for the step
    alone. In float32, on a GPU with products in TF32, for a step has more noise than that; the last map in float64.

    Args:
        start: [hidden, hidden], float64, orthogonal.
        sites: what was kept of every norm.
        effort: how long.
        seed: of the order.
        progress: how to report it.

    Returns:
        [hidden, hidden], float64, orthogonal.
    """
    device, total = start.device, sum(reader.weights for site in sites for reader in site.readers)
    origin, scales = start.float(), [_scales(site, total, device) for site in sites]
    free = torch.zeros_like(origin, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    tensor_cores = _tensor_cores() if start.is_cuda else nullcontext()
    with tensor_cores, progress("Fitting the basis", effort.steps, "step") as advance:
        for step in range(effort.steps):
            decay = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / effort.steps))
            optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * decay
            if len(order) < effort.norms:
                order = torch.randperm(len(sites), generator=generator).tolist()
            chosen, order = order[: effort.norms], order[effort.norms :]
            level = LEVELS[step % len(LEVELS)]
            turned = origin @ cayley(free)
            leaf = turned.detach().requires_grad_()
            for number in chosen:  # one at a time bounds what a gradient keeps
                inputs, readers = sites[number].inputs, sites[number].readers
                first = int(torch.randint(max(1, len(inputs) - effort.tokens + 1), (1,), generator=generator))
                part = _brought(inputs[first : first + effort.tokens], device)
                weights = [
                    _brought(reader.factor, device) * scale
                    for reader, scale in zip(readers, scales[number], strict=True)
                ]
                loss = dropped_energy(part, weights, leaf, level) / level**4  # which makes the levels alike
                loss.backward()
            optimiser.zero_grad()
            turned.backward(leaf.grad)
            optimiser.step()
            advance(1)
    return start @ cayley(free.detach().double())


def dropped_energy(inputs: Tensor, weights: Sequence[Tensor], q: Tensor, sparsity: float) -> Tensor:
    """The squared scores that a threshold drops behind a norm, summed over the projections that read it.

    Each projection has its own threshold, the quantile of its scores in these inputs. A gradient goes through inputs and
    columns and not through the choice of what is dropped.

    Args:
        inputs: x, [tokens, hidden], float32.
        weights: matrices W, [rows, hidden], float32, already divided by what makes projections comparable.
        q: the basis, [hidden, hidden], float32.
        sparsity: fraction dropped, above 0.

    Returns:
        scalar: sum over the projections of the mean over tokens of the sum over dropped j of (x q)_j^2 ||(W q)_j||^2.
    """
    squares = (inputs @ q).square()  # [tokens, hidden]
    turned = (torch.cat(list(weights)) @ q).split([len(weight) for weight in weights])
    total = torch.zeros((), dtype=q.dtype, device=q.device)
    for weight in turned:
        columns = weight.square().sum(0)  # [hidden]
        with torch.no_grad():
            scores = squares * columns  # squared: in the same order
            sample = scores.flatten()[::QUANTILE_STRIDE]
            threshold = kth_smallest(sample, max(1, int(sparsity * sample.numel())))
            dropped = (scores < threshold).to(squares.dtype)
        total = total + (columns * (squares * dropped).mean(0)).sum()
    return total


def _scales(site: Site, total: int, device: torch.device) -> list[Tensor]:
    """What the weights behind a norm are multiplied by, so that a projection counts as it has of the `total` weights, and its
    error in parts of its output."""
    sample, made = _brought(site.inputs[: 4 * TOKENS], device), []
    for reader in site.readers:
        energy = (sample @ _brought(reader.factor, device).t()).square().sum(1).mean().clamp_min(1e-30)
        made.append((reader.weights / total / energy).sqrt())
    return made


def _brought(tensor: Tensor, device: torch.device) -> Tensor:
    """What rests in the host's memory, on the device, in float32."""
    return tensor.to(device, non_blocking=True).float()


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Float32 products within the block may round their factors to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest, from 1, of [n]: a scalar. On a GPU a single block selects while all of them sort, much faster."""
    return values.sort().values[k - 1] if values.is_cuda else values.kthvalue(k).values


def cayley(free: Tensor) -> Tensor:
    """The rotation (I + A)^-1 (I - A) of the skew matrix A = P - P', [n, n]; the identity for P = 0."""
    skew = free - free.t()
    eye = torch.eye(len(free), dtype=free.dtype, device=free.device)
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return rotation
