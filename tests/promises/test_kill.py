"""A conversion killed at any moment leaves what was there or a complete checkpoint, and its successor completes it.

`python -m pytest tests/promises/test_kill.py --kills 300 -rP` kills more often and prints where; `--kill-seed` chooses other
moments.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.folders import files_of
from support.killing import Child, End, publish
from wina_convert import convert
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.format.names import REPORT
from wina_convert.format.staging import recover
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

MODEL = "three layers"  # see support/shared.py


# Several shards, and a layer in more than one of them.
OPTIONS: dict[str, Any] = {"samples": 4, "seq_len": 16, "targets": ["mlp"], "max_shard_size": "200KB", "basis": "none"}
MODES = pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])


@dataclass(frozen=True)
class Reference:
    """A conversion that nobody killed: its files, what it did and how long it took."""

    files: dict[str, bytes]
    end: End


@pytest.fixture(scope="module")
def replaced(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to replace."""
    out = tmp_path_factory.mktemp("replaced") / "out"
    convert(str(source), out, sparsity=0.25, **OPTIONS)
    return out


@MODES
def test_a_killed_conversion_leaves_nothing_broken_and_is_completed(
    old: bool, source: Path, replaced: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    kills, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("kill_seed")
    print(f"--kills {kills} --kill-seed {seed}")
    rng = random.Random(f"{seed} {old}")
    before = files_of(replaced) if old else None
    reference = uninterrupted(source, tmp_path / "reference", before)
    killed = 0
    while killed < kills // 2:
        folder = tmp_path / "killed"
        begin(folder, before)
        for _ in range(rng.randint(1, 3)):
            moment = random_moment(rng, reference.end, timed=killed % 2 == 0)
            end = child(source, folder, old, moment.get("at", 0)).end(moment.get("seconds"))
            if not end.killed:
                break
            killed += 1
            print(killed, moment, *end.events[-1:])
            check(folder, before, reference.files)
            if not old and (folder / "out").exists():
                break
        if old or not (folder / "out").exists():
            end = child(source, folder, old).end()
            assert not end.killed
            assert [path.name for path in folder.iterdir()] == ["out"]
        check(folder, reference.files)
        shutil.rmtree(folder)


def uninterrupted(source: Path, folder: Path, before: dict[str, bytes] | None) -> Reference:
    begin(folder, before)
    child(source, folder, before is not None).end()  # imports what the next one will have
    begin(folder, before)
    end = child(source, folder, before is not None).end()
    verify_folder(folder / "out")
    return Reference(files_of(folder / "out"), end)


def begin(folder: Path, before: dict[str, bytes] | None) -> None:
    """Make a folder anew, with a checkpoint that is to be replaced, or without."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in (before or {}).items():
        (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out" / name).write_bytes(content)


def child(source: Path, folder: Path, overwrite: bool, at: int = 0) -> Child:
    arguments = {"model": str(source), "out": folder / "out", "overwrite": overwrite, "resume": True, **OPTIONS}
    return Child(convert, arguments, folder, at)


def random_moment(rng: random.Random, reference: End, timed: bool) -> dict[str, Any]:
    """A time, or an event: of each verb equally often, or nearly all of them would be writes."""
    if timed:
        return {"seconds": rng.uniform(0, reference.seconds)}
    verb = rng.choice(sorted({event.split()[0] for event in reference.events}))
    return {"at": rng.choice([n for n, event in enumerate(reference.events, 1) if event.split()[0] == verb])}


def check(folder: Path, *allowed: dict[str, bytes] | None) -> None:
    """What a user sees in the folder is one of these checkpoints, if not now, then after `recover`; None: nothing."""
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= {"out"}
    if not (folder / "out").exists() and None not in allowed:  # between two renames
        copy = shutil.copytree(folder, folder.with_name("copy"))
        recover(copy / "out")
        check(copy, *allowed)
        shutil.rmtree(copy)
    elif (folder / "out").exists():
        verify_folder(folder / "out")
        found = files_of(folder / "out")
        assert found in allowed, [name for name in found if found[name] not in [(a or {}).get(name) for a in allowed]]


# --- staging alone: fast enough for every moment there is ---


BEFORE = {"weights-0": b"from before", "more/file": b"from before", REPORT: b"{}"}
AFTER = {f"weights-{layer}": f"weights of layer {layer}".encode() for layer in range(3)}
AFTER |= {"deep/file": b"text", REPORT: b"{}"}


def published(folder: Path, where: str) -> None:
    """A process that nobody kills completes what was begun, and nothing else is left."""
    assert not Child(publish, {"out": folder / "out", "overwrite": True}, folder).end().killed
    assert files_of(folder) == {f"out/{name}": content for name, content in AFTER.items()}, where


@MODES
def test_staging_killed_at_every_event(old: bool, tmp_path: Path) -> None:
    before = BEFORE if old else None
    folder = tmp_path / "folder"
    arguments = {"out": folder / "out", "overwrite": old}
    begin(folder, before)
    events = Child(publish, arguments, folder).end().events
    for at, event in enumerate(events, 1):
        begin(folder, before)
        end = Child(publish, arguments, folder, at).end()
        where = f"killed at event {at} of {len(events)}: {event}"
        assert (end.killed, end.events[-1]) == (True, event)
        recover(folder / "out")
        assert (files_of(folder / "out") or None) in (before, AFTER), where
        published(folder, where)


def test_an_unfinished_conversion_killed_while_it_is_discarded_is_not_resumed_in_part(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    arguments = {"out": folder / "out", "overwrite": True, "resume": False}
    begin(folder, None)
    events = Child(publish, arguments, folder).end().events
    last = next(n for n, event in enumerate(events, 1) if event.startswith("os.mkdir") and event.endswith("/deep"))

    def leave_unfinished() -> None:
        begin(folder, None)
        assert Child(publish, arguments, folder, last).end().killed

    leave_unfinished()
    events = Child(publish, arguments, folder).end().events
    first = next(n for n, event in enumerate(events) if event.startswith("write"))
    assert sum(event.startswith("os.remove") for event in events[:first]) >= 5
    for at, event in enumerate(events[:first], 1):
        leave_unfinished()
        assert Child(publish, arguments, folder, at).end().killed
        published(folder, f"killed at event {at}: {event}")


# --- retarget, which changes a checkpoint in place ---


def test_retarget_killed_at_every_event_leaves_a_checkpoint_that_it_can_retarget(
    replaced: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    arguments = {"folder": folder / "out", "sparsity": 0.75}
    begin(folder, files_of(replaced))
    events = Child(retarget, arguments, folder).end().events
    after = files_of(folder / "out")
    assert {event.split()[0] for event in events} >= {"open", "write", "os.rename"}
    for at in range(1, len(events) + 1):
        begin(folder, files_of(replaced))
        assert Child(retarget, arguments, folder, at).end().killed
        assert open_checkpoint(folder / "out").config.sparsity in (0.25, 0.75), events[at - 1]
        assert not Child(retarget, arguments, folder).end().killed
        assert files_of(folder / "out") == after, events[at - 1]
        verify_folder(folder / "out")
