"""Learns the thresholds of one decoder layer after another, from hidden states that went through gated layers.

Thresholds fitted on the dense model's activations skip more than was asked once everything upstream is gated. So each level
of sparsity carries its own hidden states, and a layer is calibrated on what the gated layers before it let through. Within
the layer, a first pass over a few sequences with the gates open gives provisional thresholds; the second pass, gated at
those, makes the counts that the thresholds are solved from and the hidden states for the next layer.

An expert is calibrated on the tokens that it is given. One that is given too few takes the counts of all experts of its layer
together, for the same of its matrices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..errors import CalibrationError
from ..format.experts import of_any_expert, split_expert
from ..runtime.linear import WinaLinear, observing
from ..runtime.rule import scores
from .budget import UNIFORM, Budget
from .histogram import ScoreHistogram

PILOT = 2048  # tokens of the first pass: provisional thresholds skip what was asked to some tenths of a point
# Tokens that an expert must have been given. What one threshold skips differs by some points from token to token; over so many it
# is known to a point. All experts together may be unlike one, but never by chance.
FEWEST = 64

States = dict[float, list[Tensor]]  # level -> hidden states, a batch [B, S, hidden] each
Histograms = dict[float, ScoreHistogram]  # by level


def calibrate_layer(
    run: Callable[[Tensor, int], Tensor],
    gates: Mapping[str, WinaLinear],
    states: States,
    advance: Callable[[int], object],
    budget: Budget = UNIFORM,
) -> tuple[dict[str, Histograms], set[str]]:
    """Count the scores of a layer's gated projections and move the hidden states through it, in place.

    Args:
        run: the loaded layer, [B, S, hidden] and the number of the batch -> [B, S, hidden].
        gates: its gated projections by name, with weights and column norms.
        states: the hidden states before the layer, for each level; afterwards, those behind it.
        advance: told the number of sequences done.
        budget: the sparsity asked of each projection at a level.

    Returns:
        for each projection, the score histogram of each level; and the projections of experts that were given too few tokens
        at some level, whose histogram there is that of all experts.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    found: dict[str, Histograms] = {name: {} for name in gates}
    seen_little: set[str] = set()
    for level, batches in states.items():
        for gate in gates.values():
            gate.set_threshold(0.0)
        with counting(gates) as counted:
            for number, batch in _pilot(batches):
                run(batch, number)
        provisional = pooled(counted, gates)[0]
        for name, gate in gates.items():
            gate.set_threshold(provisional[name].quantile(budget.asked(name, level)), level)
        with counting(gates) as counts:
            for number, batch in enumerate(batches):
                batches[number] = run(batch, number)
                advance(len(batch))
        own, few = pooled(counts, gates)
        seen_little |= few
        for name, histogram in own.items():
            found[name][level] = histogram
    return found, seen_little


def pooled(
    counts: Mapping[str, ScoreHistogram], gates: Mapping[str, WinaLinear]
) -> tuple[dict[str, ScoreHistogram], set[str]]:
    """The counts of a layer's projections, where those of experts that were given too few tokens are replaced.

    Args:
        counts: by projection.
        gates: the projections themselves.

    Returns:
        the counts, and the names of those that were replaced by the sum over all experts.
    """
    few = {
        name
        for name, gate in gates.items()
        if split_expert(name) is not None and int(counts[name].counts.sum()) < FEWEST * gate.in_features
    }
    together: dict[str, ScoreHistogram] = {}
    wanted = {of_any_expert(name) for name in few}
    for name, gate in gates.items():
        if of_any_expert(name) in wanted:
            together.setdefault(of_any_expert(name), ScoreHistogram(gate.column_norms.device)).merge(counts[name])
    return {name: together[of_any_expert(name)] if name in few else counts[name] for name in gates}, few


def _pilot(batches: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """A few batches [B, S, hidden] from all over the text, as few as have PILOT tokens together, with their numbers."""
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    count = min(-(-PILOT * len(batches) // tokens), len(batches))
    for index in range(count):
        number = index * len(batches) // count
        yield number, batches[number]


@contextmanager
def counting(gates: Mapping[str, WinaLinear]) -> Iterator[dict[str, ScoreHistogram]]:
    """Count the scores of everything that enters the projections meanwhile."""
    counts = {name: ScoreHistogram(gate.column_norms.device) for name, gate in gates.items()}

    def count(name: str, gate: WinaLinear, x: Tensor) -> None:
        try:
            for row in x if x.dim() > 2 else x[None]:  # one sequence at a time bounds the temporaries
                counts[name].add(scores(row, gate.column_norms))
        except CalibrationError as error:
            raise CalibrationError(
                f"{error} in the input of {name}: the model overflows in this dtype; try --dtype float32"
            ) from error

    with observing(gates, count):
        yield counts
