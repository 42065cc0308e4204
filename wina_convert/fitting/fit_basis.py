"""Finds an orthogonal basis of the residual stream in which more can be skipped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..progress import Progress
from .basis import Geometry, fix_signs
from .moments import Site


@dataclass(frozen=True)
class Budget:
    steps: int
    tokens: int
    kept: int
    sites: int
    enough: bool
    rate: float = 3e-3
    loss: str = "l1"

    def shown(self) -> str:
        return f"{self.steps} steps"


def budget_of(sizes, shapes, device) -> Budget:
    return Budget(400, 1024, 16384, 10**9, True)


def principal_axes(moments: Tensor) -> Tensor:
    return fix_signs(torch.linalg.eigh(moments).eigenvectors.flip(-1))


def cayley(free: Tensor) -> Tensor:
    skew, eye = free - free.t(), torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def fit_basis(start: Tensor, sites: Sequence[Site], budget: Budget, seed: int, progress: Progress, log=None) -> Tensor:
    q = start.float()
    dim = len(q)
    total = sum(r.weights for s in sites for r in s.readers)
    gen = torch.Generator().manual_seed(seed)
    ref = [[(s.inputs[:4096].float() @ r.factor.t()).square().sum(1).mean() for r in s.readers] for s in sites]
    stacks = [torch.cat([r.factor * (r.weights / total / ((e / dim).sqrt() if budget.loss == "l1" else e.sqrt())) for r, e in zip(s.readers, es)]) for s, es in zip(sites, ref)]
    if budget.loss != "l1":
        stacks = [torch.cat([r.factor * (r.weights / total / e).sqrt() for r, e in zip(s.readers, es)]) for s, es in zip(sites, ref)]
    lens = [[len(r.factor) for r in s.readers] for s in sites]
    free = torch.zeros(dim, dim, device=q.device, requires_grad=True)
    opt = torch.optim.Adam([free], lr=budget.rate)
    levels = (0.4, 0.5, 0.65)
    order = []
    for step in range(budget.steps):
        opt.param_groups[0]["lr"] = budget.rate * min(1, (step + 1) / 10) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / budget.steps)))
        turned = q @ cayley(free)
        loss = torch.zeros((), device=q.device)
        if len(order) < budget.sites:
            order = torch.randperm(len(sites), generator=gen).tolist()
        chosen, order = order[: budget.sites], order[budget.sites:]
        level = levels[step % 3]
        for i in chosen:
            x = sites[i].inputs
            t = min(budget.tokens, len(x))
            j = int(torch.randint(0, len(x) - t + 1, (1,), generator=gen))
            y = x[j : j + t].float() @ turned
            w = (stacks[i] @ turned).split(lens[i])
            if budget.loss == "l1":
                a = y.abs().mean(0)
                loss = loss + sum((a * p.norm(dim=0)).mean() for p in w)
            elif budget.loss == "bound":
                for p in w:
                    s = y.abs() * p.norm(dim=0)
                    f = s.detach().flatten()[::7]
                    cut = f.kthvalue(max(1, int(level * f.numel()))).values
                    loss = loss + (s * (s < cut)).square().sum(1).mean() / level**4
            else:
                for p in w:
                    s = y.abs() * p.norm(dim=0)
                    f = s.detach().flatten()[::7]
                    cut = f.kthvalue(max(1, int(level * f.numel()))).values
                    loss = loss + ((y * (s < cut)) @ p.t()).square().sum(1).mean() / level**4
        opt.zero_grad(); loss.backward(); opt.step()
        if log and step % 50 == 0: log(step, loss.item())
    return start @ cayley(free.detach().double())
