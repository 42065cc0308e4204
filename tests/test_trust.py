"""A checkpoint from a stranger: reading it leaves the folder, runs code, takes memory and drives the terminal never."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import failing, within
from commands import contents, refused, run, run_wina, succeeded
from families import make_model
from folders import tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from wina_convert import load
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.inspection import inspect_checkpoint
from wina_convert.integrity import MANIFEST, verify_folder, write_manifest
from wina_convert.progress import bars
from wina_convert.retarget import retarget

SINGLE, INDEX, REPORT = "model.safetensors", "model.safetensors.index.json", "wina_report.json"
SHARD = "model-00002-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.tensor([[0, 310, 7, 1999]])
HANG = 30  # seconds after which a reader counts as hung

Change = Callable[[Path], object]

READERS: dict[str, Callable[[Path], object]] = {
    "load": lambda folder: load(str(folder)),
    "inspect": inspect_checkpoint,
    "verify": verify_folder,
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "wina inspect": ("inspect",),
    "wina verify": ("verify", "--quiet"),
    "wina generate": ("generate", "--prompt", "a", "--max-new-tokens", "2", "--quiet"),
    "wina retarget": ("retarget", "--sparsity", "0.25"),
}


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def command(name: str, folder: Path) -> Any:
    verb, *options = COMMANDS[name]
    return run_wina(verb, folder, *options)


def all_refuse(folder: Path, *words: str) -> None:
    """Every reader refuses a folder with these words, at once, and changes nothing."""
    before = links(folder)
    for name, read in READERS.items():
        with within(HANG), pytest.raises(WinaError) as raised:
            read(folder)
        for word in words:
            assert word in str(raised.value), f"{name}: {word!r} is not in {str(raised.value)!r}"
    for name in COMMANDS:
        with within(HANG):
            refused(command(name, folder), *words)
    assert links(folder) == before


def links(folder: Path) -> dict[str, str]:
    """What is in a folder, without opening or following anything."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else str(os.lstat(path)[:9:2])
        for path in sorted(folder.rglob("*"))
    }


class Watch:
    """Tells whether files were opened, by Python, Rust or C++: Linux reports it, whatever path led to the file."""

    def __init__(self, *paths: Path) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("needs inotify")
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        for path in paths:
            assert libc.inotify_add_watch(self.descriptor, os.fsencode(path), 0x20) >= 0, ctypes.get_errno()  # IN_OPEN

    def opened(self) -> bool:
        """Whether one was, since the last call."""
        with suppress(BlockingIOError):
            return bool(os.read(self.descriptor, 1 << 16))
        return False

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self.descriptor)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    folder = make_model("llama", tmp_path_factory.mktemp("source") / "small", **sizes)
    (folder / "docs").mkdir()
    (folder / "docs" / "usage.md").write_text("nested\n")
    return folder


@pytest.fixture(scope="module")
def one(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few kilobytes in one file. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("one") / "out"
    succeeded(run(source, "--out", out, "--samples", 4, "--seq-len", 16, "--quiet"))
    return out


@pytest.fixture(scope="module")
def three(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in three shards. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("three") / "out"
    succeeded(run(source, "--out", out, "--samples", 4, "--seq-len", 16, "--quiet", "--max-shard-size", "100KB"))
    return out


@pytest.fixture(scope="module")
def logits(one: Path) -> Tensor:
    """What the checkpoint computes."""
    return logits_of(load(str(one)))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def single(one: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one, tmp_path / "out"))


@pytest.fixture
def sharded(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "out"))


def edit_json(folder: Path, name: str, **fields: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))


def edit_block(folder: Path, **fields: Any) -> None:
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder, "config.json", quantization_config=block | fields)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    stored = load_file(folder / SINGLE)
    edit(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / SINGLE, {"format": "pt"})


# --- links ---

LINKED = ["config.json", SHARD, INDEX, "tokenizer.json", REPORT, MANIFEST, "README.md", "docs"]


def test_the_watch_sees_what_any_library_opens(one: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(one / SINGLE)
    with Watch(one / SINGLE) as watch:
        os.stat(tmp_path / "link")
        assert not watch.opened()
        with safe_open(tmp_path / "link", "pt"):
            assert watch.opened()
        (tmp_path / "link").read_bytes()
        assert watch.opened()


def lead_out(path: Path, way: str) -> Path:
    """Move a file or folder out of its checkpoint, and put a link in its place."""
    outside = path.parent.parent / "outside"
    outside.mkdir()
    target = Path(shutil.move(path, outside / path.name))
    if way == "chain":
        (path.parent / "step").symlink_to(target)
        path.symlink_to("step")
    else:
        path.symlink_to(target if way == "absolute" else Path("../outside") / path.name)
    return target


@pytest.mark.parametrize("way", ["absolute", "relative", "chain"])
@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_refused_and_not_followed(name: str, way: str, sharded: Path):
    target = lead_out(sharded / name, way)
    with Watch(target, *target.parent.rglob("*")) as watch:
        all_refuse(sharded, "link or path out of the folder")
        assert not watch.opened()


@pytest.mark.parametrize("name", LINKED)
def test_plain_transformers_refuses_it_too_and_reads_no_linked_weights(name: str, sharded: Path):
    target = lead_out(sharded / name, "relative")
    with Watch(target, *target.parent.rglob("*")) as watch:
        with pytest.raises(CheckpointError, match="link or path out of the folder"):
            plain(sharded)
        # config and index are read by transformers before it asks this package
        assert not watch.opened() or name in ("config.json", INDEX)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_to_what_is_not_there_is_refused(name: str, sharded: Path):
    shutil.rmtree(sharded / name) if name == "docs" else (sharded / name).unlink()
    (sharded / name).symlink_to("nowhere")
    all_refuse(sharded)


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX, "tokenizer.json", "extra"])
def test_links_in_a_circle_are_refused(name: str, sharded: Path):
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to("around")
    (sharded / "around").symlink_to(name)
    all_refuse(sharded)


def test_a_folder_that_is_a_link_to_the_checkpoint_is_read(three: Path, tmp_path: Path, logits: Tensor):
    (tmp_path / "link").symlink_to(three, target_is_directory=True)
    assert torch.equal(logits_of(load(str(tmp_path / "link"))), logits)
    assert torch.equal(logits_of(plain(tmp_path / "link")), logits)
    assert inspect_checkpoint(tmp_path / "link").layers == inspect_checkpoint(three).layers
    verify_folder(tmp_path / "link")


def test_links_within_the_folder_are_followed(sharded: Path, logits: Tensor):
    (sharded / "real").mkdir()
    for name in LINKED:
        if name != MANIFEST:
            shutil.move(sharded / name, sharded / "real" / name)
            (sharded / name).symlink_to(Path("real") / name)
    write_manifest(sharded)
    assert torch.equal(logits_of(load(str(sharded))), logits)
    assert torch.equal(logits_of(plain(sharded)), logits)
    verify_folder(sharded)
    for name in COMMANDS:
        succeeded(command(name, sharded))
    assert not (sharded / "config.json").is_symlink()  # retarget put a file in its place
    assert json.loads((sharded / "real" / "config.json").read_text())["quantization_config"]["sparsity"] == 0.5


def as_in_the_cache(folder: Path, home: Path) -> Path:
    """A checkpoint as the Hub's cache holds it: links from a snapshot to blobs that are named by their hash."""
    blobs, snapshot = home / "models--lab--small" / "blobs", home / "models--lab--small" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


def test_the_layout_of_the_hubs_cache_is_read(three: Path, tmp_path: Path, logits: Tensor):
    snapshot = as_in_the_cache(three, tmp_path)
    blobs = contents(tmp_path / "models--lab--small" / "blobs")
    assert torch.equal(logits_of(load(str(snapshot))), logits)
    assert torch.equal(logits_of(plain(snapshot)), logits)
    assert inspect_checkpoint(snapshot).layers == inspect_checkpoint(three).layers
    verify_folder(snapshot)
    for name in COMMANDS:
        succeeded(command(name, snapshot))
    assert contents(tmp_path / "models--lab--small" / "blobs") == blobs


@pytest.mark.parametrize("way", ["../../../outside", "../other/file", "../../blobs/../../outside", "../../refs/main"])
def test_a_link_from_a_snapshot_to_what_is_no_blob_is_refused(way: str, three: Path, tmp_path: Path):
    snapshot = as_in_the_cache(three, tmp_path)
    target = snapshot / way
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(three / "tokenizer.json", target)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(way)
    with Watch(target) as watch:
        all_refuse(snapshot, "'tokenizer.json'", "link or path out of the folder")
        assert not watch.opened()


def test_a_folder_beside_that_is_called_blobs_is_no_cache(three: Path, tmp_path: Path):
    snapshot = as_in_the_cache(three, tmp_path)
    moved = snapshot.parent.rename(snapshot.parent.parent / "elsewhere") / snapshot.name
    all_refuse(moved, "link or path out of the folder")


def test_verify_does_not_read_through_a_hidden_link(single: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    (single / ".hidden").symlink_to("../secret")
    write_manifest(single)  # whose hash would tell what the file holds
    with Watch(tmp_path / "secret") as watch:
        with pytest.raises(WinaError, match="hidden"):
            verify_folder(single)
        assert not watch.opened()


@pytest.mark.parametrize("name", [".config.json.new", f".{MANIFEST}.new", ".README.md.new"])
def test_retarget_does_not_write_through_a_link(name: str, single: Path, tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    (single / name).symlink_to("../precious")
    result = run_wina("retarget", single, "--sparsity", "0.25")
    assert (tmp_path / "precious").read_text() == "precious"
    assert result.exit_code == 0 or refused(result)


@pytest.mark.parametrize("name", [".config.json.new", f".{MANIFEST}.new"])
def test_retarget_does_not_wait_for_a_pipe(name: str, single: Path):
    os.mkfifo(single / name)
    with within(HANG):
        result = run_wina("retarget", single, "--sparsity", "0.25")
    assert result.exit_code == 0 or refused(result)


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
        edit_json(folder, "config.json", transformers_weights="other.safetensors"),
    ),
    "config.json names a shard": lambda folder: edit_json(folder, "config.json", transformers_weights=SHARD),
    "config.json names a pickle": lambda folder: (
        torch.save({}, folder / "adapter_model.bin"),
        edit_json(folder, "config.json", transformers_weights="adapter_model.bin"),
    ),
    "config.json names a file outside": lambda folder: (
        shutil.copyfile(folder / SHARD, folder.parent / "other.safetensors"),
        edit_json(folder, "config.json", transformers_weights="../other.safetensors"),
    ),
    "config.json names a number": lambda folder: edit_json(folder, "config.json", transformers_weights=7),
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
    edit_json(sharded, "config.json", transformers_weights="adapter_model.bin")  # the one pickle that it may name
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
    edit_json(single, "tokenizer_config.json", **json.loads(text))
    with Watch(outside) as watch:
        result = command("wina generate", single)
        assert not watch.opened()
    refused(result)


# --- code ---


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "ran"))


def pickle_only(folder: Path, marker: Path, name: str) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    torch.save({"model.norm.weight": torch.ones(16), "payload": Payload(marker)}, folder / name)


@pytest.mark.parametrize("weights", ["pip install wina-convert", None])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_refused_and_not_read(name: str, weights: str | None, single: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    pickle_only(single, marker, name)
    if "-of-" in name:
        (single / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}})
        )
    edit_json(single, "config.json", transformers_weights=name if name == "adapter_model.bin" else weights)
    write_manifest(single)
    all_refuse(single)
    with pytest.raises((CheckpointError, OSError)):
        plain(single)
    assert not marker.exists()
    torch.load(single / name, weights_only=False)
    assert marker.exists()  # it would have run


@pytest.fixture
def own_code(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint with Python files that write a file when they run, and that file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    marker = tmp_path / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
    classes = (  # not transformers' own: it would remember for good that they are code of a folder
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig): pass\n"
        "class Own(LlamaForCausalLM): config_class = OwnConfig\n"
    )
    for name in ("own.py", "modeling_llama.py", "tokenization_own.py", "custom_generate/generate.py"):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text(code + classes + "def generate(*args, **kwargs): pass\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit_json(single, "config.json", auto_map=auto_map)
    edit_json(single, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    return single, marker


def test_code_in_the_folder_does_not_run(own_code: tuple[Path, Path], logits: Tensor):
    folder, marker = own_code
    write_manifest(folder)
    assert torch.equal(logits_of(load(str(folder))), logits)
    assert torch.equal(logits_of(plain(folder)), logits)
    verify_folder(folder)
    inspect_checkpoint(folder)
    for name in COMMANDS:
        succeeded(command(name, folder))
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_that_the_model_or_tokenizer_needs_is_refused(model_type: str, own_code: tuple[Path, Path]):
    folder, marker = own_code
    edit_json(folder, "config.json", model_type=model_type)
    edit_json(folder, "tokenizer_config.json", tokenizer_class="Own")
    write_manifest(folder)
    refused(command("wina generate", folder))
    if model_type == "own":
        all_refuse(folder)
    assert not marker.exists()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) if model_type == "llama" else None
    # where the user allows it, it is theirs to run: the code is live
    assert marker.exists() == (model_type == "llama")


ATTENTION = ["kernels-community/flash-attn", "lab/evil:forward", "https://example.org/kernel", {"": "lab/evil"}]


@pytest.mark.parametrize("value", ATTENTION, ids=str)
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_that_would_be_downloaded_is_refused(
    field: str, value: Any, single: Path, logits: Tensor, monkeypatch: pytest.MonkeyPatch
):
    edit_json(single, "config.json", **{field: value})
    write_manifest(single)
    if field.endswith("_internal"):  # transformers takes no notice of it
        assert torch.equal(logits_of(load(str(single))), logits)
        return
    with monkeypatch.context() as context:  # transformers, which would download it, is not asked
        context.setattr(AutoModelForCausalLM, "from_pretrained", failing(AssertionError("transformers was asked")))
        all_refuse(single, field, "code to download")


# --- sizes ---

LIMITED = """
import base64, json, os, resource, signal, sys
import torch
from pathlib import Path
from transformers.utils import logging
from wina_convert import load
from wina_convert.errors import WinaError
from wina_convert.inspection import inspect_checkpoint
from wina_convert.integrity import verify_folder, write_manifest

class Hung(BaseException): pass
def stop(*args): raise Hung
signal.signal(signal.SIGALRM, stop)
logging.disable_progress_bar()
logging.set_verbosity_error()
folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
doors = {"load": lambda folder: load(str(folder)), "inspect": inspect_checkpoint, "verify": verify_folder}
for door in doors.values():
    door(folder)  # imports, and what is compiled once
def held():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = held() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, files in cases.items():
    before = {file: (folder / file).read_bytes() for file in files}
    for file, data in files.items():
        (folder / file).write_bytes(base64.b64decode(data))
    write_manifest(folder)
    for door, read in doors.items():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chain, kind, message = [], "accepted", ""
        signal.alarm(20)
        try:
            read(folder)
        except BaseException as error:
            kind, message = "refused" if isinstance(error, WinaError) else type(error).__name__, str(error)
            while error is not None:
                chain.append(f"{type(error).__name__} {error}")
                error = error.__cause__ or error.__context__
        signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        short = any("MemoryError" in one or "allocate" in one or "hung" in one.lower() for one in chain)
        print(json.dumps([name, door, kind, message[:1000], grown, short]), flush=True)
    for file, data in before.items():
        (folder / file).write_bytes(data)
"""
SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim"]
ENORMOUS = [10**9, 10**12, 2**63, 10**400, 1e300, -2, -(10**12), 0]
JUST_WITHIN = [1000, 1 << 24]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + body


def headers(data: bytes) -> dict[str, bytes]:
    """Files whose headers promise what the file does not hold."""
    header, body = header_of(data)
    name = f"{Q}.weight_t"

    def entry(**fields: Any) -> bytes:
        return with_header(header | {name: header[name] | fields}, body)

    found = {f"header of {size} bytes": with_header(header, body, size) for size in (2**62, 2**63, 2**64 - 1, 2**40, 0)}
    found |= {
        f"shape {shape}": entry(shape=shape)
        for shape in (
            [2**32, 2**32],
            [2**62, 4],
            [2**40, 2**40, 2**40],
            [2**64],
            [10**30],
            [-16, -16],
            [16, -16],
            [1e3],
        )
    }
    found |= {
        f"offsets {offsets}": entry(data_offsets=offsets)
        for offsets in (
            [0, 2**62],
            [2**62, 2**63],
            [len(body), len(body) + 1024],
            [1024, 0],
            [-1024, 0],
            [0],
            [0, 1, 2],
        )
    }
    found["enormous shape and offsets"] = entry(shape=[2**31, 2**31], data_offsets=[0, 2**64 - 4])
    found["a thousand dimensions"] = entry(shape=[1] * 1000 + [16, 16])
    found["two tensors in one place"] = with_header(header | {"twin": header[name]}, body)
    found["a tensor of nothing, enormous"] = with_header(
        header | {"void": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, body
    )
    found["no JSON"] = with_header(b"\x00" * 64, body)
    found["a list"] = with_header([], body)
    found["nested without end"] = with_header(b"[" * 50_000, body)
    found["only a length"] = (2**62).to_bytes(8, "little")
    found["nothing"] = b""
    return found


def more(number: int, value: Any) -> dict[str, Any]:
    return {f"extra_{index}": value for index in range(number)}


@pytest.fixture(scope="module")
def limited(one: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[str, str, int, bool]]]:
    """What the readers made of each case, given one gigabyte: (outcome, message, kB taken, whether it ran short)."""
    config = json.loads((one / "config.json").read_text())
    rope, block = config["rope_parameters"], config["quantization_config"]

    def changed(**fields: Any) -> dict[str, bytes]:
        return {"config.json": json.dumps(config | fields).encode()}

    cases = {f"{name} {value:.4g}" if value < 10**300 else f"{name} 1e400": changed(**{name: value})
             for name in SIZES for value in (*ENORMOUS, *JUST_WITHIN)}  # fmt: skip
    cases |= {f"{name} '{10**9}'": changed(**{name: str(10**9)}) for name in SIZES}
    cases |= {f"{name} NaN": changed(**{name: float("nan")}) for name in SIZES}
    cases |= {f"{name} Infinity": changed(**{name: float("inf")}) for name in SIZES}
    cases |= {f"num_labels {value}": changed(num_labels=value) for value in (10**9, 1 << 24)}
    cases |= {f"partial_rotary_factor {value}": changed(partial_rotary_factor=value) for value in (1e8, 1e12)}
    cases |= {
        f"rope {name} {value}": changed(rope_parameters=rope | {name: value})
        for name in ("partial_rotary_factor", "factor", "original_max_position_embeddings")
        for value in (1e8, 1e300, -1e8)
    }
    cases |= {f"rope type {name}": changed(rope_parameters={**rope, "rope_type": name, "short_factor": [1.0] * 10**5,
              "long_factor": [1.0] * 10**5}) for name in ("longrope", "yarn", "dynamic", "linear")}  # fmt: skip
    cases |= {
        "a thousand layers in a list": changed(layer_types=["full_attention"] * 10**6),
        "a grid of a million points": changed(quantization_config=block | {"grid": [k / 10**6 for k in range(10**6)]}),
        "a hundred thousand modules": changed(
            quantization_config=block | {"modules": [f"m.{k}" for k in range(10**5)]}
        ),
        "a module a hundred thousand times": changed(
            quantization_config=block | {"modules": block["modules"][:1] * 10**5}
        ),
        "a hundred thousand fields": changed(**more(10**5, 1)),
        "a number of a hundred thousand digits": {
            "config.json": b'{"model_type": "llama", "x": ' + b"9" * 10**5 + b"}"
        },
        "nested without end": {"config.json": b'{"model_type": "llama", "x": ' + b"[" * 10**6},
    }
    cases |= {name: {SINGLE: data} for name, data in headers((one / SINGLE).read_bytes()).items()}
    folder = shutil.copytree(one, tmp_path_factory.mktemp("limited") / "out")
    text = json.dumps(
        {name: {file: b64encode(data).decode() for file, data in files.items()} for name, files in cases.items()}
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, folder], input=text, capture_output=True, text=True, timeout=1800, check=False
    )
    found: dict[str, dict[str, tuple[str, str, int, bool]]] = {}
    for name, door, *outcome in map(json.loads, done.stdout.splitlines()):
        found.setdefault(name, {})[door] = tuple(outcome)
    assert len(found) == len(cases), (list(cases)[len(found)], done.returncode, done.stderr[-2000:])
    return found


ACCEPTED = (
    "max_position",
    "rope factor",
    "rope original",
    "rope type",
    "a hundred thousand fields",
    "a module a hundred",
)


def test_no_reader_takes_memory_or_time_because_a_number_says_so(limited: dict[str, Any]):
    wrong = {
        f"{name}: {door}": (kind, message[:200], f"{grown // 1024} MB")
        for name, doors in limited.items()
        for door, (kind, message, grown, short) in doors.items()
        if grown > 300 * 1024 or short or kind not in ("refused", "accepted")
    }
    assert not wrong, "\n".join(f"{case}: {outcome}" for case, outcome in wrong.items())


def test_numbers_that_no_model_has_are_refused(limited: dict[str, Any]):
    accepted = {name for name, doors in limited.items() if doors["load"][0] == "accepted"}
    assert {name for name in accepted if not name.startswith(ACCEPTED)} - {"a tensor of nothing, enormous"} == set()
    refused_early = [name for name in limited if name.startswith("header of") or name.startswith("offsets")]
    assert len(refused_early) > 10
    for name in refused_early:
        assert {kind for kind, *_ in limited[name].values()} == {"refused"}
        assert all("not safetensors" in message for _, message, *_ in limited[name].values())
    for name in SIZES:
        assert f"{name} in config.json is" in limited[f"{name} 1e+12"]["inspect"][1]


# --- values of the block ---

NAN, INFINITY = float("nan"), float("inf")
BAD_BLOCKS: dict[str, dict[str, Any]] = {
    **{
        f"sparsity {value!r:.12}": {"sparsity": value}
        for value in (NAN, INFINITY, -INFINITY, "0.5", True, False, 7, -1, 0.951, -1e-9, [0.5], {}, 10**400)
    },
    **{
        f"grid {value!r:.24}": {"grid": value}
        for value in (
            [], [0], None, "0, 0.5", 7, {}, [0, NAN], [NAN, 0.5], [0, INFINITY], [0, "0.5"], [0, None], [[0], [1]],
            [0, 10**400],
            [0.1, 0.5], [0, 0.5, 0.4], [0, 0.5, 0.5], [0, 1.5], [-0.1, 0.5], [k / 2000 for k in range(2000)], [0, 0.5],
        )
    },
    **{f"prefill {value!r}": {"prefill": value} for value in ("sparse", "", 7, [], {}, True, "GATED")},
    **{
        f"modules {value!r:.24}": {"modules": value}
        for value in (None, "*", 7, {}, [], [None], [7], [""], ["*"], ["model"], ["model.layers.0"], [["a"]])
    },
    **{
        f"format_version {value!r:.12}": {"format_version": value}
        for value in (2, 0, -1, "1", None, 1.5, [1], {}, 10**400)
    },
    **{f"scheme {value!r}": {"scheme": value} for value in (None, 7, [])},
    **{f"allocation {value!r}": {"allocation": value} for value in (None, 7, [])},
    "an unknown field": {"rotation": "hadamard"},
    "an empty unknown field": {"": None},
}  # fmt: skip


@pytest.mark.parametrize("fields", BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_value_that_the_format_does_not_have_is_refused(fields: dict[str, Any], single: Path):
    edit_block(single, **fields)
    write_manifest(single)
    all_refuse(single)
    with pytest.raises(WinaError):
        plain(single)


@pytest.mark.parametrize(
    "value", [None, [], [1], "wina", 7, {}, True, {"quant_method": "gptq"}, {"quant_method": ["wina"]}]
)
def test_a_block_that_is_none_is_refused(value: Any, single: Path):
    edit_json(single, "config.json", quantization_config=value)
    write_manifest(single)
    all_refuse(single, "not a WINA checkpoint")


@pytest.mark.parametrize("digits", ["1e999", "-1e999", "NaN", "-Infinity", "0.5e-999", "0x1", "00.5", "1" * 5000])
def test_a_sparsity_written_strangely_is_refused_or_is_a_number(digits: str, single: Path):
    text = (single / "config.json").read_text().replace('"sparsity": 0.5', f'"sparsity": {digits}')
    assert digits in text
    (single / "config.json").write_text(text)
    write_manifest(single)
    if digits == "0.5e-999":  # too small for a float: 0
        assert inspect_checkpoint(single).sparsity == 0.0
        load(str(single))
    else:
        all_refuse(single)


@pytest.mark.parametrize(
    "fields",
    [
        *({"source": value} for value in (None, [], "name", 7, {"name": None}, {"name": []}, {"name": {"a": 1}}, {})),
        *({"calibration": value} for value in (None, [], "text", 7, {"text": 10**400})),
        *({"tool_version": value} for value in (None, [], 7, "99.9.9")),
        {"sparsity": None},
        {"prefill": None},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_what_is_only_told_of_a_checkpoint_is_refused_or_does_no_harm(fields: dict[str, Any], single: Path):
    edit_block(single, **fields)
    write_manifest(single)
    for read in READERS.values():
        try:
            read(single)
        except WinaError:
            continue
    for name in COMMANDS:
        result = command(name, single)
        assert result.exit_code == 0 or refused(result)


def test_modules_that_repeat_are_refused_or_gated_once(single: Path, logits: Tensor):
    block = json.loads((single / "config.json").read_text())["quantization_config"]
    edit_block(single, modules=[*block["modules"], *block["modules"]])
    write_manifest(single)
    for door in (load, plain):
        try:
            found = logits_of(door(str(single)))
        except WinaError:
            continue
        assert torch.equal(found, logits)


HELD_OUT: dict[str, Any] = {
    "sparsity": [None, "0.5", "x", NAN, INFINITY, 10**400, [], True],
    "projections": [None, [], {}, "x", 7, {Q: None}, {Q: "x"}, {Q: NAN}, {Q: 10**400}, {"other": 0.5}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in HELD_OUT.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_a_strange_report_does_not_stop_an_inspection(field: str, value: Any, single: Path):
    report = json.loads((single / REPORT).read_text())
    held_out = report["verification"]["held_out"]
    if field == "projections" and isinstance(value, dict) and Q in value:
        value = held_out["projections"] | value
    held_out[field] = value
    (single / REPORT).write_text(json.dumps(report))
    for options in ((), ("--json",)):
        result = run_wina("inspect", single, *options)
        assert result.exit_code == 0 or refused(result), repr(result.exception)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "null", "{}", '{"verification": 7}', '{"verification": {"held_out": null}}', "[" * 10**5, "\xff"],
)
def test_what_is_no_report_does_not_stop_an_inspection(text: str, single: Path):
    (single / REPORT).write_bytes(text.encode("latin-1"))
    result = run_wina("inspect", single)
    assert result.exit_code == 0 or refused(result), repr(result.exception)


# --- values of the weights ---


def fill(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda stored: stored[name].view(-1)[index].fill_(value)


BAD_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    f"{leaf} {index} is {value}": fill(f"{Q}.{leaf}", index, value)
    for leaf, values in {
        "thresholds": (
            (-1, NAN), (-1, INFINITY), (-1, -1.0), (0, 1.0), (0, -1.0), (0, NAN), (10, 0.0), (10, NAN), (10, 1e30),
        ),
        "column_norms": ((0, NAN), (-1, INFINITY), (5, -1.0), (5, -INFINITY), (15, -1e-30)),
    }.items()
    for index, value in values
}  # fmt: skip


@pytest.mark.parametrize("edit", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_norms_and_thresholds_that_are_none_are_refused_on_load(
    edit: Callable[[dict[str, Tensor]], object], single: Path
):
    edit_tensors(single, edit)
    for door in (load, plain):
        with pytest.raises(CheckpointError, match=f"{Q}: column norms are not finite"):
            door(str(single))
    with pytest.raises(CheckpointError, match=f"{Q}: column norms are not finite"):
        load(str(single), sparsity=0.25)
    refused(command("wina generate", single), Q)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", f"{Q}.weight_t"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float64], ids=str)
def test_weights_of_another_kind_are_refused_or_computed_with(dtype: torch.dtype, name: str, single: Path):
    edit_tensors(single, lambda stored: stored.update({name: stored[name].abs().to(dtype).float()}))
    same_values = logits_of(load(str(single)))
    edit_tensors(single, lambda stored: stored.update({name: stored[name].to(dtype)}))
    write_manifest(single)
    for read in (inspect_checkpoint, verify_folder):
        with suppress(WinaError):
            read(single)
    for door in (load, plain):
        try:
            model = door(str(single))
        except WinaError:
            continue
        torch.testing.assert_close(logits_of(model), same_values, rtol=0, atol=1e-5)


def test_a_grid_of_more_points_than_a_curve_needs_is_refused(single: Path):
    curve = torch.linspace(0, 1, 1001)
    edit_tensors(
        single,
        lambda stored: stored.update({name: curve.clone() for name in stored if name.endswith(".thresholds")}),
    )
    edit_block(single, grid=[k / 1000 for k in range(1001)])
    write_manifest(single)
    all_refuse(single, "grid")


# --- what is shown ---

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
    edit_block(folder, modules=[Q])


PLACES: dict[str, Callable[[Path, str], object]] = {
    "the source": lambda folder, name: edit_block(folder, source={"name": name}),
    "the scheme": lambda folder, name: edit_block(folder, scheme=name),
    "a field of the block": lambda folder, name: edit_block(folder, **{name: 1}),
    "the prefill": lambda folder, name: edit_block(folder, prefill=name),
    "the sparsity": lambda folder, name: edit_block(folder, sparsity=name),
    "the format version": lambda folder, name: edit_block(folder, format_version=name),
    "a module": lambda folder, name: edit_block(folder, modules=[name]),
    "a module of a layer": lambda folder, name: edit_block(folder, modules=[f"model.layers.0.mlp.{name}"]),
    "the family": lambda folder, name: edit_json(folder, "config.json", model_type=name),
    "a field of config.json": lambda folder, name: edit_json(folder, "config.json", **{f"{name}_size": 10**12}),
    "the attention": lambda folder, name: edit_json(folder, "config.json", attn_implementation=f"a/{name}"),
    "an attention": lambda folder, name: edit_json(folder, "config.json", attn_implementation=name),
    "the activation": lambda folder, name: edit_json(folder, "config.json", hidden_act=name),
    "the dtype": lambda folder, name: edit_json(folder, "config.json", dtype=name),
    "the rotary type": lambda folder, name: edit_json(folder, "config.json", rope_parameters={"rope_type": name}),
    "a field that no config can take": lambda folder, name: edit_json(folder, "config.json", sub_configs=name),
    "the weights of config.json": lambda folder, name: edit_json(folder, "config.json", transformers_weights=name),
    "a projection": lambda folder, name: rename(folder, f"model.layers.0.mlp.{name}"),
    "a stored projection": tensor_twice,
    "a dtype of the header": lambda folder, name: in_header(folder, dtype=name),
    "a tensor of the index": lambda folder, name: in_index(folder, name, SINGLE),
    "a file of the index": lambda folder, name: in_index(folder, "x", name),
    "a path of the index": lambda folder, name: in_index(folder, "x", f"../{name}"),
    "a file of the manifest": in_manifest,
    "the tokenizer's class": lambda folder, name: edit_json(folder, "tokenizer_config.json", tokenizer_class=name),
    "the chat template": lambda folder, name: edit_json(folder, "tokenizer_config.json", chat_template=name),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 10**9},
        {"num_return_sequences": 10**9},
        {"max_length": 10**12},
        {"temperature": "hot"},
        {"eos_token_id": "x"},
        {"top_k": -1},
        {"cache_implementation": "nosuch"},
        {"do_sample": "yes"},
    ],
    ids=str,
)
def test_a_generation_config_of_a_stranger_is_refused_or_does_no_harm(fields: dict[str, Any], single: Path):
    edit_json(single, "generation_config.json", **fields)
    with within(HANG):
        result = command("wina generate", single)
    assert result.exit_code == 0 or refused(result), repr(result.exception)


def test_retarget_of_a_stranger_changes_two_files_alone(single: Path):
    before = contents(single.parent)
    retarget(single, 0.25)
    after = contents(single.parent)
    assert {name for name in after if before.get(name) != after[name]} == {"out/config.json", f"out/{MANIFEST}"}
