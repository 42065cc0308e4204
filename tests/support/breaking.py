"""What goes wrong on purpose: calls that fail, and disks that are small."""

import pkgutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def failing(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def before_call(function: Callable[..., Any], number: int, act: Callable[..., object]) -> Callable[..., Any]:
    """A function, with something done right before its n-th call, given its arguments."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act(*args, **kwargs)
        return function(*args, **kwargs)

    return called


def patch_call(patched: pytest.MonkeyPatch, place: str, number: int, act: Callable[..., object]) -> None:
    """Have something done right before the n-th call of a function, which is named by its dotted path."""
    patched.setattr(place, before_call(pkgutil.resolve_name(place), number, act))


class Hung(BaseException):
    """No Exception, so that nothing on the way takes it for an error of its own."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise Hung where the block takes longer."""

    def stop(*args: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A disk of a size, in memory; the test is skipped where that is not permitted."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no command `mount`")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted disk: its size, or to read-only."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder: Path) -> None:
    """Write until a disk is full."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
