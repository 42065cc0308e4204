"""Reads a checkpoint folder with plain code, to hold against what the package makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wina_convert.format.names import MANIFEST


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def threshold_of(folder: Path, curve: Tensor, sparsity: float) -> float:
    """The threshold at a sparsity, linear between the points of the stored curve [K]."""
    return float(numpy.interp(sparsity, config_of(folder)["quantization_config"]["grid"], curve.double()))


def bias_of(folder: Path, biases: Tensor | None, sparsity: float) -> Tensor:
    """What is added at a sparsity [out], float64: biases [K, out] linear between their points; 0 without."""
    if biases is None:
        return torch.zeros((), dtype=torch.float64)
    grid = config_of(folder)["quantization_config"]["grid"]
    return torch.tensor([numpy.interp(sparsity, grid, column) for column in biases.double().t().numpy()])


def write_biases(folder: Path, scale: float = 1.0, seed: int = 0) -> Path:
    """Give a checkpoint in one file random biases along the sparsity, in version 2; its manifest is not renewed."""
    tensors, config = tensors_of(folder), config_of(folder)
    config["quantization_config"] |= {"format_version": 2, "biases": True}
    points, generator = len(config["quantization_config"]["grid"]), torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(".weight_t")]:
        biases = scale * torch.randn(points, tensors[name].shape[1], generator=generator)
        tensors[name.replace("weight_t", "biases")] = biases.index_fill(0, torch.tensor([0]), 0.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest records of each file."""
    return json.loads((folder / MANIFEST).read_text("utf-8"))["files"]


def weight_key(folder: Path, module: str) -> str:
    (key,) = [k for k in tensors_of(folder) if k.endswith(".weight_t") and f".{module}".endswith(f".{k[:-9]}")]
    return key
