"""Consoles that lack characters: what cannot be shown is escaped, and nothing fails for it."""

import io
import json
import shutil
import sys
from pathlib import Path

import click
import pytest

from support.commands import SMALL
from wina_convert.cli import wina, wina_convert

MODEL = "one layer"  # see support/shared.py
NAME = "mod\u00e8le \u6a21\u578b \U0001f600"


ENCODINGS = ["cp1252", "ascii", "utf-8"]


def call(encoding: str, command: click.Command, *args: object) -> tuple[int, bytes]:
    """The exit code of a command on a console of an encoding, and what it wrote."""
    found = io.BytesIO()
    streams = [io.TextIOWrapper(found, encoding=encoding, write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as exit:
            command.main([str(arg) for arg in args])
    return exit.value.code, found.getvalue()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_conversion_of_a_name_that_the_console_lacks_ends_well(encoding: str, source: Path, tmp_path: Path):
    folder, out = tmp_path / NAME, tmp_path / f"{NAME}-wina"
    shutil.copytree(source, folder)
    code, shown = call(encoding, wina_convert, folder, "--out", out, *SMALL)
    assert code == 0
    assert b"Wrote" in shown
    assert b"Try it: wina generate '" in shown  # a name with a space is quoted as a shell wants it
    assert (out / "wina_manifest.json").exists()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_and_json_are_shown_on_any_console(encoding: str, converted: Path, tmp_path: Path):
    folder = shutil.copytree(converted, tmp_path / NAME)
    assert call(encoding, wina, "generate", folder, "--prompt", "\u6a21", "--max-new-tokens", 2, "--raw")[0] == 0
    code, shown = call(encoding, wina, "inspect", folder, "--json")
    assert (code, json.loads(shown)["name"]) == (0, str(folder))
    code, shown = call(encoding, wina, "inspect", tmp_path / f"no {NAME}")
    assert code == 2
    assert shown.startswith(b"error: ")
