"""The largest sparsity within a loss: PPL-p% sparsity (Sparsing Law, arXiv 2411.02335, section 3), found on held-out text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fitting.budget import kind_of
from ..format.checkpoint import open_checkpoint
from ..format.dtypes import compute_dtype
from ..models.measure import Measurement, measure
from ..models.source import Source
from ..models.stream import checkpoint_stream, dense_stream
from ..progress import Progress
from ..runtime.rule import overall
from .plan import ConversionPlan

ROUNDS = 3  # of measuring, each in the gap that the one before left
FIRST = (0.2, 0.4, 0.6, 0.8)
PARTS = 4  # that a later round divides the gap into


def largest_sparsity(rises: Callable[[Sequence[float]], Sequence[float]], percent: float, highest: float) -> float:
    """The largest sparsity at which, and at every smaller one measured, the perplexity rises by at most so many percent.

    A round measures a few sparsities at once, the later ones between the largest that was good and the smallest that was not;
    three find it to within 1.3 points.

    Args:
        rises: from sparsities to the rises of perplexity over dense, as parts of it.
        percent: above 0.
        highest: the largest sparsity to ask for.

    Returns:
        0 where no sparsity measured is good.
    """
    asked: Sequence[float] = (*(point for point in FIRST if point < highest), highest)
    good, bad = 0.0, None
    for _ in range(ROUNDS):
        for sparsity, rise in zip(asked, rises(asked), strict=True):
            if not rise <= percent / 100:  # a NaN is not good
                bad = sparsity
                break
            good = sparsity
        if bad is None:
            return good
        asked = [round(good + (bad - good) * part / PARTS, 4) for part in range(1, PARTS)]
    return good


def sparsity_within(
    source: Source,
    folder: Path,
    percent: float,
    held_out: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Progress,
) -> float:
    """The largest sparsity at which a written checkpoint's perplexity is at most so many percent above the dense model's.

    Args:
        source: the dense model.
        folder: the written checkpoint.
        percent: above 0.
        held_out: [N, S], token ids that calibration did not see.
        device: to compute on.
        batch_size: sequences at a time.
        progress: how to report it.
    """
    checkpoint = open_checkpoint(folder)
    reference: list[float] = []

    def rises(sparsities: Sequence[float]) -> list[float]:
        gated = checkpoint_stream(checkpoint, device)
        dense = None if reference else dense_stream(source, compute_dtype(checkpoint.folder), device)
        steps = len(gated.layers) * len(held_out) * (len(sparsities) + (dense is not None))
        with progress("Searching the sparsity", steps, "sequence") as advance:
            found = measure(gated, held_out, sparsities, dense, batch_size, advance=advance)
        reference.extend(one.dense_perplexity for one in found if one.dense_perplexity is not None)
        return [one.perplexity / reference[0] - 1 for one in found]

    return largest_sparsity(rises, percent, checkpoint.config.grid[-1])


def within_report(plan: ConversionPlan, percent: float | None, at: Measurement) -> dict[str, Any]:
    """What the search came to, for the report.

    Args:
        plan: of the conversion.
        percent: what was allowed; None: nothing was searched, and nothing is reported.
        at: the measurement at the sparsity that was found.
    """
    if percent is None:
        return {}
    weights = {one.name: one.weights for one in plan.projections}
    inside = {name: part for name, part in at.projections.items() if kind_of(name) in plan.family.mlp}
    return {
        "max_ppl_increase": {
            "allowed": percent,
            "increase": None if at.rise is None else 100 * at.rise,
            "sparsity": at.sparsity,
            "achieved": at.achieved,
            "achieved_feed_forward": overall(inside, weights) if inside else None,
        }
    }
