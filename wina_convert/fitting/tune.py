"""Learns thresholds, biases and column weights by distilling the dense model into its gated self; no weight changes.

Every projection has a log-threshold and a bias at each level of sparsity, and column weights for all of them. One run learns
at all levels: KL(dense || gated) falls, by its logarithm, so that no level drowns another, and a Lagrangian holds the sparsity
of the whole. Biases against what sparsity takes away were proposed in SPON, arXiv 2512.12744.

What comes of the thresholds is how they divide the sparsity: the thresholds themselves are fitted afterwards for that division
like for any other, on text that learning did not see.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from ..format.grid import GRID
from .budget import Budget
from .schemes import LEARNED
from .student import Student, divergence, even_shares

LEVELS = (0.25, 0.4, 0.5, 0.65, 0.75, 0.85)
STEPS = 100
LEVEL_TOKENS = 1024  # of a step at each level
RATES = (2e-2, 2e-3, 1e-2)  # of Adam: log-thresholds, biases, logs of column weights
WARM, LAST = 5, 0.02  # steps over which the rates rise; the part of them that the last step has
PRESSURE, STIFFNESS, MOST = 6.0, 100.0, 60.0  # of the Lagrangian: what it starts at, its quadratic part, its largest
LOOK = 25  # steps between looks at the held-out text
PATIENCE = 2  # looks without a gain after which learning stops

State = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """The text of a tuning, in three parts that share no sequence: [N, S], int64 each.

    Attributes:
        learned: what is learned from.
        fitted: what the thresholds are set on.
        judged: what decides when to stop and whether the result is kept.
    """

    learned: Tensor
    fitted: Tensor
    judged: Tensor


@dataclass(frozen=True)
class Tuned:
    """What tuning learned.

    Attributes:
        columns: by projection, [in], float32: the column weights of the score.
        biases: by projection, [L, out], float32: what is added to the output at each of LEVELS.
        shares: by projection, [L], float64: the fraction of its inputs to skip at each of LEVELS.
        before: KL(dense || gated) in nats a token on the judged text at each of LEVELS, untuned.
        after: the same, tuned, and no worse at any level; as `before` where nothing that was learned is so.
        steps: how many were made.
    """

    columns: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
    before: tuple[float, ...]
    after: tuple[float, ...]
    steps: int

    @property
    def better(self) -> bool:
        """Whether anything was learned that is better at some level and worse at none."""
        return self.after != self.before

    def budget(self, projections: Iterable[str]) -> Budget:
        """The learned division of the sparsity, linear between the levels, 0 at 0 and 1 at 1, in an order of projections."""
        shares = {
            name: tuple(np.interp(GRID, (0.0, *LEVELS, 1.0), [0.0, *self.shares[name].tolist(), 1.0]).tolist())
            for name in projections
        }
        return Budget(LEARNED.name, shares, GRID)

    def bias_table(self, projection: str) -> Tensor:
        """The biases of a projection along the grid: [K, out], float32, 0 at 0, as the last level's beyond it."""
        stored = self.biases[projection]
        points = np.interp(GRID, (0.0, *LEVELS), np.arange(len(LEVELS) + 1))
        rows = torch.cat([torch.zeros_like(stored[:1]), stored])
        left = torch.from_numpy(np.minimum(points.astype(np.int64), len(LEVELS) - 1))
        return torch.lerp(rows[left], rows[left + 1], torch.from_numpy(points - left.numpy()).float()[:, None])


def tune(
    student: Student,
    budget: Budget,
    texts: Texts,
    seed: int,
    state: State | None = None,
    save: Callable[[State], object] = lambda state: None,
    told: Callable[[int, float], object] = lambda steps, loss: None,
) -> Tuned:
    """Distil a dense model into its gated self.

    Args:
        student: the model with its gates, at LEVELS; it is used up.
        budget: the untuned division of the sparsity, where learning starts and what it is held against.
        texts: the text, on the model's device.
        seed: of the order of the text.
        state: what `save` was last given, to go on there.
        save: told at every look what is needed to go on.
        told: told the steps done since the last call, and the mean KL over the levels in nats a token.
    """
    learner = _Learner(student, texts)
    learner.begin(budget, state)
    told(learner.step, math.nan)
    rows = max(1, LEVEL_TOKENS // texts.learned.shape[1])
    order = _order(len(texts.learned), STEPS * len(LEVELS) * rows, seed).view(STEPS, len(LEVELS), rows)
    while learner.step < STEPS and learner.stale < PATIENCE:
        batches = texts.learned[order[learner.step].to(texts.learned.device)]
        told(1, learner.learn(batches))
        if learner.step % LOOK == 0 or learner.step == STEPS:
            learner.look()
            save(learner.state())
    return learner.result()


class _Learner:
    """A tuning on its way: parameters, optimizer, and the best that the judged text has seen."""

    def __init__(self, student: Student, texts: Texts) -> None:
        self.student, self.texts = student, texts
        groups = student.learnable
        self.parameters = [tensor.requires_grad_() for group in groups for tensor in group]
        pairs = zip(groups, RATES, strict=True)
        self.optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in pairs], betas=(0.9, 0.98))
        self.parts = student.parts.float().to(texts.learned.device)
        self.pressure = torch.full((len(LEVELS),), PRESSURE)
        self.step = self.stale = 0
        self.before: tuple[float, ...] = ()
        self.best: tuple[float, ...] = ()
        self.lowest = math.inf  # mean logarithm of the losses of a look; that one may be worse at a level
        self.kept: list[Tensor] = []
        self.shares = torch.empty(0)

    def begin(self, budget: Budget, state: State | None) -> None:
        """At the untuned thresholds, or where a state was left."""
        if state is not None:
            self._restore(state)
            return
        self.shares = even_shares(self.student.asked(budget), self.student.parts, LEVELS)
        self.student.set_thresholds(self.texts.fitted, self.shares)
        self.kept = self._copy()
        self.before = self.best = self.student.losses(self.texts.judged)
        self.lowest = _mean_log(self.best)

    def learn(self, batches: Tensor) -> float:
        """One step on [L, B, S] token ids, a batch for each level; returns the mean KL."""
        for group, rate in zip(self.optimizer.param_groups, RATES, strict=True):
            fall = LAST + (1 - LAST) * (1 + math.cos(math.pi * self.step / STEPS)) / 2
            group["lr"] = rate * min(1.0, (self.step + 1) / WARM) * fall
        self.optimizer.zero_grad()
        total = 0.0
        for number, (level, batch) in enumerate(zip(LEVELS, batches, strict=True)):
            with torch.no_grad():
                expected = self.student.log_probabilities(batch, None)
            loss = divergence(expected, self.student.log_probabilities(batch, number))
            missing = level - self.student.skipped() @ self.parts
            pressure = float(self.pressure[number])
            whole = loss.clamp_min(1e-9).log() + pressure * missing + STIFFNESS * missing.square()
            (whole / len(LEVELS)).backward()
            self.pressure[number] = min(MOST, max(0.0, pressure + 10 * float(missing.detach())))
            total += float(loss.detach())
        self.optimizer.step()
        self.step += 1
        return total / len(LEVELS)

    def look(self) -> None:
        """Judge what was learned, its thresholds set anew; remember it where it is the best so far and worse at no level."""
        now = self._copy()
        shares = even_shares(self.student.fractions(self.texts.fitted), self.student.parts, LEVELS)
        try:
            self.student.set_thresholds(self.texts.fitted, shares)
            losses = self.student.losses(self.texts.judged)
        except CalibrationError:  # learning went so far astray that an activation is no number
            losses = (math.inf,) * len(LEVELS)
        found = _mean_log(losses)
        self.stale = 0 if found < self.lowest else self.stale + 1
        self.lowest = min(self.lowest, found)
        if found < _mean_log(self.best) and all(a <= b for a, b in zip(losses, self.before, strict=True)):
            self.best, self.kept, self.shares = losses, now, shares
        self._paste(now)

    def result(self) -> Tuned:
        """The best."""
        self._paste(self.kept)
        gates = self.student.gates
        return Tuned(
            columns={name: (g.columns * g.log_columns.exp()).detach().cpu() for name, g in gates.items()},
            biases={name: g.biases.detach().cpu() for name, g in gates.items()},
            shares=dict(zip(gates, self.shares.unbind(0), strict=True)),
            before=self.before,
            after=self.best,
            steps=self.step,
        )

    def state(self) -> State:
        """Everything that the next step depends on, as named tensors."""
        numbers = [self.step, self.stale, self.lowest, *self.before, *self.best, *self.pressure.tolist()]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64), "shares": self.shares}
        moments = self.optimizer.state_dict()["state"]
        for n, (now, kept) in enumerate(zip(self.parameters, self.kept, strict=True)):
            state |= {f"now/{n}": now.detach().clone(), f"kept/{n}": kept}
            state |= {f"moments/{n}/{name}": tensor.clone() for name, tensor in moments.get(n, {}).items()}
        return state

    def _restore(self, state: State) -> None:
        step, stale, self.lowest, *numbers = state["numbers"].tolist()
        self.step, self.stale, count = int(step), int(stale), len(LEVELS)
        self.before, self.best = tuple(numbers[:count]), tuple(numbers[count : 2 * count])
        self.pressure, self.shares = torch.tensor(numbers[2 * count :]), state["shares"]
        self.kept = [state[f"kept/{n}"].to(now.device) for n, now in enumerate(self.parameters)]
        self._paste([state[f"now/{n}"] for n in range(len(self.parameters))])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("moments/"):
                _, number, moment = name.split("/")
                moments.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _paste(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _mean_log(losses: tuple[float, ...]) -> float:
    """Infinity where learning went astray."""
    return sum(math.log(max(loss, 1e-12)) if loss == loss else math.inf for loss in losses) / len(losses)


def _order(count: int, picks: int, seed: int) -> Tensor:
    """So many indices below `count`, in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-picks // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:picks]
