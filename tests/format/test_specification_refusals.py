"""What the specification says that a reader must refuse is refused, by the package and by the reader of 60 lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wina_convert
from support import ROOT
from support.folders import config_of, tensors_of, write_biases
from support.reader import Reader
from wina_convert.errors import CheckpointError, OptionError

GOLDEN = ROOT / "tests" / "golden" / "v1"


def edit_block(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = config_of(folder)
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensor(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors, name = tensors_of(folder), config_of(folder)["quantization_config"]["modules"][0]
        tensors[f"{name}.{leaf}"] = change(tensors[f"{name}.{leaf}"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def set_at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


REFUSED: dict[str, Callable[[Path], None]] = {
    "method": edit_block(quant_method="other"),
    "version": edit_block(format_version=3),
    "no version": edit_block(format_version=None),
    "field": edit_block(unknown=1),
    "grid starts late": edit_block(grid=[0.1, *np.linspace(0.2, 0.9, 19)]),
    "grid descends": edit_block(grid=[0, 0.5, 0.4, *np.linspace(0.6, 0.9, 17)]),
    "grid exceeds 1": edit_block(grid=[*np.linspace(0, 0.9, 19), 1.5]),
    "sparsity beyond 0.95": edit_block(sparsity=0.96),
    "sparsity beyond the grid": edit_block(sparsity=0.5, grid=[*np.linspace(0, 0.4, 20)]),
    "a negative norm": edit_tensor("column_norms", set_at(0, -1.0)),
    "an infinite norm": edit_tensor("column_norms", set_at(0, torch.inf)),
    "a threshold that is NaN": edit_tensor("thresholds", set_at(3, torch.nan)),
    "thresholds from 1": edit_tensor("thresholds", set_at(0, 1.0)),
    "thresholds that descend": edit_tensor("thresholds", set_at(19, 0.0)),
    "biases that are NaN": lambda folder: edit_tensor("biases", set_at(3, torch.nan))(write_biases(folder)),
    "biases from 1": lambda folder: edit_tensor("biases", set_at(0, 1.0))(write_biases(folder)),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:3000]
    ),
}


# what a reader of 60 lines has no room for
REFUSED_BY_THE_PACKAGE: dict[str, Callable[[Path], None]] = {
    "a type": edit_block(modules="all"),
    "a prefill": edit_block(prefill="some"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "an index as well": lambda folder: write_index(folder, "model.safetensors"),
    "an index out of the folder": lambda folder: (
        write_index(folder, f"../{folder.name}/model-00001-of-00001.safetensors"),
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
    ),
    "a name without tensors": edit_block(modules=["model.layers.0.self_attn.q_proj", "model.layers.7.mlp.up_proj"]),
    "tensors without a name": edit_block(modules=["model.layers.0.self_attn.q_proj"]),
    "norms in half precision": edit_tensor("column_norms", torch.Tensor.half),
    "too few norms": edit_tensor("column_norms", lambda tensor: tensor[1:]),
    "too few thresholds": edit_tensor("thresholds", lambda tensor: tensor[1:]),
    "biases in half precision": lambda folder: edit_tensor("biases", torch.Tensor.half)(write_biases(folder)),
    "too few biases": lambda folder: edit_tensor("biases", lambda tensor: tensor[1:])(write_biases(folder)),
    "biases of which the config is silent": lambda folder: edit_block(biases=False)(write_biases(folder)),
    "a config that promises biases": edit_block(biases=True),
    "integer weights": edit_tensor("weight_t", torch.Tensor.short),
}


def write_index(folder: Path, file: str) -> None:
    weight_map = dict.fromkeys(tensors_of(folder), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def copy_golden(folder: Path) -> str:
    """A golden checkpoint without the files that no reader needs; the name of its first gated projection."""
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((GOLDEN / "llama-bfloat16-tied" / file).read_bytes())
    name: str = config_of(folder)["quantization_config"]["modules"][0]
    return name


@pytest.mark.parametrize("change", [None, *REFUSED_BY_THE_PACKAGE])
def test_what_the_text_refuses_the_package_refuses(change: str | None, tmp_path: Path) -> None:
    copy_golden(tmp_path)
    if change is None:
        wina_convert.load(str(tmp_path))
        return
    REFUSED_BY_THE_PACKAGE[change](tmp_path)
    with pytest.raises((CheckpointError, OptionError)):
        wina_convert.load(str(tmp_path))


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_text_refuses_the_package_and_the_reader_refuse(change: str, tmp_path: Path) -> None:
    name = copy_golden(tmp_path)
    Reader(tmp_path).product(name, np.ones(16, np.float32))
    REFUSED[change](tmp_path)
    with pytest.raises(ValueError):  # noqa: PT011 - whatever says that a value is wrong
        Reader(tmp_path).product(name, np.ones(16, np.float32))
    with pytest.raises((CheckpointError, OptionError)):
        wina_convert.load(str(tmp_path))
