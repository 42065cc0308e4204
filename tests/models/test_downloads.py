"""Downloads are held against the Hub's checksums whenever it answers."""

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from support.commands import SMALLEST, refused, run, succeeded
from support.hub import Hub, use_endpoint
from wina_convert.errors import SourceError
from wina_convert.models.source import open_source
from wina_convert.verbs.verify import verify_folder

MODEL = "kilobytes"  # see support/shared.py

pytestmark = pytest.mark.slow


NAME = "lab/small"


@pytest.fixture
def hub(hub: Hub, source: Path) -> Hub:
    hub.add(NAME, source)
    return hub


def large_file(folder: Path, path: Path) -> dict[str, Any]:
    """What the Hub says of a file that it keeps in LFS, as it does weights."""
    data = path.read_bytes()
    name, oid = path.relative_to(folder).as_posix(), hashlib.sha256(data).hexdigest()
    lfs = {"oid": oid, "size": len(data), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


@pytest.fixture(params=["git", "lfs"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the Hub keeps files decides which checksum it tells of them."""
    if request.param == "lfs":
        monkeypatch.setattr("support.hub._entry", large_file)


def in_cache(home: Path, name: str) -> Path:
    """A file that was downloaded: a link to its blob."""
    (path,) = (home / "hub").glob(f"models--*/snapshots/*/{name}")
    return path


def alter(path: Path) -> None:
    """Another last byte; the size stays."""
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "docs/usage.md"])
def test_a_download_that_was_altered_in_the_cache_is_refused(name: str, hub: Hub, source: Path, tmp_path: Path):
    open_source(NAME)
    path = in_cache(tmp_path / "home", name)
    alter(path)
    with pytest.raises(SourceError, match="does not have the Hub's checksum"):
        open_source(NAME)
    refused(run(NAME, "--out", tmp_path / "out", *SMALLEST), str(path), "does not have the Hub's checksum", "run again")
    assert not (tmp_path / "out").exists()
    path.resolve().unlink()  # what the message tells to do
    open_source(NAME)
    assert path.read_bytes() == (source / name).read_bytes()


@pytest.mark.usefixtures("kept")
def test_a_download_that_is_the_hubs_converts(hub: Hub, source: Path, tmp_path: Path):
    for _ in range(2):  # from the Hub, and from the cache
        assert open_source(NAME).path.parent.name == "snapshots"
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALLEST))
    verify_folder(tmp_path / "out")


def closed(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", home, monkeypatch)


def failing_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].status = 503


def offline(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("state", [closed, failing_hub, offline])
def test_without_the_hub_what_was_downloaded_still_converts(
    state: Callable[..., None], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = open_source(NAME).revision
    asked = len(hub.requests)
    state(hub, tmp_path / "home", monkeypatch)
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALLEST))
    assert json.loads((tmp_path / "out" / "wina_report.json").read_text())["source"]["revision"] == commit
    assert (len(hub.requests) > asked) == (state is failing_hub)
    verify_folder(tmp_path / "out")


def test_a_type_that_does_not_convert_is_refused_before_its_weights_are_downloaded(
    hub: Hub, source: Path, tmp_path: Path
):
    folder = tmp_path / "odd"
    folder.mkdir()
    config = {"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], "vocab_size": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    hub.add("lab/odd", folder)
    result = run("lab/odd", "--out", tmp_path / "gated", "--quiet")
    refused(result, "'jetmoe'", "experts in a form that is not known")
    assert not [request.path for request in hub.requests if request.path.endswith(".safetensors")]
    assert not (tmp_path / "gated").exists()
