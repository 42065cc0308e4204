"""A checkpoint from a stranger: no link leads out of its folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from support.breaking import within
from support.commands import contents, refused, run_wina, succeeded
from support.strangers import COMMANDS, HANG, INDEX, REPORT, SHARD, SINGLE, Watch, all_refuse, command, logits_of, plain
from wina_convert import load
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

LINKED = ["config.json", SHARD, INDEX, "tokenizer.json", REPORT, MANIFEST, "README.md", "docs"]


def test_the_watch_sees_what_any_library_opens(single: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(single / SINGLE)
    with Watch(single / SINGLE) as watch:
        os.stat(tmp_path / "link")
        assert not watch.opened()
        with safe_open(tmp_path / "link", "pt"):
            assert watch.opened()
        (tmp_path / "link").read_bytes()
        assert watch.opened()


def lead_out(path: Path, way: str) -> Path:
    """Move a file or folder out of its checkpoint, and put a link in its place."""
    outside = path.parent.parent / "outside"
    outside.mkdir()
    target = Path(shutil.move(path, outside / path.name))
    if way == "chain":
        (path.parent / "step").symlink_to(target)
        path.symlink_to("step")
    else:
        path.symlink_to(target if way == "absolute" else Path("../outside") / path.name)
    return target


@pytest.mark.parametrize("way", ["absolute", "relative", "chain"])
@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_refused_and_not_followed(name: str, way: str, sharded: Path):
    target = lead_out(sharded / name, way)
    with Watch(target, *target.parent.rglob("*")) as watch:
        all_refuse(sharded, "link or path out of the folder")
        assert not watch.opened()


@pytest.mark.parametrize("name", LINKED)
def test_plain_transformers_refuses_it_too_and_reads_no_linked_weights(name: str, sharded: Path):
    target = lead_out(sharded / name, "relative")
    with Watch(target, *target.parent.rglob("*")) as watch:
        with pytest.raises(CheckpointError, match="link or path out of the folder"):
            plain(sharded)
        # config and index are read by transformers before it asks this package
        assert not watch.opened() or name in ("config.json", INDEX)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_to_what_is_not_there_is_refused(name: str, sharded: Path):
    shutil.rmtree(sharded / name) if name == "docs" else (sharded / name).unlink()
    (sharded / name).symlink_to("nowhere")
    all_refuse(sharded)


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX, "tokenizer.json", "extra"])
def test_links_in_a_circle_are_refused(name: str, sharded: Path):
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to("around")
    (sharded / "around").symlink_to(name)
    all_refuse(sharded)


def test_a_folder_that_is_a_link_to_the_checkpoint_is_read(three: Path, tmp_path: Path, logits: Tensor):
    (tmp_path / "link").symlink_to(three, target_is_directory=True)
    assert torch.equal(logits_of(load(str(tmp_path / "link"))), logits)
    assert torch.equal(logits_of(plain(tmp_path / "link")), logits)
    assert inspect_checkpoint(tmp_path / "link").layers == inspect_checkpoint(three).layers
    verify_folder(tmp_path / "link")


def test_links_within_the_folder_are_followed(sharded: Path, logits: Tensor):
    (sharded / "real").mkdir()
    for name in LINKED:
        if name != MANIFEST:
            shutil.move(sharded / name, sharded / "real" / name)
            (sharded / name).symlink_to(Path("real") / name)
    write_manifest(sharded)
    assert torch.equal(logits_of(load(str(sharded))), logits)
    assert torch.equal(logits_of(plain(sharded)), logits)
    verify_folder(sharded)
    for name in COMMANDS:
        succeeded(command(name, sharded))
    assert not (sharded / "config.json").is_symlink()  # retarget put a file in its place
    assert json.loads((sharded / "real" / "config.json").read_text())["quantization_config"]["sparsity"] == 0.5


def as_in_the_cache(folder: Path, home: Path) -> Path:
    """A checkpoint as the Hub's cache holds it: links from a snapshot to blobs that are named by their hash."""
    blobs, snapshot = home / "models--lab--small" / "blobs", home / "models--lab--small" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_the_layout_of_the_hubs_cache_is_read(three: Path, tmp_path: Path, logits: Tensor):
    snapshot = as_in_the_cache(three, tmp_path)
    blobs = contents(tmp_path / "models--lab--small" / "blobs")
    assert torch.equal(logits_of(load(str(snapshot))), logits)
    assert torch.equal(logits_of(plain(snapshot)), logits)
    assert inspect_checkpoint(snapshot).layers == inspect_checkpoint(three).layers
    verify_folder(snapshot)
    for name in COMMANDS:
        succeeded(command(name, snapshot))
    assert contents(tmp_path / "models--lab--small" / "blobs") == blobs


@pytest.mark.parametrize("way", ["../../../outside", "../other/file", "../../blobs/../../outside", "../../refs/main"])
def test_a_link_from_a_snapshot_to_what_is_no_blob_is_refused(way: str, three: Path, tmp_path: Path):
    snapshot = as_in_the_cache(three, tmp_path)
    target = snapshot / way
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(three / "tokenizer.json", target)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(way)
    with Watch(target) as watch:
        all_refuse(snapshot, "'tokenizer.json'", "link or path out of the folder")
        assert not watch.opened()


def test_a_folder_beside_that_is_called_blobs_is_no_cache(three: Path, tmp_path: Path):
    snapshot = as_in_the_cache(three, tmp_path)
    moved = snapshot.parent.rename(snapshot.parent.parent / "elsewhere") / snapshot.name
    all_refuse(moved, "link or path out of the folder")


def test_verify_does_not_read_through_a_hidden_link(single: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    (single / ".hidden").symlink_to("../secret")
    write_manifest(single)  # whose hash would tell what the file holds
    with Watch(tmp_path / "secret") as watch:
        with pytest.raises(WinaError, match="hidden"):
            verify_folder(single)
        assert not watch.opened()


@pytest.mark.parametrize("name", [".config.json.new", f".{MANIFEST}.new", ".README.md.new"])
def test_retarget_does_not_write_through_a_link(name: str, single: Path, tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    (single / name).symlink_to("../precious")
    result = run_wina("retarget", single, "--sparsity", "0.25")
    assert (tmp_path / "precious").read_text() == "precious"
    assert result.exit_code == 0 or refused(result)


@pytest.mark.parametrize("name", [".config.json.new", f".{MANIFEST}.new"])
def test_retarget_does_not_wait_for_a_pipe(name: str, single: Path):
    os.mkfifo(single / name)
    with within(HANG):
        result = run_wina("retarget", single, "--sparsity", "0.25")
    assert result.exit_code == 0 or refused(result)
