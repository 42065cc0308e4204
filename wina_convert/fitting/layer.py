"""A decoder layer on which a division of the sparsity is tried: what it makes of text when some of its projections skip."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..format.grid import GRID
from ..runtime.linear import WinaLinear
from .calibrate import counting
from .histogram import ScoreHistogram

TINY = 1e-300  # for a hidden state of zeros

Shares = dict[str, tuple[float, ...]]  # by projection, what it skips at each point of the grid


@dataclass(frozen=True)
class Layer:
    """A decoder layer beside its dense self.

    Attributes:
        run: [B, S, hidden] and the number of the batch -> [B, S, hidden].
        gates: its gated projections by name, with weights and column norms.
        histograms: of the scores of each, in the dense layer.
        states: what enters the layer, [B, S, hidden] each.
        outputs: what the dense layer makes of it.
    """

    run: Callable[[Tensor, int], Tensor]
    gates: Mapping[str, WinaLinear]
    histograms: Mapping[str, ScoreHistogram]
    states: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @property
    def weights(self) -> dict[str, int]:
        """Of each projection."""
        return {name: gate.in_features * gate.out_features for name, gate in self.gates.items()}

    def skip(self, name: str, fraction: float) -> None:
        """Let a projection skip this fraction of its inputs from now on; its low-rank term stands in for them."""
        self.gates[name].set_threshold(self.histograms[name].quantile(fraction), min(fraction, GRID[-1]))

    def error(self) -> float:
        """The squared distance of what the layer makes now from what the dense layer does."""
        return sum(float(distance.sum()) for distance, _ in self._distances())

    def part_lost(self) -> float:
        """The same of each token as a part of the square of what the dense layer makes of it; the sum over the tokens."""
        return sum(
            float((distance / dense.double().square().sum(-1).clamp_min(TINY)).sum())
            for distance, dense in self._distances()
        )

    def _distances(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each batch, the squared distance by token [B, S], float64, and the dense output."""
        for number, (hidden, dense) in enumerate(zip(self.states, self.outputs, strict=True)):
            yield (self.run(hidden, number) - dense).double().square().sum(-1), dense


@dataclass(frozen=True)
class Answer:
    """What a projection made of an input.

    Attributes:
        x, y: the input and the output.
        before, after: how often either had been written to.
    """

    x: Tensor
    y: Tensor
    before: int
    after: int

    def fits(self, x: Tensor) -> bool:
        """Whether it is the answer to this input, and nothing has written into it since."""
        return (self.x._version, self.y._version) == (self.before, self.after) and torch.equal(self.x, x)


def dense_layer(
    run: Callable[[Tensor, int], Tensor], gates: Mapping[str, WinaLinear], states: Sequence[Tensor]
) -> Layer:
    """A loaded layer, its gates opened: the thresholds of its projections are lost.

    Args:
        run: the loaded layer, as for `Layer`.
        gates: its gated projections by name.
        states: the hidden states of the dense model before the layer.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    for gate in gates.values():
        gate.set_threshold(0.0)
    with counting(gates) as histograms:
        outputs = [run(hidden, number) for number, hidden in enumerate(states)]
    return Layer(run, gates, histograms, states, outputs)


@contextmanager
def remembering(layer: Layer) -> Iterator[Layer]:
    """A layer whose projections do not compute again what they do in the dense layer.

    One that skips nothing, and is given what it is given there, answers what it does there: those in front of the one that
    skips, and those beside it. The outputs are the same to the last bit.

    Args:
        layer: dense until the with-block begins.
    """
    known: dict[tuple[str, int], Answer] = {}  # by projection and batch
    current, learning = 0, True

    def run(hidden: Tensor, number: int) -> Tensor:
        nonlocal current
        current = number
        return layer.run(hidden, number)

    def answering(name: str, gate: WinaLinear) -> Callable[[Tensor], Tensor]:
        compute = gate.forward

        def forward(x: Tensor) -> Tensor:
            answer = known.get((name, current))
            if gate.sparsity == 0 and answer is not None and answer.fits(x):
                return answer.y
            y = compute(x)
            if learning:
                known[name, current] = Answer(x, y, x._version, y._version)
            return y

        return forward

    for name, gate in layer.gates.items():
        vars(gate)["forward"] = answering(name, gate)
    try:
        for number, hidden in enumerate(layer.states):
            run(hidden, number)
        learning = False
        yield replace(layer, run=run)
    finally:
        for gate in layer.gates.values():
            del vars(gate)["forward"]
