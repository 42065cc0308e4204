"""Learns the thresholds of one decoder layer after another, from hidden states that went through gated layers.

Thresholds fitted on the dense model's activations skip more than was asked once everything upstream is gated. So each level
of sparsity carries its own hidden states, and a layer is calibrated on what the gated layers before it let through. Within
the layer, a first pass over a few sequences with the gates open gives provisional thresholds; the second pass, gated at
those, makes the counts that the thresholds are solved from and the hidden states for the next layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..errors import CalibrationError
from ..runtime.linear import WinaLinear, observing
from ..runtime.rule import scores
from .budget import UNIFORM, Budget
from .histogram import ScoreHistogram

PILOT = 8  # sequences of the first pass

States = dict[float, list[Tensor]]  # level -> hidden states, a batch [B, S, hidden] each
Histograms = dict[float, ScoreHistogram]  # by level


def calibrate_layer(
    run: Callable[[Tensor, int], Tensor],
    gates: Mapping[str, WinaLinear],
    states: States,
    advance: Callable[[int], object],
    budget: Budget = UNIFORM,
) -> dict[str, Histograms]:
    """Count the scores of a layer's gated projections and move the hidden states through it, in place.

    Args:
        run: the loaded layer, [B, S, hidden] and the number of the batch -> [B, S, hidden].
        gates: its gated projections by name, with weights and column norms.
        states: the hidden states before the layer, for each level; afterwards, those behind it.
        advance: told the number of sequences done.
        budget: the sparsity asked of each projection at a level.

    Returns:
        for each projection, the score histogram of each level.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    found: dict[str, Histograms] = {name: {} for name in gates}
    for level, batches in states.items():
        for gate in gates.values():
            gate.set_threshold(0.0)
        with counting(gates) as provisional:
            for number, batch in enumerate(_pilot(batches)):
                run(batch, number)
        for name, gate in gates.items():
            gate.set_threshold(provisional[name].quantile(budget.asked(name, level)), level)
        with counting(gates) as counts:
            for number, batch in enumerate(batches):
                batches[number] = run(batch, number)
                advance(len(batch))
        for name, histogram in counts.items():
            found[name][level] = histogram
    return found


def _pilot(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The first few sequences, in batches as they are."""
    seen = 0
    for batch in batches:
        if seen < PILOT:
            seen += len(batch)
            yield batch


@contextmanager
def counting(gates: Mapping[str, WinaLinear]) -> Iterator[dict[str, ScoreHistogram]]:
    """Count the scores of everything that enters the projections meanwhile."""
    counts = {name: ScoreHistogram(gate.column_norms.device) for name, gate in gates.items()}

    def count(name: str, gate: WinaLinear, x: Tensor) -> None:
        try:
            for row in x:  # one sequence at a time bounds the temporaries
                counts[name].add(scores(row, gate.column_norms))
        except CalibrationError as error:
            raise CalibrationError(
                f"{error} in the input of {name}: the model overflows in this dtype; try --dtype float32"
            ) from error

    with observing(gates, count):
        yield counts
