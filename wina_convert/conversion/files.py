"""The files of a checkpoint beside its weights, and the checks of the folder that they go into."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..format.config import WinaConfig
from ..format.folder import sidecars
from ..format.names import CONFIG, INSTALL
from ..models.source import Source
from .staging import check_replaceable, hidden, unwritable

if TYPE_CHECKING:
    from .plan import ConversionPlan


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


def write_config(folder: Path, source: Source, config: WinaConfig, plan: "ConversionPlan") -> None:
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
    for relative in sidecars(source.path):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / relative, folder / relative)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON into a staged folder, the same way every time."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
