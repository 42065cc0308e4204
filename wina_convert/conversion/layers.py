"""Calibrates and writes a model one decoder layer after another, and goes on where an interrupted conversion stopped."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..fitting.calibrate import States, calibrate_layer
from ..fitting.thresholds import threshold_curve
from ..format.config import WinaConfig
from ..format.grid import GRID
from ..format.names import THRESHOLDS
from ..format.shard_writer import TensorSink
from ..format.shards import sentinel
from ..format.staging import Staging
from ..models.measure import POSITIONS
from ..models.source import Source
from ..models.stream import StreamedModel, gated_stream
from ..progress import Progress, grouped
from ..runtime.linear import gated_modules
from . import plot as pictures
from .plan import ConversionPlan
from .weights import stored_tensors


def stream_of(source: Source, plan: ConversionPlan, config: WinaConfig, device: torch.device) -> StreamedModel:
    """The gated model that a conversion makes, its tensors made when they are read; it has no thresholds yet."""

    def read(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in dict.fromkeys(plan.origin[key] for key in keys):
            yield from stored_tensors(source, plan.steps, [key], device).items()

    return gated_stream(source, config, plan.dtype, plan.tensors, read, device)


def write_layers(
    source: Source,
    plan: ConversionPlan,
    config: WinaConfig,
    tokens: Tensor,
    at_a_time: int,
    device: torch.device,
    shards: TensorSink,
    staging: Staging,
    carried: Mapping[str, Tensor],
    progress: Progress,
    plot: bool,
) -> tuple[dict[str, pictures.ScoreCurve], list[str]]:
    """Calibrate and write the model layer by layer, from the snapshot on where there is one.

    A snapshot holds `carried` as well, what was found before the layers.

    Returns:
        the distribution of scores of every projection near the default sparsity, where `plot` asks for it; and the projections
        of experts that were given too few tokens for thresholds of their own.
    """

    model = stream_of(source, plan, config, device)
    keys_of = {projection.name: projection.key for projection in plan.projections}
    by_layer = [model.layer_keys(index) for index in range(plan.n_layers)]
    head_gated = plan.projections[-1].layer is None
    steps = plan.n_layers + head_gated
    inside = {plan.origin[key] for keys in by_layer for key in keys}
    outside = [key for key in source.tensors if key not in inside]
    kept: dict[str, pictures.ScoreCurve] = {}
    few: set[str] = set()
    sparsity = config.sparsity or 0.0
    shown = min(config.calibration["levels"], key=lambda level: abs(level - sparsity))
    embedded = model.embed(tokens.split(at_a_time))
    done = 0
    if staging.begun is None:
        with progress("Writing embeddings", sum(source.tensors[key].nbytes for key in outside), "B") as advance:
            for key in outside:
                shards.write(stored_tensors(source, plan.steps, [key], device))
                advance(source.tensors[key].nbytes)
            shards.write({plan.sentinel: sentinel()})
        states = {level: list(embedded) for level in config.calibration["levels"]}
    else:
        done = staging.begun.layers
        written = {plan.origin[key] for keys in by_layer[:done] for key in keys} | {*outside}
        late = {f"{one.key}.{THRESHOLDS}" for one in plan.projections if one.layer is None and done < steps}
        shards.skip(
            {plan.sentinel, *(name for name, key in plan.origin.items() if key in written and name not in late)}
        )
        states, kept, few = _restore(staging.begun.tensors, device)
    del embedded

    @contextmanager
    def loaded(index: int) -> Iterator[Callable[[Tensor, int], Tensor]]:
        """A decoder layer, written and in memory, or behind the last one the head, which is written already."""
        if index == plan.n_layers:
            with model.head() as logits:
                yield partial(_through_head, logits)
            return
        keys = by_layer[index]
        tensors = stored_tensors(source, plan.steps, dict.fromkeys(plan.origin[key] for key in keys), device)
        shards.write(tensors)
        curves = {
            key: torch.zeros(len(GRID), dtype=torch.float32, device="cpu")
            for key in keys
            if key.endswith(f".{THRESHOLDS}")
        }
        with model.layer(index, tensors | curves) as run:
            yield run

    saved, cost = time.monotonic(), 0.0
    with progress(f"Calibrating on {len(tokens)} sequences and writing", steps, "layer") as advance:
        advance(done)
        by_layer_done = grouped(advance, len(tokens) * len(config.calibration["levels"]))
        for index in range(done, steps):
            with loaded(index) as run:
                gates = {name: gate for name, gate in gated_modules(model.model).items() if not gate.weight_t.is_meta}
                histograms, pooled = calibrate_layer(run, gates, states, by_layer_done, plan.budget)
                few |= pooled
                for gate in gates.values():
                    gate.forget_threshold()
            for name, found in histograms.items():
                curve = threshold_curve(found, GRID, partial(plan.budget.asked, name))
                shards.write({f"{keys_of[name]}.{THRESHOLDS}": curve})
                if plot:
                    kept[name] = pictures.score_curve(found[shown], plan.budget.asked(name, sparsity))
            # A snapshot may take a second and a layer too: it may cost a twentieth of the time.
            now, last = time.monotonic(), index + 1 == steps
            if last or now - saved >= 20 * cost:
                shards.sync()
                staging.save(index + 1, {**carried, **_carried({} if last else states, kept, few)})
                saved = time.monotonic()
                cost = saved - now
    curves_of = {projection.name: kept[projection.name] for projection in plan.projections} if plot else {}
    return curves_of, [projection.name for projection in plan.projections if projection.name in few]


def _through_head(logits: Callable[[Tensor], Tensor], hidden: Tensor, number: int) -> Tensor:
    """Show the head hidden states [B, S, hidden], a few positions at a time, whose logits nobody needs."""
    for part in hidden.flatten(0, 1).split(POSITIONS):
        logits(part)
    return hidden


def _carried(states: States, kept: Mapping[str, pictures.ScoreCurve], few: Iterable[str]) -> dict[str, Tensor]:
    """What goes from layer to layer, as named tensors."""
    tensors = {f"states/{level}/{n}": batch for level, batches in states.items() for n, batch in enumerate(batches)}
    for name, curve in kept.items():
        tensors |= {f"scores/{name}": curve.scores, f"density/{name}": curve.density}
        tensors[f"threshold/{name}"] = torch.tensor(curve.threshold, dtype=torch.float64)
    return tensors | {f"few/{name}": torch.empty(0) for name in few}


def _restore(
    tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[States, dict[str, pictures.ScoreCurve], set[str]]:
    """The inverse of `_carried`."""
    states: dict[float, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("states/"):
            _, level, number = name.split("/")
            states.setdefault(float(level), {})[int(number)] = tensor.to(device)
    kept = {
        name.removeprefix("scores/"): pictures.ScoreCurve(
            tensor,
            tensors[name.replace("scores/", "density/", 1)],
            tensors[name.replace("scores/", "threshold/", 1)].item(),
        )
        for name, tensor in tensors.items()
        if name.startswith("scores/")
    }
    few = {name.removeprefix("few/") for name in tensors if name.startswith("few/")}
    return {level: [batches[n] for n in range(len(batches))] for level, batches in states.items()}, kept, few
