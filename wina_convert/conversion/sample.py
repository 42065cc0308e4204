"""The sequences of a conversion: which part of it sees which part of the calibration text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.source import Source
from ..models.text import read_apart, read_sequences
from .files import digest
from .options import ConversionOptions
from .tuning import tuning_sequences
from .turn import basis_sequences


@dataclass(frozen=True)
class Sample:
    """Sequences of a calibration text in a model's tokens, int64, of which none is in two of the first three.

    Attributes:
        tokens: [at most as many as asked for, S]: thresholds are fitted on them.
        rest: [N, S]: learned from, where anything is.
        held_out: [at most 16, S]: the result is proved on them.
        shown: [N, S], of `tokens` and `rest`: the basis is found on them.
    """

    tokens: Tensor
    rest: Tensor
    held_out: Tensor
    shown: Tensor

    @property
    def all(self) -> Tensor:
        """Every sequence that a conversion looks at, [N, S]."""
        return torch.cat([self.tokens, self.rest, self.held_out])

    def digests(self, tuning: bool) -> dict[str, str]:
        """What a resumed conversion must find again, beside `tokens`."""
        found = {"basis_sha256": digest(self.shown), "held_out_sha256": digest(self.held_out)}
        return found | ({"tuning_sha256": digest(self.rest)} if tuning else {})


def read_sample(source: Source, asked: ConversionOptions, length: int, turned: bool, tuning: bool) -> Sample:
    """Read the calibration text.

    Args:
        source: whose tokenizer.
        asked: of the conversion.
        length: tokens of a sequence.
        turned: whether a basis is found; then thresholds are fitted on stretches of the text of their own.
        tuning: whether anything is learned.

    Raises:
        CalibrationError: the text cannot be read or is too short, or the tokenizer is another model's.
        SourceError: the model has no tokenizer.
    """
    for_basis = basis_sequences(asked.samples, length) if turned else 0
    others = max(for_basis, tuning_sequences(length) if tuning else 0)
    if turned:
        tokens, rest, held_out = read_apart(source, asked.calibration, length, asked.samples, others, asked.seed)
    else:
        seen, held_out = read_sequences(source, asked.calibration, length, asked.samples + others, asked.seed)
        tokens, rest = seen[: asked.samples], seen[asked.samples :]
    shown = rest[:for_basis] if len(rest) >= len(tokens) else torch.cat([tokens, rest])
    return Sample(tokens, rest, held_out, shown)
