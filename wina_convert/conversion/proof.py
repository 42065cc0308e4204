"""The conversion's own proof: reads a written checkpoint back and holds it against the source, before anybody sees it.

`wina verify` is another thing: it holds a published folder against its own manifest, without the source.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VerificationError
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.shards import SLICE, read_rows
from ..models.measure import Measurement, measure
from ..models.source import Source
from ..models.stream import checkpoint_stream, dense_stream
from ..progress import Progress, grouped
from ..runtime.rule import overall
from .plan import ConversionPlan
from .weights import planned_headers, stored_tensors

TOLERANCE = 0.05  # how far the achieved sparsity may be from the asked one, overall
# Largest logit difference at sparsity 0, relative to the largest logit. The weights are the same bits; what remains is the
# rounding of a product with the transposed weight, which accumulates over layers.
PARITY = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was checked and measured.

    Attributes:
        tensors: tensors compared with the source, bit for bit.
        thresholds: of every gated projection at the default sparsity.
        parity: largest logit difference to the dense model at sparsity 0, relative to the largest logit (see `Measurement`).
        held_out: the gated model at its default sparsity on calibration text that no threshold was fitted on.
    """

    tensors: int
    thresholds: dict[str, float]
    parity: float
    held_out: Measurement

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def prove(
    source: Source,
    plan: ConversionPlan,
    folder: Path,
    held_out: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Progress,
    origin: Source | None = None,
) -> Proof:
    """Compare a written checkpoint with its source.

    Args:
        source: what was converted.
        plan: how.
        folder: the written checkpoint.
        held_out: [N, S], token ids that calibration did not see.
        device: to compute on.
        batch_size: sequences at a time.
        progress: how to report it.
        origin: the dense model to compare with, where `source` is it in another basis.

    Raises:
        VerificationError: a tensor is missing, extra or different, the logits differ at sparsity 0, or the sparsity achieved
            is not the one asked.
    """
    checkpoint = open_checkpoint(folder)
    with progress("Verifying tensors", len(source.tensors), "tensor") as advance:
        for key in source.tensors:
            _check_tensor(source, plan, checkpoint, key, device)
            advance(1)
    expected = {spec.name: (spec.dtype, spec.shape) for spec in plan.tensors}
    found = {spec.name: (spec.dtype, spec.shape) for spec in checkpoint.folder.tensors.values()}
    if expected != found:
        name = min(name for name, _ in set(expected.items()) ^ set(found.items()))
        raise VerificationError(f"tensor {name!r} was not written as planned; please report this")
    at_default_sparsity = checkpoint.thresholds()
    asked = checkpoint.config.sparsity or 0.0
    gated, dense = checkpoint_stream(checkpoint, device), dense_stream(origin or source, plan.dtype, device)
    with progress(f"Verifying outputs on {len(held_out)} sequences", plan.n_layers, "layer") as advance:
        by_layer = grouped(advance, len(held_out) * 3)  # dense, and gated at two sparsities
        parity, at_default = measure(
            gated, held_out, (0.0, asked), dense, batch_size, same_head=origin is None, advance=by_layer
        )
    if parity.logit_error is None or not parity.logit_error <= PARITY[plan.dtype]:
        raise VerificationError(
            f"at sparsity 0 the logits differ from the dense model's by {parity.logit_error:.2g} of their scale; "
            f"at most {PARITY[plan.dtype]} is rounding in {plan.dtype}; please report this"
        )
    # Inputs that are zero anyway (after a ReLU, say) are skipped at sparsity 0 already, and may be more than was asked.
    weights = {projection.name: projection.weights for projection in plan.projections}
    expected_sparsity = overall(
        {name: max(plan.budget.asked(name, asked), zeros) for name, zeros in parity.projections.items()}, weights
    )
    if abs(at_default.achieved - expected_sparsity) > TOLERANCE:
        raise VerificationError(
            f"expected were {expected_sparsity:.1%} of sparsity and achieved {at_default.achieved:.1%} on held-out text; "
            "calibrate on more text, or on text closer to the model's (--calibration, --samples); --basis none needs less"
        )
    return Proof(len(source.tensors), at_default_sparsity, parity.logit_error, at_default)


def _check_tensor(source: Source, plan: ConversionPlan, checkpoint: Checkpoint, key: str, device: torch.device) -> None:
    """What was written for one tensor of the source, bit for bit against what is made of it again."""
    written = checkpoint.folder.tensors
    names = [spec.name for spec in planned_headers(plan.steps, source.tensors[key])]
    if names != [key] or not source.is_stored(key):
        for name, tensor in stored_tensors(source, plan.steps, [key], device).items():
            read = dict(checkpoint.read([name]))[name]
            if not _same(tensor, read.to(device)):
                raise VerificationError(f"tensor {name!r} reads back differently; the disk or memory may be faulty")
        return
    if key not in written:
        raise VerificationError(f"tensor {key!r} of the source is missing from the checkpoint; please report this")
    # Copied but for its dtype: an embedding larger than a decoder layer goes by in slices.
    stored, ours = source.tensors[key], written[key]
    in_ours = SLICE * ours.dtype.itemsize // stored.dtype.itemsize  # as many rows, in whatever dtype
    rows = zip(read_rows(source.path, stored, SLICE), read_rows(checkpoint.folder.path, ours, in_ours), strict=True)
    for original, read in rows:
        if not _same(original.to(read.dtype), read):
            raise VerificationError(f"tensor {key!r} reads back differently; the disk or memory may be faulty")


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
