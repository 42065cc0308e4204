"""The models that the tests of loading share."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from support.families import make_model
from support.shared import Once
from wina_convert import convert


@pytest.fixture(scope="module")
def model(wina_tiny: Path) -> PreTrainedModel:
    """The converted model. Shared: do not change it."""
    return AutoModelForCausalLM.from_pretrained(wina_tiny)


@pytest.fixture(scope="module")
def dense(tiny: Path) -> PreTrainedModel:
    """The source model. Shared: do not change it."""
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(scope="module")
def half(once: Once) -> Path:
    """A bfloat16 checkpoint with biases. Shared: do not change it."""

    def make(folder: Path) -> None:
        convert(
            str(make_model("qwen2", folder / "source", torch.bfloat16)),
            folder / "wina",
            samples=8,
            seq_len=32,
            basis="none",
        )

    return once("half", make) / "wina"


@pytest.fixture
def damaged(wina_tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(wina_tiny, tmp_path / "copy"))
