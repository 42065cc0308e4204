"""How text is cut for a measurement: perplexities compare only where block length, BOS and stride are the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, OptionError
from ..format.folder import Folder
from .text import context_of, prefix, sequence_length, sequences

PROTOCOLS = ("wikitext",)
SAMPLES = 64
BLOCK = 2048  # of the perplexities on WikiText-2 that papers print


@dataclass(frozen=True)
class Protocol:
    """How a text was cut.

    Attributes:
        name: "wikitext", or "samples" for sequences spread over the text.
        block: tokens of a sequence; each but the first is predicted.
        stride: tokens from the start of one to that of the next; None where they are spread.
        bos: where the tokenizer's beginning of a text stands: "each block", "the first block" or "nowhere".
        blocks: how many sequences are measured.
    """

    name: str
    block: int
    stride: int | None
    bos: str
    blocks: int

    def shown(self) -> str:
        """In words."""
        stride = "spread evenly" if self.stride is None else f"stride {self.stride}, no overlap"
        return (
            f"protocol {self.name}: {self.blocks} blocks of {self.block} tokens, {stride}, BOS in {self.bos}".replace(
                "in nowhere", "nowhere"
            )
        )


def cut(
    texts: Mapping[str, Iterable[str]],
    tokenizer: Any,
    folder: Folder,
    protocol: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, Protocol]:
    """The sequences to measure on, [N, S] int64, and how they were cut.

    Args:
        texts: the documents of each text, by what to name in an error.
        tokenizer: of the model.
        folder: the model, for its context.
        protocol: "wikitext": the whole text, joined by blank lines, in blocks of 2,048 tokens (the context where that is
            shorter) without overlap, with BOS at its very start alone, as papers have it; the last, shorter block is left out.
            None: sequences spread evenly over each text, as many from each, and each with BOS.
        samples: how many of these; None: 64.
        seq_len: their length; None: see `text.sequence_length`.

    Raises:
        OptionError: an option cannot be used, or not with the protocol.
        CalibrationError: the text is too short.
    """
    before = prefix(tokenizer)
    if protocol is None:
        samples = SAMPLES if samples is None else samples
        length = sequence_length(folder, seq_len)
        each = -(-samples // len(texts))
        parts = [
            _spread(sequences(text, tokenizer, length, each, where), min(each, samples - each * number))
            for number, (where, text) in enumerate(texts.items())
            if samples > each * number
        ]
        tokens = torch.cat(parts)
        return tokens, Protocol("samples", length, None, "each block" if before else "nowhere", len(tokens))
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol is {protocol!r}; give one of {', '.join(PROTOCOLS)}")
    if samples is not None or seq_len is not None:
        raise OptionError(f"--protocol {protocol} says which blocks to take; leave out --samples and --seq-len")
    length = min(BLOCK, context_of(folder))
    ids = (
        before
        + tokenizer("\n\n".join(chain.from_iterable(texts.values())), add_special_tokens=False, verbose=False).input_ids
    )
    blocks = len(ids) // length
    if not blocks:
        raise CalibrationError(
            f"{', '.join(texts)} has {len(ids)} tokens; a block of {protocol} has {length}: give more text"
        )
    tokens = torch.tensor(ids[: blocks * length], dtype=torch.int64).view(blocks, length)
    return tokens, Protocol(protocol, length, length, "the first block" if before else "nowhere", blocks)


def _spread(packed: Tensor, count: int) -> Tensor:
    """So many of the sequences [N, S], or all of them, evenly."""
    return packed[torch.linspace(0, len(packed) - 1, min(count, len(packed)), dtype=torch.float32).long()]
