"""Runs the commands in this process, and says what a refusal looks like."""

import io
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from wina_convert.cli import wina, wina_convert

SMALL = (
    "--samples",
    "8",
    "--seq-len",
    "32",
    "--batch-size",
    "24",
    "--basis",
    "none",
)  # a conversion of a second or less
SMALLEST = ("--samples", "4", "--seq-len", "16", "--quiet", "--basis", "none")  # of a model of kilobytes


def run(*args: object) -> Result:
    """`wina-convert ARGS`."""
    return CliRunner().invoke(wina_convert, [str(arg) for arg in args])


def run_wina(*args: object) -> Result:
    """`wina ARGS`."""
    return CliRunner().invoke(wina, [str(arg) for arg in args])


def succeeded(result: Result) -> None:
    """A command did what it was asked to do."""
    assert result.exit_code == 0, result.stderr or result.exception


def refused(result: Result, *words: str) -> str:
    """A command ended with exit code 2 and exactly one line on stderr that holds these words; returns the line."""
    if result.exception and not isinstance(result.exception, SystemExit):
        raise AssertionError("a traceback instead of an error") from result.exception
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    return lines[0]


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stderr", self)

    def isatty(self) -> bool:
        return True

    @property
    def stderr(self) -> str:
        """All that was printed."""
        return self.getvalue()

    def run(self, *args: object) -> object:
        """`wina-convert ARGS`: its exit code."""
        with pytest.raises(SystemExit) as exit:
            wina_convert.main([str(arg) for arg in args])
        return exit.value.code


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes; folders as None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in sorted(folder.rglob("*"))
    }
