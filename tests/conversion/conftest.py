"""What the tests of interrupted conversions share."""

from types import SimpleNamespace

import pytest

from support.interrupting import CLOCK


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot after every layer: time stands still, so none costs anything."""
    monkeypatch.setattr(CLOCK, SimpleNamespace(monotonic=lambda: 0.0))
