"""Counts of scores, from which any threshold is solved without a second pass over the model."""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError

BINS = 1 << 15  # one for every non-negative bfloat16, infinity and NaN included
INFINITY_BIN = 0x7F80
UPPER = int(sys.byteorder == "little")  # which half of a float32 is a bfloat16
CHUNK = 1 << 22  # scores handled at a time: bounds the temporaries at 64 MB


class ScoreHistogram:
    """How many scores fell on each non-negative bfloat16 value (float32 scores are truncated to find their bin).

    The bins are fixed, at most 0.8% wide and hold integers, so histograms of several processes or batches add up to the
    same counts in any order.

    Attributes:
        counts: [BINS], int64.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, scores: Tensor) -> None:
        """Count scores, [...], float32, at least 0.

        Raises:
            CalibrationError: a score is NaN or infinite.
        """
        for chunk in scores.flatten().split(CHUNK):
            bins = chunk.contiguous().view(torch.int16)[UPPER::2] & (BINS - 1)  # a NaN may carry a sign
            self.counts += torch.bincount(bins, minlength=BINS)
        if self.counts[INFINITY_BIN:].any():
            raise CalibrationError("an activation is NaN or infinite")

    def merge(self, other: "ScoreHistogram") -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts

    def quantile(self, sparsity: float) -> float:
        """The threshold that skips this fraction of the counted scores, interpolated within a bin.

        Scores of exactly 0 are skipped at threshold 0; where they alone reach the sparsity, the answer is 0.
        """
        return self.quantiles([sparsity])[0]

    def quantiles(self, sparsities: Sequence[float]) -> list[float]:
        """The same for several fractions, in one pass over the counts."""
        counts, cumulative = self.counts.cpu().numpy(), self.counts.cumsum(0).double().cpu().numpy()
        targets = np.asarray(sparsities) * cumulative[-1]
        bins = np.searchsorted(cumulative, targets)
        low, high = bin_edges(bins)
        before, inside = cumulative[bins - 1], np.maximum(counts[bins], 1)
        found: list[float] = np.where(bins == 0, 0.0, low + (high - low) * (targets - before) / inside).tolist()
        return found

    def density(self, group: int = 16) -> tuple[Tensor, Tensor]:
        """The distribution of the positive scores, for pictures.

        Args:
            group: bins taken together; 128 bins are a factor of 2.

        Returns:
            centres of the groups that hold any score and the fraction of scores per factor of 2 there, [G] float64 each.
        """
        edges = (torch.arange(0, INFINITY_BIN + 1, group, dtype=torch.int32) << 16).view(torch.float32).double()
        counts = self.counts[:INFINITY_BIN].cpu().view(-1, group).sum(1).double()
        seen = (counts > 0) & (edges[:-1] > 0)
        low, high = edges[:-1][seen], edges[1:][seen]
        return (low * high).sqrt(), counts[seen] / counts.sum() / (high / low).log2()


def bin_edges(bins: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Smallest and next-after-largest score of bins: [2, ...]."""
    edges = (np.array([bins, np.add(bins, 1)], dtype=np.uint32) << 16).view(np.float32)
    return np.minimum(edges, np.finfo(np.float32).max).astype(np.float64)
