"""Tests that need an NVIDIA GPU: `python -m pytest tests/gpu -n 0`. Without one they are skipped."""

from pathlib import Path

import pytest
import torch

reason = ""
if not torch.cuda.is_available():
    reason = "needs an NVIDIA GPU"
elif torch.cuda.get_device_capability() < (8, 0):
    reason = "needs compute capability 8.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))
