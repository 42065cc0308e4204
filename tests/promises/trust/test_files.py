"""A checkpoint from a stranger: pipes, sockets, folders and paths in the place of files."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.breaking import within
from support.commands import refused, run_wina
from support.edits import Change, edit_config, edit_fields
from support.folders import tensors_of
from support.strangers import (
    COMMANDS,
    HANG,
    INDEX,
    READERS,
    REPORT,
    SHARD,
    SINGLE,
    Watch,
    all_refuse,
    command,
    logits_of,
    plain,
)
from wina_convert import load
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.verbs.inspect import inspect_checkpoint

# --- pipes, sockets, folders in the place of files ---


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", SHARD, INDEX, REPORT, MANIFEST, "docs/new"])
def test_a_pipe_does_not_hold_up_a_reader(name: str, sharded: Path):
    (sharded / name).unlink(missing_ok=True)
    os.mkfifo(sharded / name)
    all_refuse(sharded)


def test_a_pipe_does_not_hold_up_plain_transformers(sharded: Path):
    (sharded / "tokenizer.json").unlink()
    os.mkfifo(sharded / "tokenizer.json")
    with within(HANG), pytest.raises(CheckpointError, match=r"'tokenizer\.json' is neither a file nor a folder"):
        plain(sharded)


def test_a_link_to_a_pipe_does_not_hold_up_a_reader(sharded: Path):
    os.mkfifo(sharded / "pipe")
    (sharded / "tokenizer.json").unlink()
    (sharded / "tokenizer.json").symlink_to("pipe")
    all_refuse(sharded)


def test_a_socket_is_refused(sharded: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(sharded)  # the name of a socket may be about a hundred letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        all_refuse(sharded, "'socket' is neither a file nor a folder")


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, sharded: Path):
    (sharded / name).unlink()
    (sharded / name).mkdir()
    all_refuse(sharded)


@pytest.mark.parametrize("name", [REPORT, MANIFEST])
def test_a_folder_in_the_place_of_what_verify_reads_is_refused(name: str, sharded: Path):
    (sharded / name).unlink()
    (sharded / name).mkdir()
    refused(run_wina("verify", sharded, "--quiet"), name)
    inspect_checkpoint(sharded)


def test_folders_nested_without_end_are_read_or_refused(single: Path):
    here = os.open(single, os.O_RDONLY)
    for _ in range(1500):  # a path of all of them would be longer than a path may be
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    try:
        for read in READERS.values():
            with suppress(WinaError):
                read(single)
        for name in COMMANDS:
            result = command(name, single)
            assert result.exit_code == 0 or refused(result)
    finally:
        subprocess.run(["rm", "-rf", single / "d"], check=True)  # shutil.rmtree, which pytest uses, recurses


# --- paths in files ---

PATHS = [
    "../outside.safetensors",
    "{outside}",
    "sub/../../outside.safetensors",
    "sub/inside.safetensors",
    "..\\outside",
]
PATHS += ["model\0.safetensors", "", ".", "..", "/", "a" * 300, "\ud800", "\x1b[31m", 7, None, [SHARD], {"a": 1}, True]


@pytest.mark.parametrize("way", PATHS, ids=lambda way: repr(way)[:30])
def test_an_index_that_does_not_name_a_file_of_the_folder_is_refused(way: Any, sharded: Path):
    outside = sharded.parent / "outside.safetensors"
    shutil.copyfile(sharded / SHARD, outside)
    (sharded / "sub").mkdir()
    shutil.copyfile(sharded / SHARD, sharded / "sub" / "inside.safetensors")
    way = way.format(outside=outside) if isinstance(way, str) else way
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {name: way for name, file in index["weight_map"].items() if file == SHARD}
    (sharded / INDEX).write_text(json.dumps(index))
    write_manifest(sharded)
    with Watch(outside) as watch:
        all_refuse(sharded)
        with suppress(Exception):  # of transformers, which reads the index first
            plain(sharded)
        assert not watch.opened()


def other_weights(folder: Path, name: str) -> None:
    """Other weights than those that the index names, in a file of the same folder."""
    stored = tensors_of(folder)
    save_file({key: tensor * 2 if key == "lm_head.weight" else tensor for key, tensor in stored.items()}, folder / name)


OTHER_FILES: dict[str, Change] = {
    "a whole file beside the shards": lambda folder: other_weights(folder, SINGLE),
    "config.json names a file": lambda folder: (
        other_weights(folder, "other.safetensors"),
        edit_config(transformers_weights="other.safetensors")(folder),
    ),
    "config.json names a shard": lambda folder: edit_config(transformers_weights=SHARD)(folder),
    "config.json names a pickle": lambda folder: (
        torch.save({}, folder / "adapter_model.bin"),
        edit_config(transformers_weights="adapter_model.bin")(folder),
    ),
    "config.json names a file outside": lambda folder: (
        shutil.copyfile(folder / SHARD, folder.parent / "other.safetensors"),
        edit_config(transformers_weights="../other.safetensors")(folder),
    ),
    "config.json names a number": lambda folder: edit_config(transformers_weights=7)(folder),
}


@pytest.mark.parametrize("change", OTHER_FILES.values(), ids=OTHER_FILES)
def test_the_weights_that_are_loaded_are_the_ones_that_were_checked(change: Change, sharded: Path, logits: Tensor):
    change(sharded)
    write_manifest(sharded)
    for door in (load, plain):
        try:
            found = logits_of(door(sharded if door is plain else str(sharded)))
        except WinaError:
            continue
        except Exception:
            if door is plain:  # transformers reads config.json first
                continue
            raise
        assert torch.equal(found, logits)


@pytest.mark.parametrize("door", [load, plain])
def test_pickled_weights_beside_good_ones_are_not_read(door: Callable[[Any], Any], sharded: Path):
    torch.save({name: tensor * 2 for name, tensor in tensors_of(sharded).items()}, sharded / "adapter_model.bin")
    edit_config(transformers_weights="adapter_model.bin")(sharded)  # the one pickle that it may name
    with Watch(sharded / "adapter_model.bin") as watch:
        with pytest.raises(CheckpointError):
            door(str(sharded))
        assert not watch.opened()


def test_a_hidden_shard_that_is_a_link_out_of_the_folder_is_refused_and_not_followed(sharded: Path):
    target = Path(shutil.move(sharded / SHARD, sharded.parent / "outside.safetensors"))
    (sharded / ".shard.safetensors").symlink_to(target)
    (sharded / INDEX).write_text((sharded / INDEX).read_text().replace(SHARD, ".shard.safetensors"))
    (sharded / MANIFEST).unlink()  # which would lack it
    with Watch(target) as watch:
        for door in (load, plain, inspect_checkpoint):
            with pytest.raises(CheckpointError, match="link or path out of the folder"):
                door(str(sharded))
        assert not watch.opened()


def no_tokenizer_file(folder: Path) -> Path:
    """Move a tokenizer out of its folder, under a name that transformers looks for."""
    return Path(shutil.move(folder / "tokenizer.json", folder.parent / "tokenizer.4.0.0.json"))


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_file": "../tokenizer.4.0.0.json"},
        {"tokenizer_file": "{outside}"},
        {"vocab_file": "{outside}", "merges_file": "{outside}"},
        {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": ["{outside}"]},
        {"name_or_path": "{folder}", "_name_or_path": "{folder}"},
    ],
    ids=str,
)
def test_a_tokenizer_config_does_not_lead_out_of_the_folder(fields: dict[str, Any], single: Path):
    outside = no_tokenizer_file(single)
    text = json.dumps(fields).replace("{outside}", str(outside)).replace("{folder}", str(outside.parent))
    edit_fields("tokenizer_config.json", **json.loads(text))(single)
    with Watch(outside) as watch:
        result = command("wina generate", single)
        assert not watch.opened()
    refused(result)
