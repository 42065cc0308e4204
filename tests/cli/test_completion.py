"""The shell completes verbs, options and folders: click does it, where nothing of ours is in the way."""

import pytest
from click.testing import CliRunner

from wina_convert.cli import wina, wina_convert


def completed(command: object, program: str, *words: str, shell: str = "bash") -> list[str]:
    """What the shell is offered after these words, the last of which is being typed."""
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    typed = {"COMP_WORDS": " ".join([program, *words]), "COMP_CWORD": str(len(words))}
    result = CliRunner().invoke(command, [], prog_name=program, env={variable: f"{shell}_complete", **typed})  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_the_verbs_are_offered():
    assert completed(wina, "wina", "") == [f"plain,{name}" for name in sorted(wina.commands)]
    assert completed(wina, "wina", "re") == ["plain,retarget"]


@pytest.mark.parametrize(
    ("command", "program", "words"),
    [(wina, "wina", ("convert", "m")), (wina_convert, "wina-convert", ("m",))],
    ids=["wina convert", "wina-convert"],
)
def test_every_option_is_offered(command: object, program: str, words: tuple[str, ...]):
    options = {name for param in wina_convert.params for name in param.opts if name.startswith("--")} - {"--version"}
    offered = {line.partition(",")[2] for line in completed(command, program, *words, "--")}
    assert options <= offered


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "verify", "retarget", "bench", "push", "convert"])
def test_folders_are_offered_where_a_verb_takes_one(verb: str):
    assert completed(wina, "wina", verb, "./ch") == ["file,./ch"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str):
    result = CliRunner().invoke(wina, [], prog_name="wina", env={"_WINA_COMPLETE": f"{shell}_source"})
    assert result.exit_code == 0
    assert f"_WINA_COMPLETE={shell}_complete" in result.stdout
