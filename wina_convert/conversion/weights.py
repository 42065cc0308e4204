"""What a conversion writes: the checks of the target before, tensors, config and the files beside them."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..format.config import INSTALL, WinaConfig
from ..errors import CheckpointError, SourceError
from .plan import ConversionPlan
from ..runtime.rule import column_norms
from ..format.shards import read_tensors
from ..models.source import CONFIG, Source, sidecars
from .staging import check_replaceable, hidden, unwritable

FINITE = 1 << 24  # weights checked at a time: bounds the temporaries of the check


def check_target(out: Path, model: str, overwrite: bool) -> None:
    """Refuse a target that cannot or must not be written, before anything is spent.

    Raises:
        CheckpointError: it exists (without `overwrite`), is not a WINA checkpoint (with it), lies in the source or holds it, or
            the folder it goes into cannot be written.
    """
    try:
        target = out.resolve()
        hidden(target).exists()  # its name is the longest
    except OSError as error:
        raise unwritable(out, error) from error
    source = Path(model).resolve()
    if Path(model).is_dir() and (target == source or source in target.parents or target in source.parents):
        raise CheckpointError(f"{out} and the source {model} lie one inside the other; choose another --out")
    check_replaceable(out, overwrite)
    nearest = next(parent for parent in target.parents if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise CheckpointError(f"{out} cannot be written: {nearest} is read-only or no folder; choose another --out")


def check_space(out: Path, needed: int) -> None:
    """Refuse when the disk of the target has less free space than a conversion needs, in bytes.

    Raises:
        CheckpointError: it has less, what an unfinished conversion to this target holds already counted as free.
    """
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    unfinished = (path for path in hidden(out.resolve()).rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + sum(path.stat().st_blocks * 512 for path in unfinished)
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
        if not _finite(tensor):
            raise SourceError(f"tensor {key!r} in {source.folder / source.tensors[key].file} holds NaN or infinity")
        if plan.cast and tensor.is_floating_point():
            tensor = tensor.to(plan.dtype)
            if not _finite(tensor):
                raise SourceError(f"tensor {key!r} does not fit {plan.dtype}; pass --dtype bfloat16 or float32")
        if key in gated:
            projection = gated[key]
            weight_t = (tensor if projection.transposed_in_source else tensor.t()).contiguous()
            made[f"{projection.key}.weight_t"] = weight_t
            made[f"{projection.key}.column_norms"] = column_norms(weight_t)
        else:
            made[key] = tensor
    return made


def _finite(tensor: Tensor) -> bool:
    floating = tensor.is_floating_point()
    return not floating or all(torch.isfinite(part).all() for part in tensor.flatten().split(FINITE))


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON into a staged folder, the same way every time."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
