"""The Hub's cache as it lies on the disk: snapshots of links to blobs, subfolders, names."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from support.commands import SMALLEST, refused, run, succeeded
from support.folders import tensors_of
from wina_convert import load
from wina_convert.models.source import open_source

MODEL = "kilobytes"
COMMIT = "a" * 40


def in_cache(folder: Path, hub: Path, inner: str = "") -> Path:
    """A folder as a download leaves it: links from a snapshot, or a folder in it, to blobs."""
    repository = hub / "models--org--model"
    place = repository / "snapshots" / COMMIT / inner
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        link, blob = place / path.relative_to(folder), repository / "blobs" / f"{len(str(path)):02}{path.name}"
        for made in (link, blob):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return place


def test_a_snapshot_is_called_as_on_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = in_cache(source, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    for way in (snapshot, snapshot.relative_to(tmp_path), snapshot.parent.parent):
        found = open_source(str(way))
        assert (found.name, found.revision, found.path) == ("org/model", COMMIT, snapshot)
    succeeded(run(snapshot, "--out", tmp_path / "out", *SMALLEST))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/model"
    assert card.text.lstrip().startswith("# model-wina")
    assert json.loads((tmp_path / "out" / "wina_report.json").read_text())["source"] == {
        "name": "org/model",
        "revision": COMMIT,
    }


def test_a_model_in_a_subfolder_of_a_snapshot_converts(source: Path, tmp_path: Path):
    folder = in_cache(source, tmp_path / "hub", "step-1000")
    succeeded(run(folder, "--out", tmp_path / "out", *SMALLEST))
    succeeded(run(source, "--out", tmp_path / "plain", *SMALLEST))
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/model"
    assert f"https://huggingface.co/org/model/tree/{COMMIT}/step-1000" in card.text
    download = f"hf download org/model --revision {COMMIT} --include 'step-1000/*' --local-dir model"
    assert f"`{download} && wina-convert model/step-1000 --out DIR " in card.text


@pytest.mark.parametrize("inner", ["", "wina"])
def test_a_checkpoint_in_a_snapshot_loads(inner: str, converted: Path, tmp_path: Path):
    folder = in_cache(converted, tmp_path / "hub", inner)
    tokens = torch.arange(8)[None]
    expected = load(str(converted))(tokens).logits
    assert torch.equal(load(str(folder))(tokens).logits, expected)
    if inner:
        snapshot = folder.parent
        assert torch.equal(load(str(snapshot), subfolder=inner)(tokens).logits, expected)


def test_a_link_from_a_subfolder_to_what_is_no_blob_is_refused(source: Path, tmp_path: Path):
    folder = in_cache(source, tmp_path / "hub", "step-1000")
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    refused(run(folder, "--out", tmp_path / "out"), "config.json", "out of the folder")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 16060556376\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, source: Path, tmp_path: Path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / name).write_text(POINTER)
    refused(
        run(folder, "--out", tmp_path / "out", "--quiet", "--basis", "none"), name, "pointer of git-lfs", "git lfs pull"
    )
    assert not (tmp_path / "out").exists()
