"""The stand-in for the Hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub import Hub, running_hub, use_endpoint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that huggingface_hub is pointed to, with an empty cache in `home`."""
    with running_hub() as server:
        use_endpoint(server.url, tmp_path / "home", monkeypatch)
        yield server
