"""Which text a conversion saw, as fingerprints in its report, so that a measurement on the same text can be refused.

Windows of tokens are hashed and a fixed part of the hashes kept, chosen by value ("0 mod p" sampling; Schleimer, Wilkerson and
Aiken, Winnowing, SIGMOD 2003): the same passage gives the same fingerprints wherever its sequences begin.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..format.names import REPORT

SEEN = "seen"  # the field of the report
WINDOW = 16  # tokens
DISTINCT = 8  # different tokens that a window needs: rules and separators are alike everywhere
KEPT = 16  # one hash in so many
FACTOR = 6364136223846793005  # of the polynomial, modulo 2^64 (Knuth's for linear congruences)
ROWS = 1 << 17  # tokens handled at a time: bounds the temporaries at some 50 MB
SHARE = 0.05  # of a text's fingerprints from which on it counts as seen: licences and the like are in many texts


def fingerprints(tokens: Tensor) -> Tensor:
    """Fingerprints of sequences, [K] int64 within 32 bits, ascending and without repetition.

    Args:
        tokens: [N, S], int64; no window spans two sequences. S below WINDOW gives none.
    """
    length = tokens.shape[1]
    if length < WINDOW:
        return torch.empty(0, dtype=torch.int64)
    found: Tensor = torch.cat([_hashes(part) for part in tokens.split(max(1, ROWS // length))]).unique()
    return found


def _hashes(tokens: Tensor) -> Tensor:
    windows = tokens.unfold(1, WINDOW, 1).flatten(0, 1)
    windows = windows[(windows.sort(1).values.diff(dim=1) != 0).sum(1) + 1 >= DISTINCT]
    hashes = torch.zeros(len(windows), dtype=torch.int64)
    for column in windows.unbind(1):
        hashes = (hashes + column + 1) * FACTOR  # wraps around; the high bits are the well mixed ones
    return (hashes[(hashes >> 28) % KEPT == 0] >> 32) & 0xFFFFFFFF


def record(tokens: Tensor) -> str:
    """What a report holds of the text that a conversion saw, [N, S] int64."""
    return encode(fingerprints(tokens))


def encode(found: Tensor) -> str:
    """Fingerprints as text: base64 of little-endian 32-bit numbers."""
    return base64.b64encode(found.numpy().astype("<u4").tobytes()).decode()


def seen_text(folder: Path) -> Tensor | None:
    """What the conversion of a checkpoint saw, [K] int64; None where the folder does not tell.

    Raises:
        CheckpointError: its report has a record that cannot be read.
    """
    try:
        report = json.loads((folder / REPORT).read_bytes())
        text = report.get(SEEN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if text is None:
        return None
    try:
        return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<u4").astype(np.int64))
    except (binascii.Error, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / REPORT} has a record of the calibration text that cannot be read ({error}); get the checkpoint again"
        ) from error


def overlap(tokens: Tensor, seen: Tensor) -> float:
    """The share of a text's fingerprints that were seen; 0 where it has none.

    Args:
        tokens: [N, S], int64: the text.
        seen: [K], int64: fingerprints.
    """
    found = fingerprints(tokens)
    return int(torch.isin(found, seen).sum()) / max(1, len(found))


def refuse_seen(folder: Path, tokens: Tensor, texts: Sequence[str]) -> bool:
    """Refuse to measure a checkpoint on text that its conversion saw.

    Args:
        folder: the checkpoint.
        tokens: [N, S], int64: what it is to be measured on.
        texts: where they come from.

    Returns:
        whether the folder tells what the conversion saw.

    Raises:
        CalibrationError: it saw the text, or a part of it.
        CheckpointError: its record is damaged.
    """
    seen = seen_text(folder)
    if seen is not None and (share := overlap(tokens, seen)) >= SHARE:
        raise CalibrationError(
            f"{share:.0%} of {', '.join(texts)} was calibration text of {folder}, which flatters it; measure on other text"
        )
    return seen is not None
