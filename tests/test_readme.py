"""README, changelog, command line and docstrings say the same."""

import inspect
import re
import zipfile
from pathlib import Path

import click
import pytest
from hatchling.builders.wheel import WheelBuilder

import wina_convert as package
from support import ROOT
from wina_convert import cli
from wina_convert.architectures import ARCHITECTURES

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def table_rows(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_first_block_is_two_commands_that_use_the_constraints() -> None:
    first = re.search(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert first is not None
    assert README.index("```") == first.start()
    run, test = first.group(1).splitlines()
    assert "-c .ci/constraints.txt" in run
    assert "wina generate" in run.rpartition("&&")[2]
    assert "-c .ci/constraints.txt" in test
    assert test.endswith("-m pytest")


def test_ci_runs_the_test_command_of_the_readme_and_the_linters() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    assert all(command in script for command in ("ruff check", "ruff format --check", "mypy --strict"))


def test_the_quick_check_runs_the_linters_and_all_tests_but_the_marked_ones() -> None:
    script = (ROOT / ".ci" / "quick").read_text()
    assert all(command in script for command in ("ruff check", "ruff format --check", "mypy --strict"))
    assert '\n.venv/bin/python -m pytest -m "not promise and not slow"\n' in script
    assert script.rstrip().endswith('wait "$types"')  # or what the type checker says would change nothing


def test_the_constraints_pin_torch_and_transformers() -> None:
    pins = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    assert {"torch==2.13.0", "transformers==5.23.0"} <= set(pins)
    assert all("==" in pin for pin in pins)


def test_the_option_table_is_the_command_line() -> None:
    named = {name for row in table_rows("Convert") for name in re.findall(r"`(--[a-z-]+)`", row[0])}
    options = {name for param in cli.wina_convert.params for name in param.opts if name.startswith("--")}
    assert named - {"--help"} == options


@pytest.mark.parametrize("row", [row for row in table_rows("Convert") if row[1]], ids=lambda row: row[0])
def test_the_defaults_in_the_table_are_those_of_the_command_line(row: list[str]) -> None:
    name = row[0].strip("`")
    param = next(param for param in cli.wina_convert.params if name in param.opts)
    documented = row[1].strip("`")
    default = param.default[0] if isinstance(param.default, (list, tuple)) else param.default
    expected = {"--seq-len": "512, or the context", "--trust-remote-code": "off"}.get(name, str(default))
    assert documented == expected


def test_the_verb_table_is_the_group() -> None:
    verbs = {re.match(r"`wina ([a-z]+)", row[0]).group(1) for row in table_rows("The verbs of `wina`")}  # type: ignore[union-attr]
    assert verbs == set(cli.wina.commands)


def test_every_promise_names_a_test_that_is_there() -> None:
    for _, held_by in table_rows("Promises"):
        files = re.findall(r"`(tests/[\w/.]+)`", held_by)
        assert files
        assert all((ROOT / file).exists() for file in files), held_by


def test_the_family_table_is_the_supported_families() -> None:
    assert {row[1].strip("`") for row in table_rows("What is supported")} == set(ARCHITECTURES)


@pytest.mark.slow
def test_the_python_snippets_run(wina_tiny: Path, tiny: Path) -> None:
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(block.replace('"tiny-wina"', repr(str(wina_tiny))).replace('"MODEL"', repr(str(tiny))), scope)
    assert next(iter(package.runtime.linear.gated_modules(scope["model"]).values())).sparsity == 0.25


def test_every_option_has_help_and_every_command_an_example() -> None:
    commands = {"wina-convert": cli.wina_convert, **cli.wina.commands}
    for name, command in commands.items():
        text = command.get_help(click.Context(command, info_name=name, **command.context_settings))
        assert re.search(r"Examples?:\n\s+wina", text), name
        for param in command.params:
            assert isinstance(param, click.Argument) or param.help, f"{name} {param.name}"


def test_the_docstring_of_convert_names_every_parameter() -> None:
    arguments = (inspect.getdoc(package.convert) or "").partition("Args:")[2].partition("Returns:")[0]
    documented = re.findall(r"^    (\w+): ", arguments, flags=re.MULTILINE)
    assert documented == list(inspect.signature(package.convert).parameters)


def test_the_changelog_starts_with_this_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == package.__version__


def test_the_wheel_brings_the_calibration_text_and_the_entry_points(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    texts = {path.name for path in (ROOT / "calibration" / "text").iterdir()}
    assert {f"wina_convert/_calibration/text/{name}" for name in texts} <= names
    assert "[torch.backends]" in entry_points
    assert "[vllm.general_plugins]" in entry_points
    assert not any(name.startswith(("tests/", "calibration/")) for name in names)
