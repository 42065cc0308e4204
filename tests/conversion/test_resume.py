"""What an interrupted conversion leaves is continued to the same bytes."""

import json
import pkgutil
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.commands import SMALL, contents, refused, run, succeeded
from support.families import make_model
from support.folders import files_of
from support.interrupting import (
    CALIBRATE,
    CLOCK,
    FAST,
    HIDDEN,
    count_layers,
    fail_after,
    interrupt_in_layer,
    interrupted_in_layer,
    leave_unfinished,
    stage,
)
from wina_convert import convert
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.format.names import INDEX, REPORT, SNAPSHOT
from wina_convert.format.staging import Staging
from wina_convert.verbs.verify import verify_folder

MODEL = "three layers"  # see support/shared.py


@pytest.fixture(scope="module")
def unfinished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conversion to `out` that was interrupted in its third layer. Shared: copy it."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CLOCK, SimpleNamespace(monotonic=lambda: 0.0))
        interrupt_in_layer(patched, 3)
        assert run(source, "--out", folder / "out", *SMALL, "--quiet").exit_code == 130
    return folder


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


@pytest.mark.slow
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
    interrupted_in_layer(layer, source, tmp_path / "out", **options, **FAST)
    layers = count_layers(monkeypatch)
    assert convert(str(source), tmp_path / "out", resume=True, **options, **FAST) == report
    assert len(layers) == 3 - (layer - 1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "at-once")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "at-once"}
    verify_folder(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("snapshots")
def test_resume_after_resume_over_an_old_checkpoint(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(str(source), out, sparsity=0.25, **FAST)
    before = files_of(out)
    for _ in range(2):  # a layer further each time
        interrupted_in_layer(2, source, out, resume=True, overwrite=True, **FAST)
        assert files_of(out) == before
    layers = count_layers(monkeypatch)
    convert(str(source), out, resume=True, overwrite=True, **FAST)
    assert len(layers) == 1
    assert files_of(out) == files_of(converted)


@pytest.mark.slow
def test_resume_with_nothing_unfinished_converts(source: Path, converted: Path, tmp_path: Path) -> None:
    succeeded(run(source, "--out", tmp_path / "out", "--resume", *SMALL))
    assert files_of(tmp_path / "out") == files_of(converted)


@pytest.mark.slow
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


@pytest.mark.slow
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
    convert(str(source), tmp_path / "out", samples=1, seq_len=8, targets=["*.o_proj"], basis="none")
    assert saved == [1, 6, 11, 12]  # and the last, after which the checks can still be interrupted


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["weight_t", "thresholds"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut(path, -80)], ids=["lost", "cut off"])
@pytest.mark.usefixtures("snapshots")
def test_a_shard_that_was_lost_meanwhile_is_noticed(
    damage: Callable[[Path], object], leaf: str, source: Path, tmp_path: Path
) -> None:
    """In place of tensors that were written before, there would be zeros."""
    options = {"max_shard_size": "0.1KB"}  # a shard for each of these tensors
    interrupted_in_layer(3, source, tmp_path / "out", **options, **FAST)
    shards = json.loads((tmp_path / HIDDEN / INDEX).read_text())["weight_map"]
    name = f"model.layers.0.mlp.down_proj.{leaf}"
    assert list(shards.values()).count(shards[name]) == 1
    damage(tmp_path / HIDDEN / shards[name])
    with pytest.raises(WinaError):
        convert(str(source), tmp_path / "out", resume=True, **options, **FAST)
    assert not (tmp_path / "out").exists()
