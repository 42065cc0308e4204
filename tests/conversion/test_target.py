"""A checkpoint never takes the place of something else."""

import shutil
from pathlib import Path

import pytest

from support.commands import SMALL, contents, refused, run, succeeded
from wina_convert.format.checkpoint import open_checkpoint

MODEL = "one layer"  # see support/shared.py


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize(
    ("options", "words"),
    [((), ("exists", "--out", "--overwrite")), (("--overwrite",), ("not a WINA checkpoint", "another --out"))],
    ids=["plain", "overwrite"],
)
def test_a_folder_that_exists_is_refused(options, words, dry: tuple[str, ...], source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    refused(run(source, "--out", tmp_path / "out", *options, *dry), str(tmp_path / "out"), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_file_in_the_place_of_the_target_is_refused(options: tuple[str, ...], source: Path, tmp_path: Path):
    (tmp_path / "out").write_text("precious")
    refused(run(source, "--out", tmp_path / "out", *options), str(tmp_path / "out"), "is a file", "another --out")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize(
    "way", ["source", "source/out", "source/deep/out", ".", "link", "link/out", "../{}/source/out"]
)
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_target_in_the_source_or_around_it_is_refused(
    way: str, options: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    refused(run("source", "--out", way.format(tmp_path.name), *options), "one inside the other", "another --out")
    assert contents(tmp_path) == before


def test_a_source_behind_a_link_is_protected_too(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    refused(run(tmp_path / "link", "--out", tmp_path / "source" / "out"), "one inside the other")


def test_an_empty_folder_is_a_target(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    succeeded(run(source, "--out", tmp_path / "out", *SMALL))
    open_checkpoint(tmp_path / "out")


def test_missing_parents_of_a_target_are_made(source: Path, tmp_path: Path):
    succeeded(run(source, "--out", tmp_path / "new" / "deep" / "out", *SMALL))
    open_checkpoint(tmp_path / "new" / "deep" / "out")


def test_overwrite_replaces_a_checkpoint_and_leaves_nothing_of_it(source: Path, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    (out / "added.txt").write_text("from before")
    succeeded(run(source, "--out", out, "--overwrite", "--sparsity", "0.25", *SMALL))
    assert open_checkpoint(out).config.sparsity == 0.25
    assert not (out / "added.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_through_a_link_keeps_the_link(source: Path, converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "real")
    (tmp_path / "out").symlink_to("real", target_is_directory=True)
    succeeded(run(source, "--out", tmp_path / "out", "--overwrite", "--sparsity", "0.25", *SMALL))
    assert (tmp_path / "out").is_symlink()
    assert open_checkpoint(tmp_path / "real").config.sparsity == 0.25
