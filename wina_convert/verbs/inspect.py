"""`wina inspect`: what a checkpoint holds, from its headers, thresholds and report."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..defaults import torch_defaults
from ..fitting.budget import Budget, budget_of, kind_of
from ..format.checkpoint import open_checkpoint
from ..format.curve import threshold_at
from ..format.experts import shares, split_expert
from ..format.low_rank import low_rank_bytes
from ..format.names import REPORT, WEIGHT_T, split_layer
from ..format.shards import TensorSpec
from ..runtime.rule import bytes_read, overall


@dataclass(frozen=True)
class LayerSummary:
    """One decoder layer of a WINA checkpoint, or its head.

    Attributes:
        layer: its index; None: the head.
        nbytes: bytes of its gated weights.
        thresholds: at the default sparsity, by projection.
        achieved: fraction skipped on held-out text at conversion; None where there is no report for it.
        bytes_per_token: bytes of gated weights, cutoffs and low-rank terms that a token reads at the default sparsity; of
            experts, as many as it is given.
    """

    layer: int | None
    nbytes: int
    thresholds: dict[str, float]
    achieved: float | None
    bytes_per_token: int


@dataclass(frozen=True)
class Inspection:
    """A WINA checkpoint.

    Attributes:
        name: its folder.
        sparsity: its default.
        source: name of what was converted.
        scheme: how the scores were weighted.
        allocation: how the sparsity was divided among the projections.
        asked: the fraction asked of each kind of projection at the default sparsity, the mean of its layers.
        biases: whether biases along the sparsity are added.
        basis: the kind of basis that is folded into the weights; "none": the source's.
        layers: its layers with gated projections, and the head behind them where that is gated.
        measured_at: the sparsity at which `achieved` was measured; None without a report.
        other_bytes: bytes of everything that is not gated.
    """

    name: str
    sparsity: float
    source: str
    scheme: str
    allocation: str
    asked: dict[str, float]
    biases: bool
    basis: str
    layers: tuple[LayerSummary, ...]
    measured_at: float | None
    other_bytes: int


@torch_defaults()
def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Summarise a checkpoint; reads the thresholds and no weight.

    Raises:
        CheckpointError: it is not a WINA checkpoint, or does not tell how its sparsity is divided.
    """
    checkpoint = open_checkpoint(folder)
    config, specs = checkpoint.config, checkpoint.folder.tensors
    budget = budget_of(config)
    sparsity = config.sparsity or 0.0
    keys = checkpoint.gated_keys()
    held_out = _held_out(Path(folder), keys)
    curves, every = checkpoint.curves(), shares(checkpoint.folder.config, keys)
    by_layer: dict[int | None, dict[str, str]] = {}  # names by kind
    for name in keys:
        place = split_layer(name)
        layer, kind = place[1:] if place else (None, name)
        by_layer.setdefault(layer, {})[kind] = name
    layers = []
    for layer, kinds in sorted(by_layer.items(), key=lambda item: (item[0] is None, item[0])):
        names = list(kinds.values())
        weights = {name: specs[f"{keys[name]}.{WEIGHT_T}"] for name in names}
        met = {name: round(every[name] * spec.numel) for name, spec in weights.items()}
        seen = {name: held_out[1][name] for name in names if name in held_out[1]} if held_out else {}
        layers.append(
            LayerSummary(
                layer=layer,
                nbytes=sum(spec.nbytes for spec in weights.values()),
                thresholds={
                    kind: float(threshold_at(curves[name], config.grid, sparsity)) for kind, name in kinds.items()
                },
                achieved=overall(seen, met) if seen else None,
                bytes_per_token=round(
                    sum(
                        every[name]
                        * (
                            bytes_read(spec.nbytes, spec.shape[0], budget.asked(name, sparsity))
                            + (low_rank_bytes(specs, keys[name]) if sparsity > 0 else 0)
                        )
                        for name, spec in weights.items()
                    )
                ),
            )
        )
    gated = sum(summary.nbytes for summary in layers)
    return Inspection(
        name=str(folder),
        sparsity=sparsity,
        source=str(config.source.get("name", "unknown")),
        scheme=config.scheme,
        allocation=config.allocation,
        asked=_asked(budget, specs, keys, sparsity),
        biases=config.biases,
        basis=str(config.basis.get("kind", "unknown")),
        layers=tuple(layers),
        measured_at=held_out[0] if held_out else None,
        other_bytes=sum(spec.nbytes for spec in specs.values()) - gated,
    )


def _asked(
    budget: Budget, specs: Mapping[str, TensorSpec], keys: Mapping[str, str], sparsity: float
) -> dict[str, float]:
    """What is asked of each kind of projection, from checkpoint keys by name."""
    names: dict[str, list[str]] = {}
    for name in keys:
        names.setdefault(kind_of(name), []).append(name)
    weights = {name: specs[f"{key}.{WEIGHT_T}"].numel for name, key in keys.items()}
    return {kind: budget.overall({name: weights[name] for name in same}, sparsity) for kind, same in names.items()}


def _held_out(folder: Path, names: Iterable[str]) -> tuple[float, Mapping[str, float]] | None:
    """Sparsity and achieved fractions of the report, where the folder has one that can be read."""
    try:
        held_out = json.loads((folder / REPORT).read_text("utf-8"))["verification"]["held_out"]
        measured = {name: float(fraction) for name, fraction in held_out["projections"].items()}
        missing = [name for name in names if name not in measured and split_expert(name) is None]
        return None if missing else (float(held_out["sparsity"]), measured)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
