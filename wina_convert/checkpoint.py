"""A WINA checkpoint on disk: staging and publishing it, its tensors and config, and reading it back."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import INSTALL, WinaConfig, check_sparsity
from .errors import CheckpointError, SourceError
from .plan import ConversionPlan, compute_dtype
from .runtime.loader import install
from .scoring import column_norms
from .shards import read_headers, read_tensors
from .source import CONFIG, Source, read_config, sidecars
from .staging import unwritable
from .stream import Reader, StreamedModel, build_skeleton, checkpoint_keys

REPORT = "wina_report.json"
CARD = "README.md"
FINITE = 1 << 24  # weights checked at a time: bounds the temporaries of the check


def check_target(out: Path, model: str, overwrite: bool) -> None:
    """Refuse a target that cannot or must not be written, before anything is spent.

    Raises:
        CheckpointError: it exists (without `overwrite`), is not a WINA checkpoint (with it), lies in the source or holds it, or
            the folder it goes into cannot be written.
    """
    try:
        target = out.resolve()
        target.exists()
    except OSError as error:
        raise unwritable(out, error) from error
    source = Path(model).resolve()
    if Path(model).is_dir() and (target == source or source in target.parents or target in source.parents):
        raise CheckpointError(f"{out} and the source {model} lie one inside the other; choose another --out")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{out} exists; choose another --out, or pass --overwrite to replace a WINA checkpoint"
            )
        if not (target / REPORT).is_file():
            raise CheckpointError(
                f"{out} is not a WINA checkpoint, so --overwrite does not replace it; choose another --out"
            )
    elif target.exists() and not target.is_dir():
        raise CheckpointError(f"{out} is a file; choose another --out")
    nearest = next(parent for parent in target.parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(f"{out} cannot be written: {nearest} is read-only or no folder; choose another --out")


def check_space(out: Path, needed: int) -> None:
    """Refuse when the disk of the target has less free space than the checkpoint needs, in bytes.

    Raises:
        CheckpointError: it has less.
    """
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{out} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; free some, or choose another --out"
        )


def stored_tensors(source: Source, plan: ConversionPlan, keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the checkpoint made from these of the source, thresholds aside: gated weights transposed, with norms.

    Args:
        source: the checkpoint to convert.
        plan: what is gated.
        keys: keys of the source.

    Raises:
        SourceError: a tensor holds NaN or infinity, or cannot be read.
    """
    gated = {f"{projection.key}.weight": projection for projection in plan.projections}
    made: dict[str, Tensor] = {}
    for key, tensor in read_tensors(source.folder, [source.tensors[key] for key in keys]):
        if tensor.is_floating_point() and not all(
            torch.isfinite(part).all() for part in tensor.flatten().split(FINITE)
        ):
            raise SourceError(f"tensor {key!r} in {source.folder / source.tensors[key].file} holds NaN or infinity")
        if plan.cast and tensor.is_floating_point():
            tensor = tensor.to(plan.dtype)
            if not all(torch.isfinite(part).all() for part in tensor.flatten().split(FINITE)):
                raise SourceError(f"tensor {key!r} does not fit {plan.dtype}; pass --dtype bfloat16 or float32")
        if key in gated:
            projection = gated[key]
            weight_t = (tensor if projection.transposed_in_source else tensor.t()).contiguous()
            made[f"{projection.key}.weight_t"] = weight_t
            made[f"{projection.key}.column_norms"] = column_norms(weight_t)
        else:
            made[key] = tensor
    return made


def write_config(folder: Path, source: Source, config: WinaConfig, plan: ConversionPlan) -> None:
    """Write the source's config.json with our block added; the rest of its text stays, but for a dtype chosen anew.

    A source without a dtype gets one: transformers would guess it from the float32 column norms.
    """
    text = source.config_text.rstrip()
    dtype = str(plan.dtype).removeprefix("torch.")
    named = r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)'
    block: dict[str, Any] = {"transformers_weights": INSTALL, "quantization_config": config.to_dict()}
    if "quantization_config" in source.config:  # empty, or it would have been refused
        fields = {name: value for name, value in source.config.items() if name != "quantization_config"}
        text = json.dumps(fields, indent=2, ensure_ascii=False)
    if not {"dtype", "torch_dtype"} & set(source.config):
        block = {"dtype": dtype} | block
    elif plan.cast or not (source.config.get("dtype") or source.config.get("torch_dtype")):
        text = re.sub(named, rf'\g<1>"{dtype}"', text)
    body = text.removesuffix("}").rstrip()
    ours = json.dumps(block, indent=2, ensure_ascii=False).removeprefix("{")
    (folder / CONFIG).write_bytes((body + ("," if not body.endswith("{") else "") + ours + "\n").encode())


def copy_sidecars(source: Source, folder: Path) -> None:
    """Copy everything that accompanies the weights: tokenizer, templates, generation config, licence."""
    for relative in sidecars(source.folder):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / relative, folder / relative)


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
            self.source, self.config, compute_dtype(self.source), self.source.tensors, self.read, device
        )

    def gated_keys(self) -> dict[str, str]:
        """Checkpoint key of every gated projection, by its module name.

        They differ where the checkpoint leaves out the base model's prefix.
        """
        stored = [key.removesuffix(".weight_t") for key in self.source.tensors if key.endswith(".weight_t")]
        found = {}
        for name in self.config.modules:
            keys = [key for key in stored if name == key or name.endswith(f".{key}") or key.endswith(f".{name}")]
            if len(keys) != 1:
                raise CheckpointError(
                    f"{self.source.folder}: config.json gates {name!r}, of which the weights have {len(keys)} tensors; "
                    "convert again"
                )
            found[name] = keys[0]
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
    source: Source, config: WinaConfig, dtype: torch.dtype, keys: Iterable[str], read: Reader, device: torch.device
) -> StreamedModel:
    """The model of a source's config with gated projections installed, to be fed from a checkpoint's keys."""
    model = build_skeleton(source, dtype)
    install(model, config)
    return StreamedModel(model, source.architecture.layers, checkpoint_keys(model, keys), read, device)


def dense_stream(source: Source, plan: ConversionPlan, device: torch.device) -> StreamedModel:
    """The source as it is, in the dtype of the plan."""
    model = build_skeleton(source, plan.dtype)

    def read(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(source.folder, [source.tensors[key] for key in keys])

    return StreamedModel(model, plan.layers, checkpoint_keys(model, source.tensors), read, device)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the config and headers of a WINA checkpoint.

    Raises:
        CheckpointError: it is not one, or is damaged.
    """
    try:
        text, content = read_config(Path(folder))
        source = Source(Path(folder).resolve().name, None, Path(folder), content, text, read_headers(Path(folder)))
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    block = content.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != "wina":
        raise CheckpointError(f"{folder} is not a WINA checkpoint; make one with `wina-convert {folder} --out DIR`")
    config = WinaConfig.from_dict(block)
    config = replace(config, sparsity=check_sparsity(config.sparsity if config.sparsity is not None else 0.0))
    checkpoint = Checkpoint(source, config)
    checkpoint.gated_keys()
    return checkpoint


def retarget(folder: str | Path, sparsity: float) -> None:
    """Change the default sparsity of a WINA checkpoint in place, in its config.json alone.

    Raises:
        OptionError: the sparsity is outside [0, 0.95].
        CheckpointError: the folder is not a WINA checkpoint or cannot be written.
    """
    sparsity = check_sparsity(sparsity)
    checkpoint = open_checkpoint(folder)
    replace(checkpoint.config, sparsity=sparsity)  # checks it against the grid
    head, mark, block = checkpoint.source.config_text.partition('"quantization_config"')
    block = re.sub(r'("sparsity"\s*:\s*)[^,\s}]+', rf"\g<1>{json.dumps(sparsity)}", block, count=1)
    write_text(Path(folder) / CONFIG, head + mark + block)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, all at once.

    Raises:
        CheckpointError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(text.encode())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error})") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON into a staged folder, the same way every time."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
