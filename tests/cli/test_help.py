"""The commands: their names, options, defaults and help."""

import inspect
import re
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

import wina_convert as package
from support.commands import run, run_wina, succeeded
from wina_convert.cli import wina, wina_convert

COMMANDS = {
    "wina-convert": wina_convert,
    "wina": wina,
    **{f"wina {name}": verb for name, verb in wina.commands.items()},
}


def invoke(name: str, *args: object) -> Any:
    return run_wina(*name.split()[1:], *args) if name.startswith("wina ") or name == "wina" else run(*args)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_option_and_verb(name: str, flag: str):
    result = invoke(name, flag)
    succeeded(result)
    shown = result.stdout.split()
    for parameter in COMMANDS[name].params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in [word.rstrip(",") for word in shown], option
    for verb in getattr(COMMANDS[name], "commands", ()):
        assert verb in shown


def test_the_list_of_verbs_says_whole_sentences_in_a_narrow_terminal():
    shown = CliRunner().invoke(wina, ["--help"], terminal_width=80).stdout
    listed = re.findall(r"^  (\w+) +(.+)$", shown.partition("Commands:")[2], re.MULTILINE)
    assert [verb for verb, _ in listed] == sorted(wina.commands)
    assert all(sentence.endswith(".") and not sentence.endswith("...") for _, sentence in listed)


def examples(name: str) -> list[str]:
    text = invoke(name, "--help").stdout
    return re.findall(r"^ {4,}(wina.*)$", text.partition("Example")[2].partition("Options:")[0], re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "wina"])
def test_every_example_of_a_help_is_a_command_with_such_options(name: str):
    assert examples(name)
    for example in examples(name):
        program, *words = shlex.split(example)
        command = wina_convert if program == "wina-convert" else wina.commands[words.pop(0)]
        command.make_context(program, words)  # raises what the command would


def test_without_a_verb_the_group_shows_its_help():
    result = run_wina()
    assert "\nCommands:\n" in result.stdout + result.stderr


def test_every_parameter_of_the_function_is_an_option_with_its_default_and_the_reverse():
    parameters = dict(inspect.signature(package.convert).parameters)
    for python_only in ("progress", "tqdm_class"):
        del parameters[python_only]
    options = {option.name: option for option in wina_convert.params}
    for printing in ("quiet", "as_json", "version"):
        del options[printing]
    assert set(parameters) == set(options)
    for name, parameter in parameters.items():
        assert options[name].required == (parameter.default is inspect.Parameter.empty), name
    context = wina_convert.make_context("wina-convert", ["MODEL", "--out", "DIR"])
    expected = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {name: context.params[name] for name in expected} == expected


def test_the_verb_convert_is_the_same_command():
    def described(command: click.Command) -> dict[str, Any]:
        info = command.to_info_dict(click.Context(command, **command.context_settings))
        info["params"] = [parameter for parameter in info["params"] if parameter["name"] != "version"]
        del info["name"]
        return info

    assert described(wina.commands["convert"]) == described(wina_convert)


@pytest.mark.parametrize("name", ["wina-convert", "wina"])
def test_version_is_that_of_the_package(name: str):
    result = invoke(name, "--version")
    succeeded(result)
    assert result.stdout == f"wina-convert, version {package.__version__}\n"


def test_the_module_runs_as_a_program_and_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "wina_convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: wina-convert [OPTIONS] MODEL\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not {"torch", "transformers", "numpy"} & imported
