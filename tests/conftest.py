"""Fixtures that several test files share."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests use no network
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is: a process a core, and tiny models gain nothing from threads

import pytest
from transformers.utils import logging

from wina_convert import convert

logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=40, help="how often tests/test_kill.py kills a conversion")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the moments")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded trained model: llama, 4 layers, hidden 128, tied, float32, context 256."""
    return Path(__file__).parent / "models" / "wina-lab-tiny"


@pytest.fixture(scope="session")
def wina_tiny(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, converted at 50%. Shared: do not change it, copy it."""
    folder = tmp_path_factory.mktemp("shared") / "wina-lab-tiny-wina"
    convert(str(tiny), folder, samples=8, seq_len=64)
    return folder
