"""Reads a WINA checkpoint: its config, headers and tensors, and the models that they make."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..architectures import ARCHITECTURES
from .config import WinaConfig, check_sparsity
from .dtypes import FLOATS, compute_dtype
from ..errors import CheckpointError, SourceError
from ..runtime.loader import install
from .shards import INDEX, SINGLE, TensorSpec, read_headers, read_tensors
from ..models.source import Source, read_config
from ..models.stream import Reader, StreamedModel, build_skeleton, checkpoint_keys
from .trust import check_folder

REPORT = "wina_report.json"


@dataclass(frozen=True)
class Checkpoint:
    """A WINA checkpoint folder: its files and its config.

    Attributes:
        source: the folder, read like any checkpoint.
        config: its `quantization_config`.
    """

    source: Source
    config: WinaConfig

    def stream(self, device: torch.device) -> StreamedModel:
        """The gated model, one decoder layer at a time."""
        return gated_stream(
            self.source, self.config, compute_dtype(self.source), self.source.tensors.values(), self.read, device
        )

    def gated_keys(self) -> dict[str, str]:
        """Checkpoint key of every gated projection, by its module name.

        They differ where the checkpoint leaves out the base model's prefix.

        Raises:
            CheckpointError: config and tensors do not name the same projections.
        """
        stored = {key.removesuffix(".weight_t") for key in self.source.tensors if key.endswith(".weight_t")}
        found = {}
        for name in self.config.modules:
            keys = [name] if name in stored else [key for key in stored if name.endswith(f".{key}")]
            if len(keys) != 1:
                raise CheckpointError(
                    f"{self.source.folder}: config.json gates {name!r}, of which the weights have {len(keys)} tensors; "
                    "convert again"
                )
            found[name] = keys[0]
        if forgotten := sorted(stored - set(found.values())):
            raise CheckpointError(
                f"{self.source.folder}: config.json does not name {forgotten[0]!r}, which the weights hold as gated; "
                "convert again"
            )
        return found

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key."""
        specs = []
        for key in keys:
            if key not in self.source.tensors:
                raise CheckpointError(f"{self.source.folder} has no tensor {key!r}; convert again")
            specs.append(self.source.tensors[key])
        return read_tensors(self.source.folder, specs)


def gated_stream(
    source: Source,
    config: WinaConfig,
    dtype: torch.dtype,
    tensors: Iterable[TensorSpec],
    read: Reader,
    device: torch.device,
) -> StreamedModel:
    """The model of a source's config with gated projections installed, to be fed from a checkpoint's tensors."""
    model = build_skeleton(source, dtype)
    install(model, config)
    specs = {spec.name: spec for spec in tensors}
    return StreamedModel(model, source.architecture.layers, checkpoint_keys(model, specs), specs, read, device)


def dense_stream(source: Source, dtype: torch.dtype, device: torch.device) -> StreamedModel:
    """The source as it is, computed in `dtype`."""
    model = build_skeleton(source, dtype)

    def read(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(source.folder, [source.tensors[key] for key in keys])

    return StreamedModel(
        model, source.architecture.layers, checkpoint_keys(model, source.tensors), source.tensors, read, device
    )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the config and headers of a WINA checkpoint.

    Raises:
        CheckpointError: it is not one, or is damaged.
    """
    try:
        text, content = read_config(Path(folder))
        block = content.get("quantization_config")
        if not isinstance(block, dict) or block.get("quant_method") != "wina":
            raise CheckpointError(f"{folder} is not a WINA checkpoint; make one with `wina-convert {folder} --out DIR`")
        config = WinaConfig.from_dict(block)
        config = replace(config, sparsity=check_sparsity(config.sparsity if config.sparsity is not None else 0.0))
        check_folder(Path(folder))
        if (Path(folder) / SINGLE).exists() and (Path(folder) / INDEX).exists():
            raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}, and only one can be meant; get it again")
        source = Source(Path(folder).resolve().name, None, Path(folder), content, text, read_headers(Path(folder)))
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    if content.get("model_type") not in list(ARCHITECTURES):
        raise CheckpointError(
            f"{folder}: model_type in config.json is {content.get('model_type')!r}, which this version does not know; "
            "run `pip install --upgrade wina-convert`"
        )
    checkpoint = Checkpoint(source, config)
    _check_structure(checkpoint)
    return checkpoint


def _check_structure(checkpoint: Checkpoint) -> None:
    """Refuse headers that do not hold what the config promises, before a tensor is read."""
    config, specs = checkpoint.config, checkpoint.source.tensors
    layers = checkpoint.source.architecture.layers
    for name, key in checkpoint.gated_keys().items():
        if not re.match(rf"{re.escape(layers)}\.\d{{1,9}}\.", name):
            raise CheckpointError(
                f"{checkpoint.source.folder}: config.json gates {name!r}, which is in no decoder layer"
            )
        weight_t = specs[f"{key}.weight_t"]
        vectors = [("column_norms", weight_t.shape[:1]), ("thresholds", (len(config.grid),))]
        for leaf, shape in vectors:
            spec = specs.get(f"{key}.{leaf}")
            if spec is None or (spec.dtype, spec.shape) != (torch.float32, shape):
                got = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
                raise CheckpointError(
                    f"{checkpoint.source.folder}: {key + '.' + leaf!r} is {got} instead of float32 {list(shape)}; convert again"
                )
        if len(weight_t.shape) != 2 or weight_t.dtype not in FLOATS.values():
            got = f"{weight_t.dtype} {list(weight_t.shape)}"
            raise CheckpointError(
                f"{checkpoint.source.folder}: {weight_t.name!r} is {got}, no matrix in {', '.join(FLOATS)}"
            )
