"""Models and checkpoints that several test files read: each is made once in a run, whatever the number of workers.

A test file names one in `MODEL`; the fixtures `source`, `converted` and `copied` of conftest.py give it.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from support.commands import SMALL, SMALLEST, run, succeeded
from support.families import make_model


@dataclass(frozen=True)
class Recipe:
    """How a model is made and converted.

    Attributes:
        family: a name of FAMILIES.
        fields: of its config, set otherwise.
        files: further files of its folder, with their texts.
        options: of its conversion.
    """

    family: str
    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = SMALL

    def make(self, folder: Path) -> None:
        """Make the model."""
        make_model(self.family, folder, **self.fields)
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    def convert(self, source: Path, out: Path, *options: str) -> None:
        """Convert it."""
        succeeded(run(source, "--out", out, *self.options, *options))


MODELS = {
    "one layer": Recipe("llama", {"num_hidden_layers": 1}),
    "three layers": Recipe("llama", {"num_hidden_layers": 3}),
    "biases and a tied head": Recipe("llama-tied"),
    "kilobytes": Recipe(  # with files beside its weights
        "llama",
        {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4},
        {"LICENSE": "Apache License 2.0\n", "docs/usage.md": "nested\n"},
        SMALLEST,
    ),
}
MODELS["kilobytes in shards"] = replace(MODELS["kilobytes"], options=(*SMALLEST, "--max-shard-size", "100KB"))  # three


class Once:
    """Makes folders that all workers of a run share. Nobody may change them: a test that does copies one first."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        root = factory.getbasetemp()
        self.root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
        self.root.mkdir(exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder of this name, which `make` makes where nobody has made it yet."""
        folder, done = self.root / name.replace(" ", "-"), self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed half-way
                folder.parent.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    def source(self, name: str) -> Path:
        """A model of MODELS."""
        return self(f"{name} source", MODELS[name].make)

    def converted(self, name: str) -> Path:
        """A checkpoint of it."""
        return self(f"{name} converted", lambda out: MODELS[name].convert(self.source(name), out))
