"""Opens a WINA checkpoint: its config, headers and tensors, held against each other."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, VerificationError, as_checkpoint_error
from .config import WinaConfig
from .curve import ascends, threshold_at
from .dtypes import FLOATS
from .folder import Folder, read_config
from .grid import check_sparsity
from .low_rank import LOW_RANK, LOW_RANK_IN, LOW_RANK_OUT, rank_of
from .names import BIASES, COLUMN_NORMS, INDEX, SINGLE, THRESHOLDS, WEIGHT_T, split_layer
from .shards import read_headers
from .trust import check_folder


@dataclass(frozen=True)
class Checkpoint:
    """A WINA checkpoint folder: its files and its config.

    Attributes:
        folder: where it is, with its headers.
        config: its `quantization_config`.
    """

    folder: Folder
    config: WinaConfig

    def gated_keys(self) -> dict[str, str]:
        """Checkpoint key of every gated projection, by its module name.

        They differ where the checkpoint has another prefix: it leaves out the base model's, or names the parts of a model of
        more than text as they were called before.

        Raises:
            CheckpointError: config and tensors do not name the same projections.
        """
        stored = {key.removesuffix(f".{WEIGHT_T}") for key in self.folder.tensors if key.endswith(f".{WEIGHT_T}")}
        by_place: dict[tuple[int, str], list[str]] = {}
        for key in stored:
            if place := split_layer(key):
                by_place.setdefault(place[1:], []).append(key)
        found = {}
        for name in self.config.modules:
            place = split_layer(name)
            keys = [name] if name in stored else by_place.get(place[1:], []) if place else []
            if len(keys) != 1:
                raise CheckpointError(
                    f"{self.folder.path}: config.json gates {name!r}, of which the weights have {len(keys)} tensors; "
                    "convert again"
                )
            found[name] = keys[0]
        if forgotten := sorted(stored - set(found.values())):
            raise CheckpointError(
                f"{self.folder.path}: config.json does not name {forgotten[0]!r}, which the weights hold as gated; "
                "convert again"
            )
        return found

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key.

        Raises:
            CheckpointError: there is no such tensor.
        """
        wanted = list(keys)
        if missing := [key for key in wanted if key not in self.folder.tensors]:
            raise CheckpointError(f"{self.folder.path} has no tensor {missing[0]!r}; convert again")
        return self.folder.read(wanted)

    def curves(self) -> dict[str, Tensor]:
        """The thresholds [K], float32, of every gated projection along the grid, by module name."""
        keys = self.gated_keys()
        stored = dict(self.read(f"{key}.{THRESHOLDS}" for key in keys.values()))
        return {name: stored[f"{key}.{THRESHOLDS}"] for name, key in keys.items()}

    def thresholds(self) -> dict[str, float]:
        """The threshold of every gated projection at the default sparsity, by module name.

        Raises:
            VerificationError: thresholds are not a finite, ascending curve from 0.
        """
        keys, curves = self.gated_keys(), self.curves()
        for name, curve in curves.items():
            if not ascends(curve):
                raise VerificationError(
                    f"{keys[name] + '.' + THRESHOLDS!r} is not a finite, ascending curve from 0; convert again"
                )
        sparsity = self.config.sparsity or 0.0
        return {name: threshold_at(curve, self.config.grid, sparsity).item() for name, curve in curves.items()}


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the config and headers of a WINA checkpoint.

    Raises:
        CheckpointError: it is not one, or is damaged.
    """
    with as_checkpoint_error():
        text, content = read_config(Path(folder))
        block = content.get("quantization_config")
        if not isinstance(block, dict) or block.get("quant_method") != "wina":
            raise CheckpointError(
                f"{folder} is not a WINA checkpoint; make one with `wina-convert {shlex.quote(str(folder))} --out DIR`"
            )
        config = WinaConfig.from_dict(block)
        config = replace(config, sparsity=check_sparsity(config.sparsity if config.sparsity is not None else 0.0))
        check_folder(Path(folder))
        if (Path(folder) / SINGLE).exists() and (Path(folder) / INDEX).exists():
            raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}, and only one can be meant; get it again")
        found = Folder(Path(folder).resolve().name, Path(folder), content, text, read_headers(Path(folder)))
    if not isinstance(content.get("model_type"), str):
        raise CheckpointError(
            f"{folder}: model_type in config.json is {content.get('model_type')!r}, not a name; get it again"
        )
    checkpoint = Checkpoint(found, config)
    _check_structure(checkpoint)
    return checkpoint


def _check_structure(checkpoint: Checkpoint) -> None:
    """Refuse headers that do not hold what the config promises, before a tensor is read."""
    config, specs = checkpoint.config, checkpoint.folder.tensors
    places = {name: split_layer(name) for name in config.modules}
    layers = next((place[0] for place in places.values() if place), None)
    outside = [name for name, place in places.items() if place is None]
    if len(outside) > 1 or (outside and outside != config.modules[-1:]):
        raise CheckpointError(
            f"{checkpoint.folder.path}: config.json gates {outside[0]!r}, which is in no decoder layer; only the last may be, a "
            "head"
        )
    for name, key in checkpoint.gated_keys().items():
        place = places[name]
        if place is not None and place[0] != layers:
            raise CheckpointError(f"{checkpoint.folder.path}: config.json gates {name!r}, which is in no decoder layer")
        weight_t = specs[f"{key}.{WEIGHT_T}"]
        tables: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            (COLUMN_NORMS, torch.float32, weight_t.shape[:1]),
            (THRESHOLDS, torch.float32, (len(config.grid),)),
        ]
        if config.biases:
            tables.append((BIASES, torch.float32, (len(config.grid), *weight_t.shape[1:])))
        if config.low_rank and len(weight_t.shape) == 2:
            inputs, outputs = weight_t.shape
            rank = rank_of(config.low_rank, inputs, outputs)
            tables.append((LOW_RANK_IN, weight_t.dtype, (inputs, rank)))
            tables.append((LOW_RANK_OUT, weight_t.dtype, (rank, outputs)))
        untold = {BIASES, *LOW_RANK} - {leaf for leaf, _, _ in tables}
        if there := sorted(leaf for leaf in untold if f"{key}.{leaf}" in specs):
            raise CheckpointError(
                f"{checkpoint.folder.path}: the weights hold {key + '.' + there[0]!r}, of which config.json says nothing; "
                "convert again"
            )
        for leaf, dtype, shape in tables:
            spec = specs.get(f"{key}.{leaf}")
            if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
                got = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
                wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
                raise CheckpointError(
                    f"{checkpoint.folder.path}: {key + '.' + leaf!r} is {got} instead of {wanted}; convert again"
                )
        if len(weight_t.shape) != 2 or weight_t.dtype not in FLOATS.values():
            got = f"{weight_t.dtype} {list(weight_t.shape)}"
            raise CheckpointError(
                f"{checkpoint.folder.path}: {weight_t.name!r} is {got}, no matrix in {', '.join(FLOATS)}"
            )
