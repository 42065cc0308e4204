"""Finds an orthogonal basis of the residual stream in which more can be skipped.

Principal axes put the most energy into the fewest inputs. But what a threshold drops are the small scores of single tokens, so
the basis is then fitted to make scores sparse: it minimises their mean, the L1 norm, over everything that reads the stream.
The scores are those of the rule, |x_j| times the norm of the j-th column, and the sum of their squares is the same in every
basis but for the columns' angles; the smaller the mean, the more unequal they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..progress import Progress
from .basis import Geometry, fix_signs
from .moments import Site

STEPS = 400
WARM_UP = 10  # steps
RATE = 3e-3  # Adam's; the rate decays along a cosine to LAST of it
LAST = 0.02
TOKENS = 1024  # of a norm in a step
KEPT = 16384  # tokens of a norm in all
FEWEST_STEPS, FEWEST_NORMS = 200, 4  # with fewer steps, or fewer norms in each, a fit is not worth its time
SHARE = 4  # a step takes one norm in so many, or FEWEST_NORMS

# What a fit may take: operations that take about ten minutes on two cores or a data-centre GPU, and bytes.
OPERATIONS = {"cpu": 3e13, "cuda": 1.2e16}
BYTES = {"cpu": 1 << 30, "cuda": 24 << 30}


@dataclass(frozen=True)
class Budget:
    """What a fit takes. It follows from the model's shapes and the kind of device alone, so that a fit can be repeated.

    Attributes:
        steps: of the optimiser.
        norms: how many norms a step looks at.
        tokens: of each norm in a step.
        kept: tokens of each norm in the sample.
        operations: floating-point operations of all steps.
        nbytes: of sample, weights and optimiser.
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


def budget_of(sizes: Geometry, readers: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> Budget:
    """What a fit may take on a device.

    Args:
        sizes: of the model.
        readers: for every norm, the shapes [outputs, inputs] of the projections that read it.
        device: its type decides.
    """
    hidden, norms = sizes.hidden, len(readers)
    operations, nbytes = OPERATIONS.get(device.type, OPERATIONS["cpu"]), BYTES.get(device.type, BYTES["cpu"])
    rows = sum(min(shape[0], hidden) for shapes in readers for shape in shapes)
    # Forward and backward each multiply a step's tokens and rows by Q; Cayley's map costs about three inversions.
    a_norm = 4 * hidden**2 * (TOKENS + rows / norms)
    a_map = 8 * hidden**3
    taken = min(norms, max(FEWEST_NORMS, norms // SHARE))
    steps = max(1, min(STEPS, int(operations / (taken * a_norm + a_map))))
    fixed = 4 * rows * hidden + 40 * hidden**2
    kept = min(KEPT, max(0, nbytes - fixed) // (4 * norms * hidden))
    return Budget(
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


def fit_basis(start: Tensor, sites: Sequence[Site], budget: Budget, seed: int, progress: Progress) -> Tensor:
    """Turn a basis so that the scores in it are sparse.

    Adam on a free matrix P, of which Cayley's map of P - P' makes a rotation, from P = 0. A step looks at a few of the norms,
    all of them in turn, and at a run of tokens of each. In float32; the last map in float64.

    Args:
        start: [hidden, hidden], float64, orthogonal.
        sites: what was kept of every norm.
        budget: how long.
        seed: of the order.
        progress: how to report it.

    Returns:
        [hidden, hidden], float64, orthogonal.
    """
    origin, stacks = start.float(), [_stack(site, sites) for site in sites]
    free = torch.zeros_like(origin, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    with progress("Fitting the basis", budget.steps, "step") as advance:
        for step in range(budget.steps):
            decay = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / budget.steps))
            optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * decay
            if len(order) < budget.norms:
                order = torch.randperm(len(sites), generator=generator).tolist()
            chosen, order = order[: budget.norms], order[budget.norms :]
            turned = origin @ cayley(free)
            leaf = turned.detach().requires_grad_()
            for number in chosen:  # one at a time bounds what a gradient keeps
                inputs = sites[number].inputs
                first = int(torch.randint(max(1, len(inputs) - budget.tokens + 1), (1,), generator=generator))
                sparsity_loss(inputs[first : first + budget.tokens].float(), stacks[number], leaf).backward()
            optimiser.zero_grad()
            turned.backward(leaf.grad)
            optimiser.step()
            advance(1)
    return start @ cayley(free.detach().double())


def sparsity_loss(inputs: Tensor, weights: Sequence[Tensor], q: Tensor) -> Tensor:
    """The mean score behind a norm, summed over the projections that read it.

    Args:
        inputs: x, [tokens, hidden], float32.
        weights: matrices [rows, hidden], float32, already divided by what makes projections comparable.
        q: the basis, [hidden, hidden], float32.

    Returns:
        scalar: sum over the projections of the mean of |x q|_j times the norm of the j-th column of W q.
    """
    magnitudes = (inputs @ q).abs().mean(0)  # [hidden]
    turned = (torch.cat(list(weights)) @ q).split([len(weight) for weight in weights])
    return torch.stack([(magnitudes * weight.norm(dim=0)).mean() for weight in turned]).sum()


def _stack(site: Site, sites: Sequence[Site]) -> list[Tensor]:
    """The weights behind a norm, each times its share of all weights over the root mean square of its scores in no basis."""
    total = sum(reader.weights for other in sites for reader in other.readers)
    sample, made = site.inputs[:4096].float(), []
    for reader in site.readers:
        energy = (sample @ reader.factor.t()).square().sum(1).mean() / reader.factor.shape[1]
        made.append(reader.factor * (reader.weights / total / energy.clamp_min(1e-30).sqrt()))
    return made


def cayley(free: Tensor) -> Tensor:
    """The rotation (I + A)^-1 (I - A) of the skew matrix A = P - P', [n, n]; the identity for P = 0."""
    skew = free - free.t()
    eye = torch.eye(len(free), dtype=free.dtype, device=free.device)
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return rotation
