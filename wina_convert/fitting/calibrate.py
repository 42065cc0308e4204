"""Learns the thresholds of one decoder layer after another, from hidden states that went through gated layers.

Thresholds fitted on the dense model's activations skip more than was asked once everything upstream is gated. So each level
of sparsity carries its own hidden states, and a layer is calibrated on what the gated layers before it let through. Within
the layer, a first pass over a few sequences with the gates open gives provisional thresholds; the second pass, gated at
those, makes the counts that the thresholds are solved from and the hidden states for the next layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .histogram import ScoreHistogram
from ..runtime.linear import WinaLinear
from ..runtime.rule import cutoffs, scores

PILOT = 8  # sequences of the first pass

States = dict[float, list[Tensor]]  # level -> hidden states, a batch [B, S, hidden] each
Histograms = dict[float, ScoreHistogram]  # by level


def calibrate_layer(
    run: Callable[[Tensor], Tensor], gates: Mapping[str, WinaLinear], states: States, advance: Callable[[int], object]
) -> dict[str, Histograms]:
    """Count the scores of a layer's gated projections and move the hidden states through it, in place.

    Args:
        run: the loaded layer, [B, S, hidden] -> [B, S, hidden].
        gates: its gated projections by name, with weights and column norms.
        states: the hidden states before the layer, for each level; afterwards, those behind it.
        advance: told the number of sequences done.

    Returns:
        for each projection, the score histogram of each level.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    found: dict[str, Histograms] = {name: {} for name in gates}
    for level, batches in states.items():
        for gate in gates.values():
            gate.tau = cutoffs(torch.zeros((), device=gate.column_norms.device), gate.column_norms)
        with _counting(gates) as provisional:
            for batch in _pilot(batches):
                run(batch)
        for name, gate in gates.items():
            threshold = torch.tensor(provisional[name].quantile(level), device=gate.column_norms.device)
            gate.tau = cutoffs(threshold, gate.column_norms)
        with _counting(gates) as counts:
            for number, batch in enumerate(batches):
                batches[number] = run(batch)
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
def _counting(gates: Mapping[str, WinaLinear]) -> Iterator[dict[str, ScoreHistogram]]:
    """Count the scores of everything that enters the projections meanwhile."""
    counts = {name: ScoreHistogram(gate.column_norms.device) for name, gate in gates.items()}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, WinaLinear)
            try:
                for row in inputs[0]:  # one sequence at a time bounds the temporaries
                    counts[name].add(scores(row, module.column_norms))
            except CalibrationError as error:
                raise CalibrationError(
                    f"{error} in the input of {name}: the model overflows in this dtype; try --dtype float32"
                ) from error

        return hook

    handles = [gate.register_forward_pre_hook(observe(name)) for name, gate in gates.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
