"""The hidden folder in which a conversion works: one at a time, and a checkpoint appears whole or not at all."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import filelock
import pytest

from support.breaking import failing, patch_call
from support.commands import SMALL, contents, refused, run, succeeded
from support.folders import files_of
from support.interrupting import ASIDE, CALIBRATE, FAST, HIDDEN, fail_after, stage
from support.killing import Child
from wina_convert import convert
from wina_convert.errors import CheckpointError, VerificationError
from wina_convert.format.names import REPORT, SNAPSHOT
from wina_convert.format.staging import recover

pytestmark = pytest.mark.slow

MODEL = "three layers"  # see support/shared.py


# --- the hidden folder ---


def test_a_staged_folder_becomes_the_target(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        (staging.folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
        assert staging.folder.parent == tmp_path  # the same disk, so that it can be renamed
        assert staging.snapshot is None
    assert contents(tmp_path) == {"out": b"(folder)", "out/file": b"x", f"out/{REPORT}": b"{}"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FROM_OUTSIDE = [
    KeyboardInterrupt(),
    SystemExit(1),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    RuntimeError("out of memory"),
]


@pytest.mark.parametrize("error", [*FROM_OUTSIDE, VerificationError("wrong")], ids=repr)
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "no-keep"])
@pytest.mark.parametrize("old", [True, False], ids=["overwrite", "new"])
def test_what_an_error_leaves(error: BaseException, layers: int, keep: bool, old: bool, tmp_path: Path) -> None:
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / REPORT).write_text("old")
    before = contents(tmp_path)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        fail_after(layers, error, tmp_path / "out", keep=keep, overwrite=old)
    kept = {name: content for name, content in contents(tmp_path).items() if name.startswith(HIDDEN)}
    if keep and layers and error in FROM_OUTSIDE:
        assert kept.keys() == {HIDDEN, f"{HIDDEN}/weights", f"{HIDDEN}/{SNAPSHOT}"}
    else:
        assert kept == {}
    assert contents(tmp_path) == before | kept
    if isinstance(error, (OSError, KeyboardInterrupt)):
        assert ("--resume" in str(caught.value)) == bool(kept)


@pytest.mark.parametrize("layers", [0, 1])
def test_parents_made_for_a_target_disappear_with_the_rest(layers: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_after(layers, KeyboardInterrupt(), tmp_path / "new" / "deep" / "out")
    assert (tmp_path / "new" / "deep" / HIDDEN).exists() == (tmp_path / "new").exists() == bool(layers)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "no-keep"])
def test_an_error_while_publishing_keeps_what_was_there(
    keep: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / REPORT).write_text("old")
    before = contents(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == HIDDEN:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail_once)
        with (
            pytest.raises((CheckpointError, KeyboardInterrupt)) as caught,
            stage(tmp_path / "out", keep=keep, overwrite=True),
        ):
            pass
    kept = {name: content for name, content in contents(tmp_path).items() if name.startswith(HIDDEN)}
    assert contents(tmp_path) == before | kept
    assert ("--resume" in str(caught.value)) == bool(kept) == keep
    with stage(tmp_path / "out", resume=True, overwrite=True) as staging:
        assert (staging.snapshot is not None) == keep
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / REPORT).read_text() == "{}"


def test_recover_puts_back_a_checkpoint_that_was_moved_aside(tmp_path: Path) -> None:
    (tmp_path / ASIDE).mkdir()
    (tmp_path / ASIDE / "file").write_text("old")
    recover(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"(folder)", "out/file": b"old"}
    recover(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"(folder)", "out/file": b"old"}


def test_recover_removes_what_was_replaced(tmp_path: Path) -> None:
    for name, text in (("out", "new"), (ASIDE, "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    recover(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"(folder)", "out/file": b"new"}


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_checkpoint_that_was_moved_aside_is_not_replaced_unasked(
    options: tuple[str, ...], source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two renames, `--overwrite` leaves a target that is not there and must count as there."""
    monkeypatch.setattr(CALIBRATE, failing(AssertionError("it was refused too late")))
    shutil.copytree(converted, tmp_path / ASIDE)
    refused(run(source, "--out", tmp_path / "out", "--sparsity", "0.25", *options, *SMALL, "--quiet"), "--overwrite")
    assert files_of(tmp_path) == {f"out/{name}": content for name, content in files_of(converted).items()}


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_what_appears_at_the_target_meanwhile_is_not_replaced(
    options: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*args: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("precious")

    patch_call(monkeypatch, "wina_convert.conversion.card.write_card", 1, appear)
    result = run(source, "--out", tmp_path / "out", *options, *SMALL, "--quiet")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"
    refused(result, str(tmp_path / "out"))


# --- one conversion to a target at a time ---


def test_a_second_conversion_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with stage(tmp_path / "out") as staging:
        (staging.folder / "file").write_text("x")
        staging.save(1, {})
        before = contents(tmp_path)
        for out in (tmp_path / "out", tmp_path / "link", tmp_path / "deep" / ".." / "out"):
            with pytest.raises(CheckpointError, match=r"another conversion .* running"), stage(out, overwrite=True):
                pass
        assert contents(tmp_path) == before
        with stage(tmp_path / "elsewhere"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "x"
    with stage(tmp_path / "out", overwrite=True):
        pass


def test_a_conversion_in_another_process_refuses_the_command_until_it_is_killed(source: Path, tmp_path: Path) -> None:
    arguments = {"model": str(source), "out": tmp_path / "out", **FAST}
    out = tmp_path / "out"
    other = Child(convert, arguments, tmp_path, at=60, wait=True)
    try:
        other.wait_for_event()
        before = contents(tmp_path)
        assert f"{HIDDEN}/model.safetensors" in before
        for options in ((), ("--resume",), ("--overwrite",)):
            refused(run(source, "--out", out, *options, *SMALL, "--quiet"), f"another conversion to {out} is running")
        assert contents(tmp_path) == before
    finally:
        assert other.end(0).killed
    succeeded(run(source, "--out", out, "--resume", *SMALL, "--quiet"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_lock_is_given_twice_while_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the release of a lock and the removal of its file, another conversion may take it."""
    path = tmp_path / ".out.wina-lock"
    second = filelock.FileLock(path)
    release = filelock.FileLock.release

    def release_to_another(self: filelock.FileLock, *args: Any, **kwargs: Any) -> None:
        release(self, *args, **kwargs)
        monkeypatch.undo()
        second.acquire(blocking=False)

    with stage(tmp_path / "out"):
        monkeypatch.setattr(filelock.FileLock, "release", release_to_another)
    assert second.is_locked
    with pytest.raises(CheckpointError, match="running"), stage(tmp_path / "out"):
        pass


# --- what is on the disk, not only on its way to it ---


def test_nothing_is_relied_on_that_a_power_cut_could_take(source: Path, tmp_path: Path) -> None:
    """A snapshot says that weights are there, and the target's name that all is."""
    model = shutil.copytree(source, tmp_path / "source")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = {"model": str(model), "out": folder / "out", "max_shard_size": "100KB", **FAST}
    events = [event.split() for event in Child(convert, arguments, folder).end().events]
    written: set[str] = set()
    snapshots = published = 0
    for verb, *paths in events:
        if verb == "fsync":
            written -= set(paths)
        elif verb == "write" or (verb == "open" and paths[1:] == ["w"]):
            written |= {paths[0], str(Path(paths[0]).parent)}
        elif verb == "os.rename" and paths[1] == f"{HIDDEN}/{SNAPSHOT}":
            assert {path for path in written if path.endswith((".safetensors", SNAPSHOT, ".new"))} == set()
            snapshots += 1
        elif verb == "os.rename" and paths == [HIDDEN, "out"]:
            assert written == set()
            published += 1
            written.add(str(folder))
    assert snapshots >= 2
    assert published == 1
    assert str(folder) not in written
