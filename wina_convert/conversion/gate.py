"""Gates a plain model in memory: what a conversion with `basis="none"` would store, put into the modules instead of files."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..defaults import torch_defaults
from ..errors import CheckpointError
from ..fitting.low_rank import low_rank_factors
from ..fitting.schemes import scheme_of
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.dtypes import compute_dtype
from ..format.low_rank import LOW_RANK, rank_of
from ..format.names import BIASES, COLUMN_NORMS, THRESHOLDS, WEIGHT_T
from ..format.staging import Staging
from ..models.device import choose_device
from ..models.source import Source, checkpoint_folder, open_source
from ..models.tensors import taken, with_own_head
from ..models.text import read_sequences, sequence_length
from ..progress import lines
from ..runtime import install
from ..runtime.experts import fused_experts
from ..runtime.quantization import Gating, WinaConfig
from .files import checkpoint_config
from .layers import write_layers
from .options import ConversionOptions
from .plan import HEAD, make_plan
from .search import searched
from .twin_proof import check_twin

logger = logging.getLogger(__name__)


@torch_defaults()
def gate(model: nn.Module, folder: Path | None, asked: WinaConfig) -> WinaConfig:
    """Gate a model that was loaded, in place.

    Args:
        model: a plain causal LM, with its weights in one process.
        folder: where its weights were read from; None: nowhere.
        asked: sparsity, prefill and `gating`, which is not None.

    Returns:
        the config of the checkpoint that the model now is.

    Raises:
        WinaError: as a conversion does; or the checkpoint to take thresholds from is of another model or in another basis.
    """
    assert asked.gating is not None
    if fused_experts(model):
        raise CheckpointError(
            "a mixture of experts cannot be gated while it is loaded; convert it with wina-convert and load that"
        )
    if asked.gating.thresholds is not None:
        return _take(model, folder, open_checkpoint(checkpoint_folder(asked.gating.thresholds)), asked)
    if folder is None:
        raise CheckpointError(
            "calibration needs the folder that a model is read from, and it was made from a state dict"
        )
    return _calibrate(model, _whole_source(folder), asked.gating, asked)


def _whole_source(folder: Path) -> Source:
    """The model of a folder; of one in the Hub's cache, also what transformers does not fetch before it is asked to."""
    found = open_source(str(folder))
    on_hub = found.revision is not None and found.name.count("/") == 1
    return open_source(found.name, found.revision) if on_hub else found


def _calibrate(model: nn.Module, source: Source, gating: Gating, asked: WinaConfig) -> WinaConfig:
    """Fit thresholds as a conversion does: on the weights in the folder, layer by layer behind gated layers."""
    progress = lines(logger.info)
    source, _ = taken(source)
    if not source.listed:
        check_twin(source, progress)
    first = next(model.parameters())
    dtype = str(getattr(model, "dtype", first.dtype)).removeprefix("torch.")
    fields = {"calibration": gating.calibration, "basis": "none", "device": str(first.device), **gating.conversion}
    if asked.sparsity is not None:
        fields["sparsity"] = asked.sparsity
    if dtype != str(compute_dtype(source)).removeprefix("torch."):
        fields["dtype"] = dtype
    options = ConversionOptions(**fields)
    device = choose_device(options.device)
    if HEAD in options.targets:
        source = with_own_head(source)
    plan = make_plan(source, options.targets, options.ignore, options.dtype, options.scheme, options.allocation)
    length = sequence_length(source, options.seq_len)
    tokens, _ = read_sequences(source, options.calibration, length, options.samples, options.seed)
    config = checkpoint_config(source, plan, options, tokens, {"kind": "none"})
    at_a_time = 1 if device.type == "cpu" else options.batch_size
    plan = searched(plan, source, config, tokens, at_a_time, device, None, progress)
    config = replace(config, shares=plan.budget.stored())
    tables = Tables()
    nowhere = Unsaved(Path(), {}, None)
    write_layers(source, plan, config, tokens, at_a_time, device, tables, nowhere, {}, progress, plot=False)
    keys = {projection.name: projection.key for projection in plan.projections}
    install.gate(model, config, lambda name, weight_t: tables.of(keys[name]))
    return _as_loaded(config, asked)


def _take(model: nn.Module, folder: Path | None, other: Checkpoint, asked: WinaConfig) -> WinaConfig:
    """Take thresholds from a checkpoint, and weigh columns by the model's own weights."""
    config, keys, where = other.config, other.gated_keys(), other.folder.path
    if config.basis.get("kind") != "none":
        raise CheckpointError(
            f"the thresholds of {where} belong to weights in another basis ({config.basis.get('kind')}); take those of a "
            "conversion with --basis none"
        )
    scheme = scheme_of(config.scheme)
    leaves = (THRESHOLDS, *((BIASES,) if config.biases else ()), *(() if scheme.recomputed else (COLUMN_NORMS,)))

    def tables(name: str, weight_t: Tensor) -> Mapping[str, Tensor]:
        key = keys[name]
        stored = {leaf: tensor for leaf in leaves for _, tensor in other.read([f"{key}.{leaf}"])}
        if other.folder.tensors[f"{key}.{WEIGHT_T}"].shape != tuple(weight_t.shape):
            raise CheckpointError(
                f"{where} has {name} in another shape than this model; its thresholds are another model's"
            )
        made = {COLUMN_NORMS: scheme.column_weights(name, weight_t)}
        if config.low_rank:
            factors = low_rank_factors(weight_t, rank_of(config.low_rank, *weight_t.shape))
            made |= dict(zip(LOW_RANK, factors, strict=True))
        return made | stored

    if asked.sparsity is not None:
        config = replace(config, sparsity=asked.sparsity)
    if folder is not None:
        source = open_source(str(folder))
        config = replace(config, source=source.told())
    install.gate(model, config, tables)
    return _as_loaded(config, asked)


def _as_loaded(config: Any, asked: WinaConfig) -> WinaConfig:
    """The config as transformers takes it, with the prefill that the caller chose."""
    return WinaConfig(**vars(replace(config, prefill=asked.prefill or config.prefill)))


class Tables:
    """Keeps what a gated projection has beside its weight, instead of writing a checkpoint."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep column norms, thresholds and low-rank terms."""
        for name, tensor in tensors.items():
            key, _, leaf = name.rpartition(".")
            if leaf in (COLUMN_NORMS, THRESHOLDS, *LOW_RANK):
                self.kept.setdefault(key, {})[leaf] = tensor

    def skip(self, names: Iterable[str]) -> None:
        """Nothing is there from before."""

    def sync(self) -> None:
        """Nothing goes to a disk."""

    def of(self, key: str) -> Mapping[str, Tensor]:
        """What a projection has."""
        return self.kept[key]


class Unsaved(Staging):
    """No folder: what is kept in memory is not gone on with."""

    def save(self, layers: int, tensors: Mapping[str, Tensor]) -> None:
        """Save nothing."""
