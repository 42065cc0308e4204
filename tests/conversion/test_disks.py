"""What a full, failing, vanished or read-only disk does to a conversion."""

import bisect
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.breaking import failing, fill, mounted, patch_call, remount
from support.commands import SMALL, contents, refused, run, succeeded
from support.folders import files_of
from support.interrupting import CALIBRATE, HIDDEN, STEPS, count_layers
from wina_convert.errors import CheckpointError

MODEL = "three layers"  # see support/shared.py


# The largest part of a conversion of `source` is its embeddings: the checkpoint has about a megabyte and a half.
DISK = "6m"


SAVE = "wina_convert.format.staging.Staging.save"
FULL_STEPS = [
    *((*step, True) for step in STEPS),
    (SAVE, 1, False, True),
    (SAVE, 2, True, True),
    (SAVE, 2, True, False),
    ("wina_convert.conversion.proof.prove", 1, True, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "call", "finished", "keep"), FULL_STEPS)
@pytest.mark.usefixtures("snapshots")
def test_a_disk_that_fills_up_is_one_line_and_resume_completes_on_a_larger_one(
    step: str,
    call: int,
    finished: bool,
    keep: bool,
    source: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "disk"
    out = disk / "out"
    with mounted(disk, DISK):
        with monkeypatch.context() as patched:
            patch_call(patched, step, call, lambda *args: fill(disk))
            result = run(source, "--out", out, "--quiet", *SMALL, *(() if keep else ("--no-keep",)))
        line = refused(result, f"the disk of {out} is full", "another --out")
        kept = keep and finished
        assert ("--resume" in line) == kept
        assert {path.name for path in disk.iterdir()} == {"ballast", *([HIDDEN] if kept else [])}
        if not kept:
            return
        remount(disk, "size=12m")
        layers = count_layers(monkeypatch)
        succeeded(run(source, "--out", out, "--resume", "--quiet", *SMALL))
        assert len(layers) < 3
        assert files_of(out) == files_of(converted)
        assert {path.name for path in disk.iterdir()} == {"ballast", "out"}


def test_a_disk_that_is_full_from_the_start_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, DISK):
        fill(disk)
        refused(run(source, "--out", disk / "out", "--quiet", *SMALL), "needs", "free", "another --out")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**12))
        for out in (disk / "out", disk / "new" / "out"):
            refused(run(source, "--out", out, "--quiet", *SMALL), f"the disk of {out} is full")
        assert [path.name for path in disk.iterdir()] == ["ballast"]


@pytest.mark.slow
def test_a_disk_that_was_large_enough_at_the_start_does_not_fill_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space that is asked for includes the snapshots, which are the larger part here."""
    disk = tmp_path / "disk"
    command = (
        source,
        "--out",
        disk / "out",
        "--quiet",
        "--samples",
        "64",
        "--seq-len",
        "32",
        "--targets",
        "*.o_proj",
        "--basis",
        "none",
    )
    with mounted(disk, "1m"):

        def accepted(kilobytes: int) -> bool:
            remount(disk, f"size={kilobytes}k")
            with monkeypatch.context() as patched:
                patched.setattr("wina_convert.conversion.pipeline.staged", failing(CheckpointError("that far")))
                return "that far" in refused(run(*command))

        enough = bisect.bisect(range(16000), False, key=accepted)
        assert not accepted(enough - 4)
        remount(disk, f"size={enough + 128}k")  # files take whole pages, and a few small ones are not counted
        succeeded(run(*command))


# Where the system may refuse: the place, and at which call, later than the first snapshot.
CALLS = [
    ("wina_convert.format.shard_writer.ShardWriter.write", 15, True),
    ("os.fsync", 4, True),
    ("pathlib.Path.replace", 2, True),
    ("wina_convert.format.staging.save_file", 2, True),
    ("shutil.copyfile", 1, True),
    ("huggingface_hub.ModelCard.save", 1, True),
    ("pathlib.Path.rename", 1, True),
    ("pathlib.Path.mkdir", 2, False),
]


CODES = [
    *((*call, code) for call in CALLS for code in (errno.ENOSPC, errno.EIO)),
    *((*CALLS[0], code) for code in (errno.EDQUOT, errno.ESTALE, errno.EROFS, errno.EACCES)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "call", "finished", "code"), CODES)
@pytest.mark.usefixtures("snapshots")
def test_what_the_system_refuses_is_one_line_and_can_be_resumed(
    place: str,
    call: int,
    finished: bool,
    code: int,
    source: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patch_call(patched, place, call, failing(OSError(code, os.strerror(code))))
        result = run(source, "--out", tmp_path / "out", "--quiet", *SMALL)
    full = code in (errno.ENOSPC, errno.EDQUOT)
    line = refused(result, str(tmp_path / "out"), "full" if full else os.strerror(code), "another --out")
    assert ("--resume" in line) == finished
    assert [path.name for path in tmp_path.iterdir()] == ([HIDDEN] if finished else [])
    if finished and code == errno.EIO:
        layers = count_layers(monkeypatch)
        succeeded(run(source, "--out", tmp_path / "out", "--resume", "--quiet", *SMALL))
        assert len(layers) < 3
        assert files_of(tmp_path) == {f"out/{name}": content for name, content in files_of(converted).items()}


@pytest.mark.usefixtures("snapshots")
def test_a_disk_that_is_gone_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"

    def unmount(*args: object) -> None:
        subprocess.run(["umount", "--lazy", disk], check=True)

    with mounted(disk, DISK):
        patch_call(monkeypatch, CALIBRATE, 2, unmount)
        line = refused(run(source, "--out", disk / "out", "--quiet", *SMALL), f"{disk / 'out'} cannot be written")
        assert "--resume" not in line
        assert contents(disk) == {}


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let the system refuse to write files larger than this: a disk that fails, without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_a_write_is_one_line(source: Path, tmp_path: Path) -> None:
    with largest_file(100_000):
        result = run(source, "--out", tmp_path / "out", "--quiet", *SMALL)
    refused(result, str(tmp_path / "out"), "cannot be written", "another --out", "nothing was left behind")
    assert contents(tmp_path) == {}


def test_a_disk_with_too_little_space_is_refused_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**12, used=10**12, free=1000))
    monkeypatch.setattr(
        "wina_convert.conversion.sample.read_sequences", failing(AssertionError("calibration text was read"))
    )
    out = tmp_path / "out"
    for dry in ((), ("--dry-run",)):
        refused(run(source, "--out", out, *dry), f"{out} needs", str(tmp_path), "free", "another --out")
    assert contents(tmp_path) == {}


def test_a_read_only_disk_is_refused_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina_convert.conversion.pipeline.open_source", failing(AssertionError("opened")))
    disk = tmp_path / "disk"
    with mounted(disk, DISK):
        remount(disk, "ro")
        for out in (disk / "out", disk / "new" / "out"):
            refused(run(source, "--out", out, "--quiet", *SMALL), f"{out} cannot be written", str(disk), "read-only")


def test_a_read_only_folder_is_refused_before_the_source_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root, everything is writable
    monkeypatch.setattr("wina_convert.conversion.pipeline.open_source", failing(AssertionError("opened")))
    out = tmp_path / "out"
    refused(run("some/model", "--out", out), f"{out} cannot be written", str(tmp_path), "another --out")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_lock_that_cannot_be_made_is_one_line(
    code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filelock.FileLock.acquire", failing(OSError(code, os.strerror(code))))
    out = tmp_path / "new" / "out"
    refused(run(source, "--out", out, *SMALL, "--quiet"), str(out), "another --out", "nothing was left behind")
    assert contents(tmp_path) == {}


def test_a_target_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    refused(run(source, "--out", out, *SMALL), f"{out} cannot be written", "another --out")
    assert contents(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_is_refused(length: int, source: Path, tmp_path: Path) -> None:
    """The names of the hidden files beside the target are longer."""
    refused(run(source, "--out", tmp_path / ("x" * length), *SMALL, "--quiet"), "cannot be written", "another --out")
    assert contents(tmp_path) == {}
