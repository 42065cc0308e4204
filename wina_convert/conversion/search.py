"""The allocation that is searched on the model itself, a decoder layer at a time, before thresholds are fitted."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..fitting.budget import SEARCHED, Budget
from ..fitting.greedy import Shares, divide_layer, moves_of
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
    model = stream_of(source, plan, config, device)
    states, shares = model.embed(tokens[:SEQUENCES].split(at_a_time)), Shares()
    with progress("Searching the allocation", plan.n_layers, "layer") as advance:
        for index in range(plan.n_layers):
            with model.layer(index) as run:
                gates = {name: gate for name, gate in gated_modules(model.model).items() if not gate.weight_t.is_meta}
                found, states = divide_layer(run, gates, states, plan.hidden_size)
                for gate in gates.values():
                    gate.forget_threshold()
            shares |= found
            advance(1)
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
    weights = [one.weights for one in plan.projections]
    return SEQUENCES * moves_of(weights, plan.hidden_size) // plan.n_layers**2
