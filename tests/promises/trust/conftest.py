"""Checkpoints of a few kilobytes, which strangers change."""

import shutil
from pathlib import Path

import pytest
from torch import Tensor

from support.shared import Once
from support.strangers import logits_of
from wina_convert import load


@pytest.fixture(scope="session")
def one(once: Once) -> Path:
    """A checkpoint of a few kilobytes in one file. Shared: copy it to change it."""
    return once.converted("kilobytes")


@pytest.fixture(scope="session")
def three(once: Once) -> Path:
    """The same in three shards. Shared: copy it to change it."""
    return once.converted("kilobytes in shards")


@pytest.fixture(scope="session")
def logits(one: Path) -> Tensor:
    """What the checkpoint computes."""
    return logits_of(load(str(one)))


@pytest.fixture
def single(one: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one, tmp_path / "out"))


@pytest.fixture
def sharded(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "out"))
