"""A dense model that skips inputs as its gated self will, at several levels, with a gradient for what decides about them.

Nothing of the model changes: hooks mask what enters its projections and add a bias to what leaves them. Forward the mask is
hard, as at run time; backward it is a sigmoid of the score's distance to the threshold, relative to the threshold
(straight-through estimation, Bengio et al., arXiv 1308.3432).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..format.names import split_layer
from .budget import Budget
from .histogram import ScoreHistogram

WIDTH = 0.15  # of the backward sigmoid, relative to the threshold
SMALLEST = 1e-30  # threshold whose logarithm is taken: nothing that matters scores less


class Skip(torch.autograd.Function):
    """x where |x| * scale exceeds 1 and 0 elsewhere, and the fraction that is 0.

    Args:
        x: [..., in], any floating dtype.
        scale: [in], float32: the column weights over the threshold.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The hard mask."""
        ctx.save_for_backward(x, scale)
        keep = x.abs().float() * scale > 1
        return x * keep, 1 - keep.float().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """By the input: as if the choice were the sigmoid; by the scale: the sum over all calls of an input."""
        x, scale = ctx.saved_tensors
        by_x, by_skipped = gradients
        size = x.abs().float()
        score = size * scale
        soft = torch.sigmoid((score - 1) / WIDTH)
        by_score = (by_x.float() * x.float() - by_skipped / x.numel()) * soft.mul_(1 - soft).div_(WIDTH)
        by_input = by_x * (score > 1) + (by_score * scale * x.sign()).to(x.dtype)
        return by_input, (by_score * size).flatten(0, -2).sum(0)


class Gate:
    """What is learned around one projection, as hooks on it. With `level` None the projection is dense.

    Attributes:
        columns: [in], float32: the column weights that learning starts from.
        log_thresholds: [L], float32.
        log_columns: [in], float32: what is added to the logarithm of `columns`.
        biases: [L, out], float32: what is added to the output at each level.
        level: which of the L levels a call is made at.
        asked: where given, a call first sets the threshold of its level so that this fraction of its own scores is skipped.
        skipped: scalar: the fraction that the last call skipped.
    """

    def __init__(self, module: nn.Module, columns: Tensor, n_out: int, levels: int) -> None:
        self.columns = columns
        self.log_thresholds = torch.zeros(levels, device=columns.device)
        self.log_columns = torch.zeros_like(columns)
        self.biases = torch.zeros(levels, n_out, device=columns.device)
        self.level: int | None = None
        self.asked: float | None = None
        self.skipped = torch.zeros((), device=columns.device)
        self.handles = (module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after))

    @property
    def learnable(self) -> tuple[Tensor, Tensor, Tensor]:
        """What can be learned: thresholds, biases, column weights."""
        return self.log_thresholds, self.biases, self.log_columns

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.level is None:
            return None
        x, columns = inputs[0], self.columns * self.log_columns.exp()
        if self.asked is not None:
            counts = ScoreHistogram(columns.device)
            counts.add(x.detach().abs().float() * columns.detach())
            with torch.no_grad():
                self.log_thresholds[self.level] = math.log(max(counts.quantile(self.asked), SMALLEST))
        masked, self.skipped = Skip.apply(x, columns * (-self.log_thresholds[self.level]).exp())  # type: ignore[no-untyped-call]
        return (masked, *inputs[1:])

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if self.level is None else output + self.biases[self.level].to(output.dtype)


class Student:
    """A dense model with a gate around each projection that will be gated.

    Attributes:
        model: the model, frozen: [B, S] token ids -> an output with `logits`.
        gates: by projection.
        parts: [P], float64: of all weights of the projections, those of each.
        levels: the L levels of sparsity, ascending.
    """

    def __init__(
        self, model: nn.Module, columns: Mapping[str, Tensor], weights: Mapping[str, int], levels: Sequence[float]
    ) -> None:
        """Put the gates around the projections.

        Args:
            model: the dense model.
            columns: [in] each, float32, by projection: where column weights start.
            weights: number of weights, by projection.
            levels: the levels.
        """
        model.requires_grad_(False)
        self.model, self.levels = model, tuple(levels)
        self.body: Any = model if any(split_layer(name) is None for name in columns) else model.base_model
        self.gates = {
            name: Gate(model.get_submodule(name), start, weights[name] // len(start), len(levels))
            for name, start in columns.items()
        }
        self.parts = torch.tensor([weights[name] for name in columns], dtype=torch.float64) / sum(weights.values())

    @property
    def learnable(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What can be learned, of all gates: thresholds, biases, column weights."""
        thresholds, biases, columns = zip(*(gate.learnable for gate in self.gates.values()), strict=True)
        return list(thresholds), list(biases), list(columns)

    def log_probabilities(self, tokens: Tensor, level: int | None) -> Tensor:
        """[B, S] token ids -> [B, S, vocabulary], float32, at a level; None: of the dense model."""
        self._set_level(level)  # and it stays: a layer that is recomputed for its gradient is so at the same level
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.float().log_softmax(-1)

    def skipped(self) -> Tensor:
        """The fraction of its inputs that each projection skipped in the last call [P], with gradient."""
        return torch.stack([gate.skipped for gate in self.gates.values()])

    @torch.no_grad()
    def fractions(self, tokens: Tensor) -> Tensor:
        """What each projection skips on a text, which goes through the model at once, at each level: [P, L], float64."""
        found = []
        for level in range(len(self.levels)):
            self._run(tokens, level)
            found.append(self.skipped().double().cpu())
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def set_thresholds(self, tokens: Tensor, shares: Tensor) -> None:
        """Set the thresholds so that projections skip their shares [P, L] of what the gated ones before them let through.

        Args:
            tokens: [B, S], the text, which goes through the model at once.
            shares: what to skip.

        Raises:
            CalibrationError: an activation is NaN or infinite.
        """
        try:
            for level in range(len(self.levels)):
                for gate, share in zip(self.gates.values(), shares[:, level].tolist(), strict=True):
                    gate.asked = share
                self._run(tokens, level)
        finally:
            for gate in self.gates.values():
                gate.asked = None

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> tuple[float, ...]:
        """Mean KL(dense || gated) on a text at each level, in nats a token."""
        sums = [0.0] * len(self.levels)
        for row in tokens.split(1):
            expected = self.log_probabilities(row, None)
            for level in range(len(sums)):
                sums[level] += float(divergence(expected, self.log_probabilities(row, level)))
        return tuple(total / len(tokens) for total in sums)

    def asked(self, budget: Budget) -> Tensor:
        """What a budget asks of each projection at each level: [P, L], float64."""
        return torch.tensor(
            [[budget.asked(name, level) for level in self.levels] for name in self.gates], dtype=torch.float64
        )

    def _run(self, tokens: Tensor, level: int) -> None:
        """Through the decoder layers, and the head only where that has a gate."""
        self._set_level(level)
        self.body(input_ids=tokens, use_cache=False)

    def _set_level(self, level: int | None) -> None:
        for gate in self.gates.values():
            gate.level = level


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Mean KL of log-probabilities [B, S, vocabulary] in nats a token, a scalar."""
    return nn.functional.kl_div(found, expected, log_target=True, reduction="sum") / expected[..., 0].numel()


def even_shares(fractions: Tensor, parts: Tensor, levels: Sequence[float]) -> Tensor:
    """Shares that come to each level exactly and never fall from level to level, as near as may be to given fractions.

    From one level to the next every share rises by the same multiple of what its fraction rises.

    Args:
        fractions: [P, L], float64, within 0 and 1.
        parts: [P], float64: how much each projection counts; they add up to 1.
        levels: the L levels, ascending, above 0 and below 1.

    Returns:
        [P, L], float64.
    """
    shares = [torch.zeros_like(parts)]
    for level, fraction in zip(levels, fractions.unbind(1), strict=True):
        rise = (fraction - shares[-1]).clamp_min(1e-6)  # of which any multiple is a rise
        low, high = 0.0, 1e6
        while low < (middle := (low + high) / 2) < high:
            if float(parts @ (shares[-1] + middle * rise).clamp_max(1)) < level:
                low = middle
            else:
                high = middle
        shares.append((shares[-1] + high * rise).clamp_max(1))
    return torch.stack(shares[1:], dim=1)
