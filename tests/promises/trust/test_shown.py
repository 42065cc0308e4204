"""A checkpoint from a stranger: its names do not drive the terminal."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import refused, run_wina
from support.edits import edit_block, edit_config, edit_fields
from support.strangers import COMMANDS, INDEX, REPORT, SINGLE, Q, command, header_of, with_header
from wina_convert.errors import WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.progress import bars
from wina_convert.verbs.verify import verify_folder

NAMES = {
    "colours": "\x1b[31mred\x1b[0m",
    "a title": "\x1b]0;title\x07",
    "one byte of control": "\x9b31m",
    "backspaces": "good\b\b\b\bevil",
    "carriage return": "a\rerror: b",
    "a line of its own": "a\nerror: b",
    "other lines": "a\u2028b\u0085c\x0bd",
    "NUL": "a\0b",
    "right to left": "\u202egnp.exe\u2066",
    "invisible": "a\u200bb\ufeffc\U000e0041",
    "half a pair": "a\ud800b\udfff",
    "long": "x" * 100_000,
    "long controls": "\x1b" * 100_000,
    "long tags": "\U000e0041" * 100_000,
    "long words": "word " * 20_000,
    "letters": "Größe 世界 🙂",
}


class Beside:
    """What libraries print past a command: directly, or by logging, which keeps the stderr that it found first."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.capfd, self.caplog = capfd, caplog

    def text(self) -> str:
        """All since the last call."""
        printed, logged = self.capfd.readouterr(), self.caplog.text
        self.caplog.clear()
        return printed.out + printed.err + logged


@pytest.fixture
def beside(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Beside:
    return Beside(capfd, caplog)


def shown(result: Any, beside: Beside) -> None:
    """A command printed, whatever it did, little, nothing that drives a terminal, and an error on one line."""
    assert beside.text() == ""
    for text in (result.stdout, result.stderr):
        assert all(char.isprintable() or char == "\n" for char in text), ascii(text[:300])
        text.encode()
    if result.exit_code:
        refused(result)
        assert len(result.stderr) < 8000
    else:
        assert len(result.stdout) < 16_000


def rename(folder: Path, new: str) -> None:
    """Another name for a projection that is gated, in the config, the report and the weights."""
    for file in ("config.json", REPORT):
        text = json.dumps(json.loads((folder / file).read_text()))
        (folder / file).write_text(text.replace(json.dumps(Q), json.dumps(new)))
    data = (folder / SINGLE).read_bytes()
    header, body = header_of(data)
    renamed = {name.replace(Q, new, 1): entry for name, entry in header.items()}
    text = json.dumps(renamed, ensure_ascii=False).encode("utf-8", "surrogatepass")
    (folder / SINGLE).write_bytes(with_header(text, body))


def in_manifest(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = {"size": 0, "sha256": ""}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, "utf-8", "surrogatepass")


def in_header(folder: Path, **fields: Any) -> None:
    header, body = header_of((folder / SINGLE).read_bytes())
    header[f"{Q}.weight_t"] |= fields
    (folder / SINGLE).write_bytes(with_header(json.dumps(header, ensure_ascii=False).encode("utf-8", "replace"), body))


def in_index(folder: Path, tensor: str, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {tensor: file}}))


def tensor_twice(folder: Path, name: str) -> None:
    """A projection that config.json does not name."""
    rename(folder, f"model.layers.0.mlp.{name}")
    edit_block(modules=[Q])(folder)


PLACES: dict[str, Callable[[Path, str], object]] = {
    "the source": lambda folder, name: edit_block(source={"name": name})(folder),
    "the scheme": lambda folder, name: edit_block(scheme=name)(folder),
    "the allocation": lambda folder, name: edit_block(allocation=name)(folder),
    "a share": lambda folder, name: edit_block(shares={name: [k / 20 for k in range(20)]}, allocation="types")(folder),
    "a share that is none": lambda folder, name: edit_block(shares={name: 1})(folder),
    "a field of the block": lambda folder, name: edit_block(**{name: 1})(folder),
    "the prefill": lambda folder, name: edit_block(prefill=name)(folder),
    "the sparsity": lambda folder, name: edit_block(sparsity=name)(folder),
    "the format version": lambda folder, name: edit_block(format_version=name)(folder),
    "a module": lambda folder, name: edit_block(modules=[name])(folder),
    "a module of a layer": lambda folder, name: edit_block(modules=[f"model.layers.0.mlp.{name}"])(folder),
    "the family": lambda folder, name: edit_config(model_type=name)(folder),
    "a field of config.json": lambda folder, name: edit_config(**{f"{name}_size": 10**12})(folder),
    "the attention": lambda folder, name: edit_config(attn_implementation=f"a/{name}")(folder),
    "an attention": lambda folder, name: edit_config(attn_implementation=name)(folder),
    "the activation": lambda folder, name: edit_config(hidden_act=name)(folder),
    "the dtype": lambda folder, name: edit_config(dtype=name)(folder),
    "the rotary type": lambda folder, name: edit_config(rope_parameters={"rope_type": name})(folder),
    "a field that no config can take": lambda folder, name: edit_config(sub_configs=name)(folder),
    "the weights of config.json": lambda folder, name: edit_config(transformers_weights=name)(folder),
    "a projection": lambda folder, name: rename(folder, f"model.layers.0.mlp.{name}"),
    "a stored projection": tensor_twice,
    "a dtype of the header": lambda folder, name: in_header(folder, dtype=name),
    "a tensor of the index": lambda folder, name: in_index(folder, name, SINGLE),
    "a file of the index": lambda folder, name: in_index(folder, "x", name),
    "a path of the index": lambda folder, name: in_index(folder, "x", f"../{name}"),
    "a file of the manifest": in_manifest,
    "the tokenizer's class": lambda folder, name: edit_fields("tokenizer_config.json", tokenizer_class=name)(folder),
    "the chat template": lambda folder, name: edit_fields("tokenizer_config.json", chat_template=name)(folder),
    "the report": lambda folder, name: (folder / REPORT).write_text(json.dumps({"verification": name})),
}


WORST = ("colours", "a line of its own", "right to left", "half a pair", "long controls", "long tags", "long words")
MAIN = ("the source", "a module", "a projection", "a file of the index")


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place in PLACES for name in NAMES if place in MAIN or name in WORST]
)
def test_names_of_strangers_are_shown_without_effect(place: str, name: str, single: Path, beside: Beside):
    PLACES[place](single, NAMES[name])
    if place != "a file of the manifest":
        write_manifest(single)
    beside.text()
    for words in COMMANDS:
        shown(command(words, single), beside)
    result = run_wina("inspect", single, "--json")
    if result.exit_code == 0:
        assert all(char.isprintable() or char == "\n" for char in result.stdout)
        json.loads(result.stdout)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("long", "NUL", "half"))])
def test_file_names_of_strangers_are_shown_without_effect(name: str, single: Path, beside: Beside):
    (single / NAMES[name]).write_text("extra")
    beside.text()
    shown(command("wina verify", single), beside)
    (single / NAMES[name]).unlink()
    (single / NAMES[name]).symlink_to("/dev/null")
    for words in COMMANDS:
        shown(command(words, single), beside)


def test_a_file_name_that_is_no_text_is_shown_without_effect(single: Path, beside: Beside):
    with open(os.fsencode(single) + b"/caf\xe9\x1b[31m", "wb"):
        pass
    beside.text()
    shown(command("wina verify", single), beside)


def test_a_size_in_the_manifest_does_not_stop_the_bar_of_a_terminal(single: Path):
    content = json.loads((single / MANIFEST).read_text())
    content["files"]["config.json"]["size"] = 10**400
    (single / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(WinaError):
        verify_folder(single, bars)
