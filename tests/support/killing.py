"""Runs a function in a process of its own and kills that process: at a time, or at the N-th thing it does to a folder.

SIGKILL leaves a process no chance to tidy up: what is then on the disk is all that its successor has. A function named here
must be importable, and its arguments must be picklable.
"""

import builtins
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from wina_convert.format import staging
from wina_convert.format.names import REPORT
from wina_convert.format.staging import staged

# The server imports torch once; each process is forked from it in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.preloaded"])


@cache
def start_server() -> None:
    """Start it where tests/support can be imported: it goes by the environment, not by this process's `sys.path`, and is
    silent about what it cannot import."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


# What Python reports before it does it. Writes and fsyncs are no such events: `_watch` adds those.
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree")


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        killed: it did not come to its end.
        events: what it did to the folder, in order, as a verb and paths; where it was killed at an event, up to that one,
            which it did not begin, or half of it, if it is a write. None are known of a process that was killed at a time.
        seconds: how long it ran.
    """

    killed: bool
    events: list[str]
    seconds: float


class Child:
    """A process that runs a function.

    Args:
        function: what to run.
        arguments: its keyword arguments.
        below: the folder of which events count.
        at: the event, from 1 on, at which the process kills itself; 0: at none.
        wait: at that event, wait to be killed instead.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], below: Path, at: int = 0, wait: bool = False
    ) -> None:
        start_server()
        self._messages, theirs = CONTEXT.Pipe(duplex=False)
        self._process: ForkServerProcess = CONTEXT.Process(
            target=_child, args=(function, arguments, str(below), at, wait, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()
        self._start = time.monotonic()

    def wait_for_event(self) -> None:
        """Return when the process has come to its event and waits there."""
        self._receive()

    def end(self, seconds: float | None = None) -> End:
        """Let the process run to its end, or kill it after so many seconds."""
        self._process.join(seconds)
        ran = time.monotonic() - self._start
        self._process.kill()
        self._process.join()
        kind, content = "events", []
        with suppress(EOFError):
            while True:
                kind, content = self._messages.recv()
        self._messages.close()
        if kind == "error":
            raise AssertionError(content)
        assert self._process.exitcode in (0, -signal.SIGKILL), self._process.exitcode
        return End(self._process.exitcode != 0, content, ran)

    def _receive(self) -> None:
        kind, content = self._messages.recv()
        assert kind == "events", content


def _child(
    function: Callable[..., Any], arguments: dict[str, Any], below: str, at: int, wait: bool, messages: Connection
) -> None:
    messages.send(("events", []))
    try:
        events = _watch(below, at, wait, messages)
        function(**arguments)
        messages.send(("events", events))
    except BaseException:
        messages.send(("error", traceback.format_exc()))


def _watch(below: str, at: int, wait: bool, messages: Connection) -> list[str]:
    """Record what this process does below a folder from now on, and end it at the `at`-th event."""
    events: list[str] = []

    def event(name: str, *subjects: object, half_done: Callable[[], object] = lambda: None) -> None:
        events.append(" ".join([name, *(str(subject).removeprefix(f"{below}/") for subject in subjects)]))
        if len(events) == at:
            messages.send(("events", events))
            while wait:
                time.sleep(60)
            half_done()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name in EVENTS:
            paths = [str(path) for path in arguments if isinstance(path, (str, os.PathLike))]
            # Files of a tree that is removed have a name alone.
            if name in ("os.truncate", "os.remove", "os.rmdir") or any(path.startswith(below) for path in paths):
                event(name, *paths)

    def opened(file: Any, mode: str = "r", *others: Any, **more: Any) -> Any:
        handle = open_(file, mode, *others, **more)
        writes = isinstance(file, (str, os.PathLike)) and str(file).startswith(below) and set(mode) & set("wax+")
        return Torn(handle, str(file), event) if writes else handle

    def synced(descriptor: int) -> None:
        event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def saved(tensors: Any, path: Path, metadata: Any) -> None:  # not written by Python
        save(tensors, path, metadata)
        event("write", path, half_done=lambda: os.truncate(path, path.stat().st_size // 2))

    open_, fsync, save = builtins.open, os.fsync, staging.save_file
    builtins.open = io.open = opened
    os.fsync = synced
    staging.save_file = saved
    sys.addaudithook(audit)
    return events


class Torn:
    """An open file that reports each write, so that a process can end in the middle of one."""

    def __init__(self, handle: Any, path: str, event: Callable[..., None]) -> None:
        self.handle = handle
        self.path = path
        self.event = event

    def write(self, content: Any) -> Any:
        def half() -> None:
            self.handle.write(content[: len(content) // 2])
            self.handle.flush()

        self.event("write", self.path, half_done=half)
        return self.handle.write(content)

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


def publish(out: Path, overwrite: bool, resume: bool = True) -> None:
    """A conversion without a model, of three layers."""
    with staged(out, {"of": "nothing"}, resume, True, overwrite) as staging:
        for layer in range(staging.snapshot.layers if staging.snapshot else 0, 3):
            (staging.folder / f"weights-{layer}").write_text(f"weights of layer {layer}")
            staging.save(layer + 1, {"state": torch.full((100,), layer)})
        (staging.folder / "deep").mkdir(exist_ok=True)
        (staging.folder / "deep" / "file").write_text("text")
        (staging.folder / REPORT).write_text("{}")  # by which a checkpoint is known
