"""A checkpoint that is none, that cannot be understood or that lacks something is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.commands import contents, refused, run_wina
from wina_convert.errors import CheckpointError, OptionError
from wina_convert.format.checkpoint import open_checkpoint

MODEL = "one layer"  # see support/shared.py


@pytest.mark.parametrize("command", [("retarget", "--sparsity", "0.5"), ("inspect",), ("eval", "--text", "bundled")])
def test_what_is_no_checkpoint_is_refused(command: tuple[str, ...], source: Path, tmp_path: Path):
    verb, *options = command
    folder = shutil.copytree(source, tmp_path / "source")
    before = contents(folder)
    refused(run_wina(verb, folder, *options), str(folder), "not a WINA checkpoint", f"wina-convert {folder} --out")
    refused(run_wina(verb, tmp_path / "nowhere", *options), str(tmp_path / "nowhere"))
    refused(run_wina(verb, folder / "config.json", *options), "config.json")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 3},
            r"format version 3 .* reads versions 1 and 2; run `pip install --upgrade wina-convert`",
        ),
        ({"format_version": None}, r"format version None"),
        ({"surprise": 1}, r"unknown fields: surprise"),
        ({"modules": ["model.layers.0.mlp.nosuch"]}, r"gates 'model.layers.0.mlp.nosuch'"),
        ({"grid": [0, 0.5, 0.4]}, r"grid .* ascending"),
        ({"grid": "0"}, r"grid .* ascending"),
        ({"sparsity": 2}, r"sparsity is 2"),
        ({"modules": None}, r"modules"),
        ({"modules": [1]}, r"modules"),
    ],
)
def test_a_checkpoint_that_cannot_be_understood_is_refused(
    change: dict[str, Any], message: str, converted: Path, tmp_path: Path
):
    out = shutil.copytree(converted, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, OptionError), match=message):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda stored: stored.pop("model.layers.0.mlp.up_proj.thresholds"),
            ("model.layers.0.mlp.up_proj.thresholds",),
        ),
        (lambda stored: stored.pop("model.layers.0.mlp.up_proj.weight_t"), ("model.layers.0.mlp.up_proj", "again")),
        (lambda stored: stored.clear(), ("model.layers.0.", "again")),
    ],
    ids=["no thresholds", "no weight", "no tensors"],
)
@pytest.mark.parametrize("command", [("inspect",), ("eval", "--text", "bundled", "--quiet")], ids=["inspect", "eval"])
def test_a_damaged_checkpoint_is_refused(
    command: tuple[str, ...], damage: Callable[[dict[str, Any]], Any], words: tuple[str, ...], converted: Path, tmp_path
):
    out = shutil.copytree(converted, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    damage(stored)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    refused(run_wina(command[0], out, *command[1:]), *words)
