"""What a plan amounts to: the bytes a token reads, the disk a conversion takes and the time it is expected to."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from ..fitting.calibrate import FEWEST, PILOT
from ..fitting.thresholds import levels
from ..format.experts import shares, split_expert
from ..format.folder import sidecars
from ..format.names import WEIGHT
from ..models.source import Source
from ..models.text import HELD_OUT
from ..runtime.kernels import gated_linear
from .plan import ConversionPlan
from .search import search_sequences
from .tuning import TuningPlan
from .turn import Turn, basis_sequences

# What a dry run assumes to tell the time; the products, most of the work on a large model, it measures.
DISK_RATE = 5e8  # bytes a second
SCORE_RATE = 1e8  # activations counted a second
CALL_SECONDS = 3e-3  # a decoder layer's overhead for a sequence


def shape_report(plan: ConversionPlan, sparsity: float) -> dict[str, Any]:
    """The part of a report that the plan alone decides."""
    return {
        "layers": plan.n_layers,
        "bytes_per_token": {"dense": plan.dense_bytes_per_token, "gated": plan.bytes_per_token(sparsity)},
        "disk_bytes": plan.disk_bytes,
        "projections": {
            projection.name: {"in_features": projection.in_features, "out_features": projection.out_features}
            for projection in plan.projections
        },
    }


def head_report(source: Source, plan: ConversionPlan) -> dict[str, Any]:
    """Where the head is gated, the part of a report on it: the bytes by which the folder grows because it was tied.

    Args:
        source: with a head of its own (`models.tensors.with_own_head`).
        plan: of the conversion.
    """
    head = plan.projections[-1]
    if head.layer is not None:
        return {}
    copied = source.tensors[f"{head.key}.{WEIGHT}"].stored in source.tensors
    return {"head": {"copied_bytes": head.nbytes if copied else 0}}


def experts_report(plan: ConversionPlan, few: Sequence[str]) -> dict[str, Any]:
    """Of a mixture, the part of a report on its experts.

    Args:
        plan: of the conversion.
        few: the projections of experts that were given too few tokens for thresholds of their own.
    """
    places = [split_expert(one.name) for one in plan.projections]
    gated, pooled = (
        {f"{place[0]}.{place[1]}" for place in found if place} for found in (places, map(split_expert, few))
    )
    if not gated:
        return {}
    return {"experts": {"gated": len(gated), "fewest_tokens": FEWEST, "pooled": sorted(pooled)}}


def disk_bytes(
    source: Source,
    plan: ConversionPlan,
    turn: Turn | None,
    tuning: TuningPlan | None,
    sparsity: float,
    samples: int,
    length: int,
) -> int:
    """What a conversion needs: the checkpoint, the files beside it, and two snapshots for `resume`.

    A snapshot holds hidden states, the basis and what tuning learns.
    """
    states = len(levels(sparsity)) * samples * length * plan.features * plan.dtype.itemsize
    beside = sum((source.path / path).stat().st_size for path in sidecars(source.path))
    learned = tuning.stored_bytes + 2 * tuning.snapshot_bytes if tuning else 0
    return plan.disk_bytes + beside + 2 * (states + (turn.basis_bytes if turn else 0)) + learned


def plan_report(
    source: Source,
    plan: ConversionPlan,
    turn: Turn | None,
    tuning: TuningPlan | None,
    sparsity: float,
    calibration: dict[str, Any],
    device: torch.device,
    unused: Sequence[str] = (),
) -> dict[str, Any]:
    """What a dry run tells: what would be gated and what left out, bytes a token before and after, time and disk."""
    samples, length = calibration["samples"], calibration["seq_len"]
    calibrated = len(levels(sparsity)) * (samples + min(-(-PILOT // length), samples))
    passes = (
        calibrated + 3 * HELD_OUT + (basis_sequences(samples, length) if turn else 0) + search_sequences(plan)
    )  # sequences that go through a layer
    met = shares(source.config, source.tensors)
    layer_weights = round(sum(met[key] * spec.numel for key, spec in source.tensors.items()))
    layer_weights -= plan.embedding_bytes // plan.dtype.itemsize
    scored = calibrated * length * sum(projection.share * projection.in_features for projection in plan.projections)
    rate = product_rate(plan, length, device)
    seconds = (
        2 * layer_weights * length * passes / rate
        + scored / SCORE_RATE
        + plan.n_layers * passes * CALL_SECONDS
        + (4 + (2 if turn else 0)) * plan.disk_bytes / DISK_RATE  # read, written, both read again; read for a basis
        + (turn.effort.operations if turn and turn.effort else 0) / rate
    )
    shapes = shape_report(plan, sparsity)
    if tuning and not tuning.reason:
        seconds += tuning.operations / rate
        shapes["disk_bytes"] += tuning.stored_bytes
    return {
        "source": source.told(),
        "sparsity": sparsity,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(device),
        "calibration": calibration,
        "basis": turn.shown() if turn else {"kind": "none"},
        **({"tuning": tuning.shown()} if tuning else {}),
        **shapes,
        **head_report(source, plan),
        "stays_dense": dict(plan.family.dense),
        "unused": list(unused),
        "seconds": round(seconds, 1),
    }


def product_rate(plan: ConversionPlan, length: int, device: torch.device, seconds: float = 0.2) -> float:
    """Measured FLOP a second of a gated product like the model's, for the time a dry run expects."""
    widest = max(plan.projections, key=lambda projection: projection.weights)
    x = torch.ones(length, widest.in_features, dtype=plan.dtype, device=device)
    weight_t = torch.ones(widest.in_features, min(widest.out_features, 4096), dtype=plan.dtype, device=device)
    tau = torch.zeros(widest.in_features, dtype=torch.float32, device=device)
    gated_linear(x, weight_t, tau, None).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        gated_linear(x, weight_t, tau, None).sum().item()
        count += 1
    return count * 2 * length * weight_t.numel() / (time.perf_counter() - start)
