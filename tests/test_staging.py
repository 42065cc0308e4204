"""What an interrupted conversion leaves, what continues it to the same bytes, and what a bad disk does to it."""

import bisect
import errno
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from breaking import failing, fill, mounted, patch_call, remount
from commands import SMALL, contents, refused, run, succeeded
from families import make_model
from folders import files_of
from killing import Child
from safetensors.torch import load_file, save_file

from wina_convert import convert
from wina_convert.checkpoint import REPORT
from wina_convert.errors import CheckpointError, VerificationError, WinaError
from wina_convert.integrity import verify_folder
from wina_convert.shards import INDEX
from wina_convert.staging import SNAPSHOT, Staging, recover, staged

HIDDEN = ".out.wina-staging"  # for a target named "out"
ASIDE = ".out.wina-replaced"
CALIBRATE = "wina_convert.layers.calibrate_layer"
CLOCK = "wina_convert.layers.time"
FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "batch_size": 24}  # SMALL, for Python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three layers with random weights. Shared: copy it to change it."""
    return make_model("llama", tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, converted without a break. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    succeeded(run(source, "--out", out, *SMALL))
    return out


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot after every layer: time stands still, so none costs anything."""
    monkeypatch.setattr(CLOCK, SimpleNamespace(monotonic=lambda: 0.0))


@pytest.fixture(scope="module")
def unfinished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conversion to `out` that was interrupted in its third layer. Shared: copy it."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CLOCK, SimpleNamespace(monotonic=lambda: 0.0))
        interrupt_in_layer(patched, 3)
        assert run(source, "--out", folder / "out", *SMALL, "--quiet").exit_code == 130
    return folder


def interrupt_in_layer(patched: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt the n-th layer that is calibrated from now on."""
    patch_call(patched, CALIBRATE, number, failing(KeyboardInterrupt()))


@contextmanager
def stage(out: Path, identity: dict[str, Any] | None = None, **options: bool) -> Iterator[Staging]:
    """`staged` for a conversion of four layers, finished at the end of the with-block, with a report as all have."""
    how = {"resume": False, "keep": True, "overwrite": False} | options
    with staged(out, {"options": {"seed": 0}} if identity is None else identity, **how) as staging:
        yield staging
        (staging.folder / REPORT).write_text("{}")
        staging.save(4, {})


def fail_after(layers: int, error: BaseException, out: Path, **options: Any) -> None:
    """A conversion that fails when so many layers are finished."""
    with stage(out, **options) as staging:
        (staging.folder / "weights").write_text(f"of {layers} layers")
        if layers:
            staging.save(layers, {"state": torch.arange(3), "other": torch.tensor(0.5, dtype=torch.float64)})
        raise error


def leave_unfinished(out: Path, **options: Any) -> None:
    """What a conversion leaves that was interrupted after two layers."""
    with pytest.raises(KeyboardInterrupt):
        fail_after(2, KeyboardInterrupt(), out, **options)


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

    patch_call(monkeypatch, "wina_convert.conversion.write_card", 1, appear)
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


# --- resume ---


def test_resume_continues_from_the_snapshot(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with stage(tmp_path / "out", resume=True) as staging:
        assert staging.snapshot is not None
        assert staging.snapshot.layers == 2
        assert staging.snapshot.tensors.keys() == {"state", "other"}
        assert torch.equal(staging.snapshot.tensors["state"], torch.arange(3))
        assert (staging.folder / "weights").read_text() == "of 2 layers"
    assert (tmp_path / "out" / "weights").exists()


def test_a_later_snapshot_replaces_an_earlier_one(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with pytest.raises(SystemExit):
        fail_after(3, SystemExit(), tmp_path / "out", resume=True)
    with stage(tmp_path / "out", resume=True) as staging:
        assert staging.snapshot is not None
        assert staging.snapshot.layers == 3


def test_an_unfinished_conversion_is_neither_continued_nor_discarded_unasked(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 layers done.*--resume.*--overwrite"), stage(tmp_path / "out"):
        pass
    assert contents(tmp_path) == before


def test_overwrite_discards_an_unfinished_conversion(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with stage(tmp_path / "out", overwrite=True) as staging:
        assert staging.snapshot is None
        assert list(staging.folder.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_what_was_killed_before_its_first_snapshot_begins_anew(resume: bool, tmp_path: Path) -> None:
    (tmp_path / HIDDEN).mkdir()
    (tmp_path / HIDDEN / "weights").write_text("of no layer")
    (tmp_path / HIDDEN / f"{SNAPSHOT}.new").write_text("half a snapshot")
    (tmp_path / ".out.wina-lock").touch()
    with stage(tmp_path / "out", resume=resume) as staging:
        assert staging.snapshot is None
        assert list(staging.folder.iterdir()) == []
    assert contents(tmp_path) == {"out": b"(folder)", f"out/{REPORT}": b"{}"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"source": {"config.json": "a", "x": [1, 2]}, "seed": 1}, "seed was 0 and is 1"),
        ({"source": {"config.json": "b", "x": [1, 2]}, "seed": 0}, "source.config.json was 'a' and is 'b'"),
        ({"source": {"config.json": "a", "x": [1, 3]}, "seed": 0}, "source.x was [1, 2] and is [1, 3]"),
        ({"source": {"config.json": "a"}, "seed": 0}, "source.x was [1, 2] and is None"),
        ({"source": {"config.json": "a", "x": [1, 2], "y": 3}, "seed": 0}, "source.y was None and is 3"),
        ({"source": "a", "seed": 0}, "source was"),
    ],
)
def test_resume_refuses_something_else(now: dict[str, Any], said: str, tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out", identity={"source": {"config.json": "a", "x": [1, 2]}, "seed": 0})
    before = contents(tmp_path)
    with (
        pytest.raises(CheckpointError, match=re.escape(said)) as caught,
        stage(tmp_path / "out", resume=True, identity=now),
    ):
        pass
    assert "--overwrite" in str(caught.value)
    assert contents(tmp_path) == before


def rewritten(path: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(path), path, metadata)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: cut(path, 0),
    "no header": lambda path: cut(path, 7),
    "half a header": lambda path: cut(path, 100),
    "a byte is missing": lambda path: cut(path, -1),
    "random": lambda path: path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes()),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "no metadata": lambda path: rewritten(path, None),
    "no identity": lambda path: rewritten(path, {"layers": "2"}),
    "identity cut off": lambda path: rewritten(path, {"layers": "2", "identity": '{"options": {'}),
    "no number of layers": lambda path: rewritten(path, {"layers": "two", "identity": '{"options": {"seed": 0}}'}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_snapshot_is_refused_and_can_be_overwritten(damage: Callable[[Path], object], tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    damage(tmp_path / HIDDEN / SNAPSHOT)
    before = contents(tmp_path)
    for resume in (True, False):
        with pytest.raises(CheckpointError), stage(tmp_path / "out", resume=resume):
            pass
        assert contents(tmp_path) == before
    with stage(tmp_path / "out", overwrite=True) as staging:
        assert staging.snapshot is None


def interrupted_in_layer(number: int, source: Path, out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in_layer(patched, number)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), out, **options, **FAST)


def count_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by an entry for every layer that is calibrated from now on."""
    layers: list[int] = []
    calibrate_layer = pkgutil.resolve_name(CALIBRATE)

    def counted(*args: Any) -> Any:
        layers.append(1)
        return calibrate_layer(*args)

    monkeypatch.setattr(CALIBRATE, counted)
    return layers


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (2, {}),
        (3, {}),
        (3, {"plot": True}),
        (2, {"dtype": "bfloat16", "max_shard_size": "100KB"}),
        (3, {"targets": ["mlp"], "sparsity": 0.3}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("snapshots")
def test_a_resumed_conversion_gives_the_same_bytes(
    layer: int, options: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = convert(str(source), tmp_path / "at-once", **options, **FAST)
    interrupted_in_layer(layer, source, tmp_path / "out", **options)
    layers = count_layers(monkeypatch)
    assert convert(str(source), tmp_path / "out", resume=True, **options, **FAST) == report
    assert len(layers) == 3 - (layer - 1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at-once")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "at-once"}
    verify_folder(tmp_path / "out")


@pytest.mark.usefixtures("snapshots")
def test_resume_after_resume_over_an_old_checkpoint(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(str(source), out, sparsity=0.25, **FAST)
    before = files_of(out)
    for _ in range(2):  # a layer further each time
        interrupted_in_layer(2, source, out, resume=True, overwrite=True)
        assert files_of(out) == before
    layers = count_layers(monkeypatch)
    convert(str(source), out, resume=True, overwrite=True, **FAST)
    assert len(layers) == 1
    assert files_of(out) == files_of(converted)


def test_resume_with_nothing_unfinished_converts(source: Path, converted: Path, tmp_path: Path) -> None:
    succeeded(run(source, "--out", tmp_path / "out", "--resume", *SMALL))
    assert files_of(tmp_path / "out") == files_of(converted)


def test_the_command_refuses_an_unfinished_conversion_and_resumes_it_when_told(
    unfinished: Path, source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(unfinished, tmp_path / "folder")
    before = contents(folder)
    line = refused(run(source, "--out", folder / "out", *SMALL, "--quiet"), str(folder / "out"), "2 layers done")
    assert "--resume" in line
    assert "--overwrite" in line
    assert contents(folder) == before
    layers = count_layers(monkeypatch)
    succeeded(run(source, "--out", folder / "out", "--resume", *SMALL))
    assert len(layers) == 1
    assert files_of(folder) == {f"out/{name}": content for name, content in files_of(converted).items()}


# What may not change before `--resume`, and a word of the message. The calibration text is a file in all of them.
CHANGED_OPTIONS: list[tuple[tuple[str, ...], str]] = [
    (("--sparsity", "0.4"), "sparsity"),
    (("--samples", "7"), "samples"),
    (("--seq-len", "16"), "seq_len"),
    (("--batch-size", "5"), "batch_size"),
    (("--seed", "3"), "seed"),
    (("--device", "cpu:0"), "device"),
    (("--dtype", "bfloat16"), "dtype"),
    (("--max-shard-size", "100KB"), "max_shard_size"),
    (("--targets", "mlp"), "targets"),
    (("--ignore", "*.q_proj"), "ignore"),
    (("--plot",), "plot"),
    (("--calibration", "bundled"), "calibration"),
]


@pytest.fixture(scope="module")
def unfinished_of_text(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a calibration text and an unfinished conversion to `out`. Shared: copy it."""
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(source, folder / "source")
    (folder / "text.txt").write_text("".join(f"Sentence {n} of a text is here. " for n in range(1000)))
    with pytest.MonkeyPatch.context() as patched:
        interrupt_in_layer(patched, 2)
        assert resumed(folder).exit_code == 130
    return folder


def resumed(folder: Path, *options: str) -> Any:
    model, out, text = (folder / name for name in ("source", "out", "text.txt"))
    return run(model, "--out", out, "--calibration", text, "--resume", "--quiet", *SMALL, *options)


def refused_and_left(folder: Path, word: str, *options: str) -> None:
    before = contents(folder)
    line = refused(resumed(folder, *options), "of something else", "--overwrite")
    assert word in line.partition("something else")[2], line
    assert contents(folder) == before


def test_resume_with_nothing_changed_goes_on(unfinished_of_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    succeeded(resumed(folder))
    verify_folder(folder / "out")


@pytest.mark.parametrize(("options", "word"), CHANGED_OPTIONS)
def test_resume_names_the_option_that_changed(
    options: tuple[str, ...], word: str, unfinished_of_text: Path, tmp_path: Path
) -> None:
    refused_and_left(shutil.copytree(unfinished_of_text, tmp_path / "folder"), word, *options)


def change_number(path: Path) -> None:
    """Another number of the same length: the size of the file stays."""
    text = path.read_text()
    path.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert path.read_text() != text


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


def change_text(path: Path) -> None:
    path.write_text(path.read_text().replace("Sentence", "Paragraph"))


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("source/config.json", change_number, "config.json"),
        ("source/model.safetensors", flip_last_byte, "model.safetensors"),
        ("source/model.safetensors", touch, "model.safetensors"),
        ("text.txt", change_text, "calibration"),
    ],
)
def test_resume_names_the_file_that_changed(
    file: str, change: Callable[[Path], None], word: str, unfinished_of_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    change(folder / file)
    refused_and_left(folder, word)


def test_resume_refuses_another_source(unfinished_of_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    (folder / "source").rename(folder / "another")
    (folder / "source").symlink_to("another")
    refused_and_left(folder, "another")


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("wina_convert.conversion.torch.__version__", "torch"),
        ("wina_convert.conversion.transformers.__version__", "transformers"),
        ("wina_convert.conversion.__version__", "wina-convert"),
    ],
)
def test_resume_names_the_version_that_changed(
    place: str, word: str, unfinished_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(unfinished_of_text, tmp_path / "folder")
    monkeypatch.setattr(place, "99.9.9")
    refused_and_left(folder, word)


def test_snapshots_cost_at_most_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model("llama", tmp_path / "source", num_hidden_layers=12)
    now, saved = 0.0, []
    calibrate_layer, save = pkgutil.resolve_name(CALIBRATE), Staging.save

    def calibrate_in_a_second(*args: Any) -> Any:
        nonlocal now
        now += 1
        return calibrate_layer(*args)

    def save_in_a_quarter(self: Staging, layers: int, tensors: Any) -> None:
        nonlocal now
        now += 0.25
        saved.append(layers)
        save(self, layers, tensors)

    monkeypatch.setattr(CLOCK, SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(CALIBRATE, calibrate_in_a_second)
    monkeypatch.setattr(Staging, "save", save_in_a_quarter)
    convert(str(source), tmp_path / "out", samples=1, seq_len=8, targets=["*.o_proj"])
    assert saved == [1, 6, 11, 12]  # and the last, after which the checks can still be interrupted


@pytest.mark.parametrize("leaf", ["weight_t", "thresholds"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut(path, -80)], ids=["lost", "cut off"])
@pytest.mark.usefixtures("snapshots")
def test_a_shard_that_was_lost_meanwhile_is_noticed(
    damage: Callable[[Path], object], leaf: str, source: Path, tmp_path: Path
) -> None:
    """In place of tensors that were written before, there would be zeros."""
    options = {"max_shard_size": "0.1KB"}  # a shard for each of these tensors
    interrupted_in_layer(3, source, tmp_path / "out", **options)
    shards = json.loads((tmp_path / HIDDEN / INDEX).read_text())["weight_map"]
    name = f"model.layers.0.mlp.down_proj.{leaf}"
    assert list(shards.values()).count(shards[name]) == 1
    damage(tmp_path / HIDDEN / shards[name])
    with pytest.raises(WinaError):
        convert(str(source), tmp_path / "out", resume=True, **options, **FAST)
    assert not (tmp_path / "out").exists()


# --- interrupts ---

# A function of a conversion, at which call of it something happens, and whether a layer is finished by then.
STEPS = [
    ("wina_convert.conversion.write_layers", 1, False),
    (CALIBRATE, 1, False),
    (CALIBRATE, 2, True),
    ("wina_convert.conversion.write_config", 1, True),
    ("wina_convert.conversion.copy_sidecars", 1, True),
    ("wina_convert.conversion.verify", 1, True),
    ("wina_convert.conversion.write_card", 1, True),
    ("wina_convert.conversion.write_manifest", 1, True),
]


@pytest.mark.parametrize(("step", "call", "finished"), STEPS)
@pytest.mark.parametrize(("keep", "old"), [(True, True), (False, False)], ids=["keep-overwrite", "no-keep-new"])
def test_an_interrupt_at_any_step_keeps_what_was_there(
    step: str,
    call: int,
    finished: bool,
    keep: bool,
    old: bool,
    source: Path,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old:
        shutil.copytree(converted, tmp_path / "out")
    before = contents(tmp_path)
    options = (*SMALL, "--quiet", "--overwrite", *(() if keep else ("--no-keep",)))
    with monkeypatch.context() as patched:
        patch_call(patched, step, call, failing(KeyboardInterrupt()))
        result = run(source, "--out", tmp_path / "out", *options)
    assert result.exit_code == 130
    (line,) = result.stderr.strip("\n").splitlines()
    assert line.startswith("error: interrupted; ")
    kept = {name: content for name, content in contents(tmp_path).items() if name.startswith(HIDDEN)}
    assert contents(tmp_path) == before | kept
    if not (keep and finished):
        assert kept == {}
        assert line == "error: interrupted; nothing was left behind"
        return
    assert f"{HIDDEN}/{SNAPSHOT}" in kept
    assert "--resume" in line
    layers = count_layers(monkeypatch)
    succeeded(run(source, "--out", tmp_path / "out", "--resume", *options))
    assert len(layers) < 3
    assert files_of(tmp_path) == {f"out/{name}": content for name, content in files_of(converted).items()}


@pytest.mark.parametrize("layer", [None, 2])
def test_an_error_of_the_conversion_itself_leaves_nothing(
    layer: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer:
        with monkeypatch.context() as patched:
            interrupt_in_layer(patched, layer)
            assert run(source, "--out", tmp_path / "out", *SMALL).exit_code == 130
    monkeypatch.setattr("wina_convert.conversion.verify", failing(VerificationError("the logits differ")))
    refused(run(source, "--out", tmp_path / "out", "--resume", *SMALL, "--quiet"), "the logits differ")
    assert contents(tmp_path) == {}


@contextmanager
def default_signals() -> Iterator[None]:
    """Signal handlers of a job in the foreground, and at the end those of before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("layer", "left"), [(1, "nothing was left behind"), (2, "--resume")])
def test_a_signal_at_work_is_an_interrupt(
    name: str, layer: int, left: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*args: Any) -> None:
        signal.raise_signal(getattr(signal, name))

    patch_call(monkeypatch, CALIBRATE, layer, send)
    with default_signals():
        result = run(source, "--out", tmp_path / "out", "--quiet", *SMALL)
    assert result.exit_code == 130
    (line,) = result.stderr.strip("\n").splitlines()
    assert line.startswith("error: interrupted; ")
    assert left in line
    assert [path.name for path in tmp_path.iterdir()] == ([] if layer == 1 else [HIDDEN])


def test_ctrl_c_ends_a_running_program_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wina_convert", tiny, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*command, "--samples", "100000", "--seq-len", "8", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    try:
        while not (tmp_path / HIDDEN / "model.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, stdout) == (130, ""), stderr
    assert stderr.strip("\n") == "error: interrupted; nothing was left behind"
    assert contents(tmp_path) == {}


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


# --- disks ---

# The largest part of a conversion of `source` is its embeddings: the checkpoint has about a megabyte and a half.
DISK = "6m"


SAVE = "wina_convert.staging.Staging.save"
FULL_STEPS = [
    *((*step, True) for step in STEPS),
    (SAVE, 1, False, True),
    (SAVE, 2, True, True),
    (SAVE, 2, True, False),
    ("wina_convert.conversion.verify", 1, True, False),
]


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


def test_a_disk_that_was_large_enough_at_the_start_does_not_fill_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space that is asked for includes the snapshots, which are the larger part here."""
    disk = tmp_path / "disk"
    command = (source, "--out", disk / "out", "--quiet", "--samples", "64", "--seq-len", "32", "--targets", "*.o_proj")
    with mounted(disk, "1m"):

        def accepted(kilobytes: int) -> bool:
            remount(disk, f"size={kilobytes}k")
            with monkeypatch.context() as patched:
                patched.setattr("wina_convert.conversion.sequences", failing(CheckpointError("that far")))
                return "that far" in refused(run(*command))

        enough = bisect.bisect(range(16000), False, key=accepted)
        assert not accepted(enough - 4)
        remount(disk, f"size={enough + 128}k")  # files take whole pages, and a few small ones are not counted
        succeeded(run(*command))


# Where the system may refuse: the place, and at which call, later than the first snapshot.
CALLS = [
    ("wina_convert.shards.ShardWriter.write", 15, True),
    ("os.fsync", 4, True),
    ("pathlib.Path.replace", 2, True),
    ("wina_convert.staging.save_file", 2, True),
    ("shutil.copyfile", 1, True),
    ("huggingface_hub.ModelCard.save", 1, True),
    ("pathlib.Path.rename", 1, True),
    ("pathlib.Path.mkdir", 2, False),
]


CODES = [
    *((*call, code) for call in CALLS for code in (errno.ENOSPC, errno.EIO)),
    *((*CALLS[0], code) for code in (errno.EDQUOT, errno.ESTALE, errno.EROFS, errno.EACCES)),
]


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
    monkeypatch.setattr("wina_convert.conversion.sequences", failing(AssertionError("calibration text was read")))
    out = tmp_path / "out"
    refused(run(source, "--out", out), f"{out} needs", str(tmp_path), "free", "another --out")
    assert contents(tmp_path) == {}


def test_a_read_only_disk_is_refused_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina_convert.conversion.open_source", failing(AssertionError("opened")))
    disk = tmp_path / "disk"
    with mounted(disk, DISK):
        remount(disk, "ro")
        for out in (disk / "out", disk / "new" / "out"):
            refused(run(source, "--out", out, "--quiet", *SMALL), f"{out} cannot be written", str(disk), "read-only")


def test_a_read_only_folder_is_refused_before_the_source_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root, everything is writable
    monkeypatch.setattr("wina_convert.conversion.open_source", failing(AssertionError("opened")))
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
