"""Fixtures that several test files share.

What takes seconds to import is imported where it is used: the process that hands the tests to the workers reads this file as
well, and needs nothing of it.
"""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests use no network
# before torch is: a process a core, tiny models gain nothing from threads, and those that a test asks for do not spin while
# they wait for a core that another process has
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# compiling this package takes the better part of a second, and a hundred processes would
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from support import TINY

if TYPE_CHECKING:
    from support.shared import Once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=40, help="how often tests/promises/test_kill.py kills a conversion")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the moments")


def pytest_collection_finish() -> None:
    """What was imported lives to the end: no collection of garbage walks through it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> None:
    """Transformers shows none while it loads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded trained model: llama, 4 layers, hidden 128, tied, float32, context 256."""
    return TINY


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> "Once":
    """Makes folders that all workers share."""
    from support.shared import Once

    return Once(tmp_path_factory)


@pytest.fixture(scope="session")
def wina_tiny(tiny: Path, once: "Once") -> Path:
    """`tiny`, converted at 50%. Shared: do not change it, copy it."""
    from wina_convert import convert

    return once("wina-lab-tiny-wina", lambda folder: convert(str(tiny), folder, samples=8, seq_len=64, basis="none"))


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, once: "Once") -> Path:
    """The model that a test file names in `MODEL`, with random weights. Shared: copy it to change it."""
    return once.source(request.module.MODEL)


@pytest.fixture(scope="module")
def converted(request: pytest.FixtureRequest, once: "Once") -> Path:
    """That, converted. Shared: copy it to change it."""
    return once.converted(request.module.MODEL)


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A copy of `converted` to change."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Torch has as many threads after a test as before it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
