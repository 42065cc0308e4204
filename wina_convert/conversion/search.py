"""The allocations that are found on the model itself, a decoder layer at a time, before thresholds are fitted."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..fitting import greedy, measured
from ..fitting.budget import SEARCHED, Budget
from ..fitting.layer import Shares, dense_layer
from ..format.config import WinaConfig
from ..format.grid import GRID
from ..format.staging import Snapshot
from ..models.source import Source
from ..progress import Progress
from ..runtime.linear import gated_modules
from .layers import stream_of
from .plan import ConversionPlan

SEQUENCES = 4  # of the calibration text that it runs on
CARRIED = "shares/"  # before the names in a snapshot
TOKENS = 512  # computed at a time where sequences are short
PASSES = {"measured": measured.passes, "greedy": greedy.passes}


def searched(
    plan: ConversionPlan,
    source: Source,
    config: WinaConfig,
    tokens: Tensor,
    at_a_time: int,
    device: torch.device,
    snapshot: Snapshot | None,
    progress: Progress,
) -> ConversionPlan:
    """The plan with the shares that a search finds, where its allocation is a searched one; a snapshot has them already.

    Args:
        plan: of the conversion.
        source: what is converted, in its basis.
        config: what the checkpoint will say.
        tokens: [N, S], int64: the calibration text; the first few sequences are used.
        at_a_time: sequences.
        device: to compute on.
        snapshot: of an interrupted conversion.
        progress: how to report it.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    if plan.budget.allocation not in SEARCHED:
        return plan
    if snapshot is not None:
        found = {name: tuple(row.tolist()) for name, row in snapshot.tensors.items() if name.startswith(CARRIED)}
        return _with(plan, {name.removeprefix(CARRIED): row for name, row in found.items()})
    together = max(at_a_time, TOKENS // tokens.shape[1])
    model = stream_of(source, plan, config, device)
    states, shares, errors = model.embed(tokens[:SEQUENCES].split(together)), Shares(), dict[str, list[float]]()
    with progress("Searching the allocation", plan.n_layers, "layer") as advance:
        for index in range(plan.n_layers):
            with model.layer(index) as run:
                gates = {name: gate for name, gate in gated_modules(model.model).items() if not gate.weight_t.is_meta}
                layer = dense_layer(run, gates, states)
                if plan.budget.allocation == "measured":
                    errors |= measured.errors(layer)
                elif gates:
                    shares |= greedy.divide(layer, plan.hidden_size)
                states = list(layer.outputs)
                for gate in gates.values():
                    gate.forget_threshold()
            advance(1)
    if errors:
        weights = {one.name: one.weights for one in plan.projections}
        shares = measured.halfway(measured.least(errors, weights), plan.budget.shares)
    return _with(plan, shares)


def _with(plan: ConversionPlan, shares: Mapping[str, tuple[float, ...]]) -> ConversionPlan:
    in_order = {one.name: shares.get(one.name, tuple(GRID)) for one in plan.projections}  # the head is in no layer
    return replace(plan, budget=Budget(plan.budget.allocation, in_order))


def carried_shares(plan: ConversionPlan) -> dict[str, Tensor]:
    """What a snapshot holds of a search."""
    if plan.budget.allocation not in SEARCHED:
        return {}
    return {CARRIED + name: torch.tensor(row, dtype=torch.float64) for name, row in plan.budget.shares.items()}


def search_sequences(plan: ConversionPlan) -> int:
    """About how many sequences a search sends through each decoder layer."""
    if plan.budget.allocation not in SEARCHED:
        return 0
    layers: dict[int, list[int]] = {}
    for one in plan.projections:
        if one.layer is not None:
            layers.setdefault(one.layer, []).append(one.weights)
    passes = PASSES[plan.budget.allocation]
    return SEQUENCES * sum(1 + passes(weights, plan.hidden_size) for weights in layers.values()) // plan.n_layers
