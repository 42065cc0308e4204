"""Tuning within a conversion: whether it fits, the model that it takes, what a snapshot keeps, and the plan that comes of it.

It comes before the layers are written, as a basis does: what it learned is a division of the sparsity, column weights and
biases, with which the layers are then calibrated like with any other.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..fitting import tune as learning
from ..fitting.schemes import LEARNED, Scheme
from ..fitting.student import Student
from ..fitting.tune import LEVELS, Texts, Tuned
from ..format.grid import GRID
from ..format.staging import Snapshot, Staging
from ..models.source import Source
from ..models.stream import dense_stream
from ..models.structure import Projection
from ..progress import Progress, note
from .plan import ConversionPlan, lay_out
from .weights import steps_of

DONE, GOING = "tuned/", "tuning/"  # before the names of its tensors in a snapshot, when it is done and while it goes on
TOKENS = 1 << 18  # of the text to learn from, where there is so much
FITTED, JUDGED = 1 << 12, 1 << 13  # tokens of the texts that thresholds are set on and that decide
FEWEST = 8  # sequences beside those that thresholds are fitted on
ROOM = 0.8  # of the free memory that it may take


@dataclass(frozen=True)
class TuningPlan:
    """What tuning will take.

    Attributes:
        nbytes: of memory.
        checkpointed: whether every layer is computed again for its gradient, because otherwise memory does not suffice.
        reason: why it will not be done; empty: it will.
        stored_bytes: of the biases in the checkpoint.
        snapshot_bytes: of what a snapshot holds of it.
        operations: of its products.
    """

    nbytes: int
    checkpointed: bool
    reason: str
    stored_bytes: int
    snapshot_bytes: int
    operations: float

    def shown(self) -> dict[str, Any]:
        """What a dry run says of it."""
        how = {"kept": None, "gradient_checkpointing": self.checkpointed, "memory_bytes": self.nbytes}
        return {"kept": False, "reason": self.reason} if self.reason else how


@dataclass(frozen=True)
class Tuning:
    """What tuning came to.

    Attributes:
        tuned: what was learned; None: the untuned thresholds stay.
        report: what is said of it, as JSON.
    """

    tuned: Tuned | None
    report: dict[str, Any]


def plan_tuning(source: Source, plan: ConversionPlan, length: int, device: torch.device) -> TuningPlan:
    """Decide from the headers alone whether the model with its gradients fits the memory that is free now.

    Args:
        source: the model.
        plan: of its conversion without tuning.
        length: tokens of a sequence.
        device: what it will be learned on.
    """
    weights = sum(spec.numel for spec in source.tensors.values())
    rows = max(1, learning.LEVEL_TOKENS // length) * length
    by_layer: dict[int | None, int] = {}
    for one in plan.projections:
        by_layer[one.layer] = by_layer.get(one.layer, 0) + 3 * (one.in_features + one.out_features)
    logits = 8 * int(source.text_config.get("vocab_size", 0))
    fixed = weights * _dtype(plan, device).itemsize + 4 * rows * logits
    whole = fixed + 4 * rows * sum(by_layer.values())
    sparing = fixed + 4 * rows * (max(by_layer.values()) + plan.n_layers * plan.hidden_size)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    outputs = sum(one.out_features for one in plan.projections)
    inputs = sum(one.in_features for one in plan.projections)
    checkpointed = whole > ROOM * free
    nbytes = sparing if checkpointed else whole
    reason = (
        ""
        if nbytes <= ROOM * free
        else f"learning takes {nbytes / 1e9:.1f} GB, which the {device.type} does not have free"
    )
    if any(one.share < 1 for one in plan.projections):
        reason = "thresholds of experts are not learned yet"
    looks = learning.STEPS // learning.LOOK * (3 * FITTED + JUDGED)
    return TuningPlan(
        nbytes=nbytes,
        checkpointed=checkpointed,
        reason=reason,
        stored_bytes=4 * len(GRID) * outputs,
        snapshot_bytes=4 * (4 + 1) * (len(LEVELS) * outputs + inputs),
        operations=2.0 * weights * len(LEVELS) * (learning.STEPS * rows * (4 if checkpointed else 3) + looks),
    )


def tuning_sequences(length: int) -> int:
    """How many sequences of a length are learned from and judged, where the text has so many."""
    return (TOKENS + JUDGED) // length


def tune_source(
    source: Source,
    plan: ConversionPlan,
    planned: TuningPlan,
    tokens: Tensor,
    rest: Tensor,
    device: torch.device,
    seed: int,
    staging: Staging,
    carried: Mapping[str, Tensor],
    progress: Progress,
) -> Tuning:
    """Learn on the whole model in memory, or take up what a snapshot has of it.

    Args:
        source: the model, in its basis.
        plan: of its conversion without tuning.
        planned: what tuning takes.
        tokens: [N, S], int64, the text that thresholds will be fitted on; nothing is learned from it.
        rest: [M, S], other text.
        device: to learn on.
        seed: of the order of the text.
        staging: where a snapshot goes.
        carried: what else a snapshot holds.
        progress: how to report it.
    """
    if found := restored_tuning(staging.snapshot):
        return found
    if planned.reason or len(rest) < FEWEST:
        few = f"the calibration text has {len(rest)} sequences beside those that thresholds are fitted on, of {FEWEST} needed"
        return Tuning(None, {"kept": False, "reason": planned.reason or few})
    length = tokens.shape[1]
    judged = min(max(2, JUDGED // length), len(rest) // 4)
    texts = Texts(*(part.to(device) for part in (rest[judged:], tokens[: max(2, FITTED // length)], rest[:judged])))

    def save(state: learning.State) -> None:
        staging.save(0, {**carried, **{GOING + name: tensor for name, tensor in state.items()}})

    with (
        _student(source, plan, planned.checkpointed, device) as student,
        progress("Tuning", learning.STEPS, "step") as advance,
    ):

        def told(steps: int, loss: float) -> None:
            if loss == loss:  # NaN before the first step
                note(advance, f"loss {loss:.4f}")
            advance(steps)

        state = _part(staging.snapshot, GOING) or None
        tuned = learning.tune(student, plan.budget, texts, seed, state, save, told)
    said = {
        "levels": list(LEVELS),
        "kl_before": list(tuned.before),
        "kl_after": list(tuned.after),
        "steps": tuned.steps,
    }
    if tuned.better:
        return Tuning(tuned, {"kept": True, **said})
    return Tuning(
        None, {"kept": False, "reason": "nothing that was learned was as good as untuned at every level", **said}
    )


def tuned_plan(source: Source, plan: ConversionPlan, tuned: Tuned) -> ConversionPlan:
    """The plan with what was learned in the place of scheme and allocation, and with biases."""
    scheme = Scheme(LEARNED.name, lambda name, weight_t: tuned.columns[name], recomputed=False)
    biases = {projection.name: tuned.bias_table(projection.name) for projection in plan.projections}
    steps = steps_of(plan.projections, scheme, plan.dtype if plan.cast else None, biases)
    tensors, origin = lay_out(source, steps, plan.projections)
    budget = tuned.budget(biases)
    return replace(plan, scheme=scheme, budget=budget, steps=steps, tensors=tensors, origin=origin)


def carried_tuning(tuning: Tuning) -> dict[str, Tensor]:
    """What a snapshot holds of a tuning that is done."""
    text = bytearray(json.dumps(tuning.report).encode())
    tensors = {"report": torch.frombuffer(text, dtype=torch.uint8)}
    if tuning.tuned:
        for table, values in asdict(tuning.tuned).items():
            if isinstance(values, dict):
                tensors |= {f"{table}/{name}": tensor for name, tensor in values.items()}
    return {DONE + name: tensor for name, tensor in tensors.items()}


def restored_tuning(snapshot: Snapshot | None) -> Tuning | None:
    """The tuning that an interrupted conversion did; None where it is to be done."""
    tensors = _part(snapshot, DONE)
    if not tensors:
        return None
    report = json.loads(bytes(tensors.pop("report").tolist()))
    if not report["kept"]:
        return Tuning(None, report)
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        table, _, name = key.partition("/")
        tables.setdefault(table, {})[name] = tensor
    losses = tuple(report["kl_before"]), tuple(report["kl_after"])
    return Tuning(Tuned(tables["columns"], tables["biases"], tables["shares"], *losses, report["steps"]), report)


def _part(snapshot: Snapshot | None, prefix: str) -> dict[str, Tensor]:
    tensors = snapshot.tensors if snapshot else {}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _dtype(plan: ConversionPlan, device: torch.device) -> torch.dtype:
    """What is learned in: many processors multiply in half precision slowly."""
    return torch.float32 if device.type == "cpu" else plan.dtype


@contextmanager
def _student(source: Source, plan: ConversionPlan, checkpointed: bool, device: torch.device) -> Iterator[Student]:
    stream = dense_stream(source, _dtype(plan, device), device)
    with stream.whole() as model:
        if checkpointed:
            for layer in stream.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        columns = {one.name: _columns(one, plan.scheme, model, device) for one in plan.projections}
        yield Student(model, columns, {one.name: one.weights for one in plan.projections}, LEVELS)


def _columns(projection: Projection, scheme: Scheme, model: nn.Module, device: torch.device) -> Tensor:
    weight = model.get_submodule(projection.name).weight.detach()  # type: ignore[operator]
    weight_t = weight if projection.transposed_in_source else weight.t().contiguous()
    return scheme.column_weights(projection.name, weight_t).to(device)
