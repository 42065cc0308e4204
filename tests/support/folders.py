"""Reads a checkpoint folder with plain code, to hold against what the package makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.torch import load_file
from torch import Tensor

from wina_convert.format.names import MANIFEST


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def threshold_of(folder: Path, curve: Tensor, sparsity: float) -> float:
    """The threshold at a sparsity, linear between the points of the stored curve [K]."""
    return float(numpy.interp(sparsity, config_of(folder)["quantization_config"]["grid"], curve.double()))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest records of each file."""
    return json.loads((folder / MANIFEST).read_text("utf-8"))["files"]


def weight_key(folder: Path, module: str) -> str:
    (key,) = [k for k in tensors_of(folder) if k.endswith(".weight_t") and f".{module}".endswith(f".{k[:-9]}")]
    return key
