"""The manifest of hashes: what a conversion wrote is told from what it did not, byte by byte and tensor by tensor."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import before_call, failing
from commands import contents, refused, run, run_wina, succeeded
from families import make_model
from folders import config_of, files_of, tensors_of
from hub import Hub, running_hub, use_endpoint
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from wina_convert import load
from wina_convert.checkpoint import open_checkpoint
from wina_convert.errors import CheckpointError, SourceError, VerificationError, WinaError
from wina_convert.integrity import MANIFEST, renewed_manifest, verify_folder, write_manifest
from wina_convert.retarget import retarget
from wina_convert.runtime.linear import gated_modules
from wina_convert.source import open_source

SMALL = ("--samples", "4", "--seq-len", "16", "--quiet")
Change = Callable[[Path], object]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
OTHER = "model.layers.2.mlp.down_proj"  # of a layer that the model does not have


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of a few kilobytes, with files beside its weights. Shared: copy it to change it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    folder = make_model("llama", tmp_path_factory.mktemp("source") / "small", **sizes)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    (folder / "docs").mkdir()
    (folder / "docs" / "usage.md").write_text("nested\n")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, converted into three shards. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    succeeded(run(source, "--out", out, *SMALL, "--max-shard-size", "100KB"))
    return out


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / MANIFEST).read_text("utf-8"))["files"]


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return change


def edit_config(**fields: Any) -> Change:
    return edit_json("config.json", lambda config: config.update(fields))


def edit_block(**fields: Any) -> Change:
    return edit_json("config.json", lambda config: config["quantization_config"].update(fields))


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors, each in its shard; a new one goes into the first shard, and the index follows."""

    def change(folder: Path) -> None:
        stored = tensors_of(folder)
        places = {name: file for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
        edit(stored)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: places.get(name, min(places.values())).name for name in stored}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for file in set(places.values()):
            members = {name: stored[name].contiguous() for name in stored if index["weight_map"][name] == file.name}
            save_file(members, file, {"format": "pt"})

    return change


def edit_tensor(name: str, edit: Callable[[Tensor], Tensor | None]) -> Change:
    """Change a tensor in place, or put another in its place."""

    def change(stored: dict[str, Tensor]) -> None:
        changed = edit(stored[name])
        stored[name] = stored[name] if changed is None else changed

    return edit_tensors(change)


# --- the manifest ---


def test_a_manifest_names_every_file_with_its_size_and_hash(converted: Path):
    expected = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files_of(converted).items()
        if name != MANIFEST
    }
    assert entries(converted) == expected
    assert {"config.json", "LICENSE", "docs/usage.md", "README.md", "wina_report.json"} <= set(expected)
    assert verify_folder(converted) == len(expected)


def test_a_manifest_written_again_is_the_same_and_leaves_out_what_the_hub_keeps_beside_a_download(copied: Path):
    before = (copied / MANIFEST).read_bytes()
    (copied / ".cache" / "huggingface").mkdir(parents=True)
    (copied / ".cache" / "huggingface" / "download.lock").write_text("")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    write_manifest(copied)
    assert (copied / MANIFEST).read_bytes() == before
    verify_folder(copied)


@pytest.mark.parametrize("name", ["Grüße.txt", "世界/a b.txt", 'quo"te', "line\nbreak", "back\\slash", "\x1b[31m"])
def test_file_names_of_any_letters_are_recorded(name: str, copied: Path):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("named")
    write_manifest(copied)
    assert entries(copied)[name]["size"] == 5
    verify_folder(copied)
    (copied / name).write_text("Named")
    with pytest.raises(VerificationError, match="was changed since the conversion") as raised:
        verify_folder(copied)
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)
    assert name in str(raised.value) or escaped in str(raised.value)


def test_a_file_name_that_is_not_utf_8_is_carried_or_refused(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "source")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"latin-1 in its name")
    result = run(folder, "--out", tmp_path / "out", *SMALL)
    if result.exit_code == 0:
        verify_folder(tmp_path / "out")
    else:
        refused(result, "caf")


def test_a_renewed_manifest_is_the_one_that_would_be_written(copied: Path):
    content = (copied / "config.json").read_bytes() + b"\n"
    renewed = renewed_manifest(copied, "config.json", content)
    (copied / "config.json").write_bytes(content)
    write_manifest(copied)
    assert renewed == (copied / MANIFEST).read_bytes()


BAD_MANIFESTS: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[:-3],
    "empty": lambda text: "",
    "formatted otherwise": lambda text: json.dumps(json.loads(text)),
    "another order": lambda text: (
        json.dumps({"files": dict(reversed(json.loads(text)["files"].items()))}, indent=2) + "\n"
    ),
    "a list": lambda text: "[]\n",
    "a number": lambda text: "7\n",
    "null": lambda text: "null\n",
    "no files": lambda text: "{}\n",
    "files is a list": lambda text: '{\n  "files": []\n}\n',
    "files is null": lambda text: '{\n  "files": null\n}\n',
    "another field": lambda text: text.replace('{\n  "files"', '{\n  "comment": "",\n  "files"', 1),
    "a field of an entry too many": lambda text: text.replace('"sha256"', '"comment": "",\n      "sha256"', 1),
    "an entry without a size": lambda text: re.sub(r',\n      "size": \d+', "", text, count=1),
    "an entry is null": lambda text: re.sub(r'("LICENSE": )\{[^}]*\}', r"\1null", text),
    "an entry is a list": lambda text: re.sub(r'("LICENSE": )\{[^}]*\}', r'\1["sha256", "size"]', text),
    "a size is text": lambda text: re.sub(r'"size": (\d+)', r'"size": "\1"', text, count=1),
    "a size is a float": lambda text: re.sub(r'"size": (\d+)', r'"size": \1.0', text, count=1),
    "nested without end": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_damaged_manifest_is_refused(damage: Callable[[str], str], copied: Path):
    text = damage((copied / MANIFEST).read_text())
    assert text != (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(text)
    for act in (lambda: verify_folder(copied), lambda: renewed_manifest(copied, "config.json", b"{}")):
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged; get it again"):
            act()
    before = contents(copied)
    refused(run_wina("retarget", copied, "--sparsity", "0.25"), MANIFEST, "damaged")
    assert contents(copied) == before


# --- the folder against the manifest ---


def test_every_change_of_a_byte_is_found(copied: Path):
    seed = random.SystemRandom().randrange(2**32)
    generator = random.Random(seed)
    files = [path for path in sorted(copied.rglob("*")) if path.is_file()]
    assert copied / MANIFEST in files
    for number in range(500):
        path = generator.choice(files)
        data = path.read_bytes()
        offset = generator.randrange(len(data))
        mask = 1 << generator.randrange(8) if number % 2 else generator.randrange(1, 256)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([data[offset] ^ mask]))
        found = False
        try:
            verify_folder(copied)
        except WinaError as error:
            found = path.name in str(error) or path.name == MANIFEST
        assert found, f"seed {seed}: byte {offset} of {path.name} changed by {mask:#04x} was not found, or not named"
        path.write_bytes(data)
    verify_folder(copied)  # nothing was left changed


@pytest.mark.parametrize("grow", [-1, 1, 1 << 20])
@pytest.mark.parametrize("pattern", ["config.json", "*-00002-of-*", "docs/usage.md", "wina_report.json"])
def test_a_file_of_another_length_is_found(pattern: str, grow: int, copied: Path):
    (path,) = copied.glob(pattern)
    data = path.read_bytes()
    path.write_bytes(data + bytes(grow) if grow > 0 else data[:grow])
    with pytest.raises(VerificationError, match=re.escape(f"{path} was changed since the conversion; get it again")):
        verify_folder(copied)


@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "LICENSE", "docs/usage.md", "model.safetensors.index.json", "wina_report.json"]
)
def test_a_missing_file_is_found(name: str, copied: Path):
    (copied / name).unlink()
    with pytest.raises(VerificationError, match=re.escape(f"'{name}' is missing (1 such files); get it again")):
        verify_folder(copied)


def test_several_missing_files_are_counted(copied: Path):
    for path in copied.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(VerificationError, match=r"'model-00001-of-00003.safetensors' is missing \(3 such files\)"):
        verify_folder(copied)


@pytest.mark.parametrize(
    "name", ["notes.txt", "docs/more.md", "new/deep/file", ".hidden", "model.safetensors", "docs/.git"]
)
def test_an_extra_file_is_found(name: str, copied: Path):
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_bytes(b"")
    with pytest.raises(VerificationError, match=re.escape(f"'{name}' is not in the manifest (1 such files)")):
        verify_folder(copied)


def test_a_renamed_file_is_found(copied: Path):
    (copied / "LICENSE").rename(copied / "LICENCE")
    with pytest.raises(VerificationError, match="'LICENSE' is missing"):
        verify_folder(copied)


def test_files_that_changed_places_are_found(copied: Path):
    first, second = sorted(copied.glob("*.safetensors"))[:2]
    first.rename(copied / "third")
    second.rename(first)
    (copied / "third").rename(second)
    with pytest.raises(VerificationError, match="was changed since the conversion"):
        verify_folder(copied)


def test_a_manifest_does_not_lead_out_of_its_folder(copied: Path):
    outside = copied.parent / "outside"
    outside.write_bytes(b"anything")
    content = json.loads((copied / MANIFEST).read_text())
    for name in ("../outside", str(outside), "docs/../../outside"):
        content["files"] |= {name: {"size": 8, "sha256": hashlib.sha256(b"anything").hexdigest()}}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (copied / MANIFEST).write_text(text)
        with pytest.raises(VerificationError, match="outside' is missing"):
            verify_folder(copied)
        del content["files"][name]


def test_without_a_manifest_a_folder_is_refused(copied: Path):
    (copied / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST} .* convert again"):
        verify_folder(copied)


def test_what_is_no_checkpoint_does_not_verify(source: Path, tmp_path: Path):
    refused(run_wina("verify", source, "--quiet"), str(source), MANIFEST)
    refused(run_wina("verify", tmp_path / "nowhere", "--quiet"), str(tmp_path / "nowhere"))
    refused(run_wina("verify", source / "config.json", "--quiet"), "config.json")
    folder = shutil.copytree(source, tmp_path / "source")
    write_manifest(folder)
    refused(run_wina("verify", folder, "--quiet"), "not a WINA checkpoint")


# --- the command ---


def test_the_command_says_in_one_line_that_all_is_well(converted: Path):
    before = contents(converted)
    result = run_wina("verify", converted)
    succeeded(result)
    assert result.stdout == f"{converted}: {len(entries(converted))} files are as they were written\n"
    assert all(line.startswith("Verifying ") for line in result.stderr.splitlines())
    quiet = run_wina("verify", converted, "--quiet")
    succeeded(quiet)
    assert quiet.output == ""
    assert contents(converted) == before


def test_the_command_says_in_one_line_what_is_damaged(copied: Path):
    path = min(copied.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = contents(copied)
    refused(run_wina("verify", copied, "--quiet"), str(path), "was changed since the conversion", "get it again")
    shown = run_wina("verify", copied)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert [line for line in shown.stderr.splitlines() if not line.startswith("Verifying ")] == [
        f"error: {path} was changed since the conversion; get it again"
    ]
    assert contents(copied) == before


# --- right hashes, wrong content ---


def nth(tensor: Tensor, index: int, value: float) -> None:
    tensor.view(-1)[index] = value


def scaled(curve: Tensor) -> Tensor:
    """An ascending curve from 0 that calibration did not find."""
    return curve * 1.01


def without_report_threshold(report: dict[str, Any]) -> None:
    del report["verification"]["thresholds"][DOWN]


def other_report_threshold(report: dict[str, Any]) -> None:
    report["verification"]["thresholds"][DOWN] *= 1.001


def strange_report_threshold(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report["verification"]["thresholds"].update({DOWN: value})


def transposed(stored: dict[str, Tensor]) -> None:
    """A whole projection of another shape, its norms too."""
    stored[f"{DOWN}.weight_t"] = stored[f"{DOWN}.weight_t"].t().contiguous()
    stored[f"{DOWN}.column_norms"] = torch.linalg.vector_norm(stored[f"{DOWN}.weight_t"], dim=1)


def infinite(stored: dict[str, Tensor]) -> None:
    nth(stored[f"{DOWN}.weight_t"], 0, float("inf"))
    nth(stored[f"{DOWN}.column_norms"], 0, float("inf"))


def stranger(stored: dict[str, Tensor]) -> None:
    """A projection that config.json does not name."""
    stored.update({name.replace(DOWN, OTHER): stored[name].clone() for name in gated(DOWN)})


def gated(name: str) -> list[str]:
    return [f"{name}.{leaf}" for leaf in ("weight_t", "column_norms", "thresholds")]


def modules(edit: Callable[[list[str]], object]) -> Change:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]["modules"]))


WRONG_CONTENT: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a norm a little too large": (
        edit_tensor(f"{DOWN}.column_norms", lambda norms: nth(norms, -1, norms[-1] * 1.001)),
        (f"{DOWN}.column_norms", "not those of its weights"),
    ),
    "a norm with another sign": (edit_tensor(f"{Q}.column_norms", lambda norms: -norms), (f"{Q}.column_norms",)),
    "a norm is zero": (edit_tensor(f"{Q}.column_norms", lambda norms: nth(norms, 3, 0)), (f"{Q}.column_norms",)),
    "a norm is NaN": (edit_tensor(f"{Q}.column_norms", lambda norms: nth(norms, 0, torch.nan)), (f"{Q}.column_norms",)),
    "norms in another order": (edit_tensor(f"{Q}.column_norms", lambda norms: norms.flip(0)), (f"{Q}.column_norms",)),
    "a weight changed": (edit_tensor(f"{Q}.weight_t", lambda w: nth(w, 7, w.abs().max() * 2)), (f"{Q}.column_norms",)),
    "a weight is NaN": (edit_tensor(f"{Q}.weight_t", lambda w: nth(w, -1, torch.nan)), (f"{Q}.column_norms",)),
    "a weight and its norm are infinite": (edit_tensors(infinite), (DOWN,)),
    **{
        f"a threshold is {value}": (
            edit_tensor(f"{DOWN}.thresholds", lambda t, v=value: nth(t, -1, v)),
            (f"{DOWN}.thresholds",),
        )
        for value in (float("nan"), float("inf"), 0.0)
    },
    "thresholds descend": (edit_tensor(f"{Q}.thresholds", lambda t: t.flip(0)), (f"{Q}.thresholds",)),
    "a threshold is below the one before": (
        edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 15, t[14] * 0.999)),
        (f"{Q}.thresholds", "ascending"),
    ),
    "thresholds start above 0": (edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 0, t[1] / 2)), (f"{Q}.thresholds",)),
    "thresholds start below 0": (edit_tensor(f"{Q}.thresholds", lambda t: nth(t, 0, -1)), (f"{Q}.thresholds",)),
    "thresholds are not those of the report": (edit_tensor(f"{DOWN}.thresholds", scaled), (DOWN, "wina_report.json")),
    "the report has another threshold": (
        edit_json("wina_report.json", other_report_threshold),
        (DOWN, "wina_report.json"),
    ),
    "the report lacks a threshold": (
        edit_json("wina_report.json", without_report_threshold),
        (DOWN, "wina_report.json"),
    ),
    **{
        f"a threshold of the report is {value!r:.8}": (
            edit_json("wina_report.json", strange_report_threshold(value)),
            ("wina_report.json",),
        )
        for value in (float("nan"), float("inf"), None, "x", [], 10**400)
    },
    "the report is empty": (lambda folder: (folder / "wina_report.json").write_text("{}"), ("wina_report.json",)),
    "the report is no JSON": (lambda folder: (folder / "wina_report.json").write_text("{"), ("wina_report.json",)),
    "the report is a list": (lambda folder: (folder / "wina_report.json").write_text("[]"), ("wina_report.json",)),
    "there is no report": (lambda folder: (folder / "wina_report.json").unlink(), ("wina_report.json",)),
    **{
        f"{leaf} in {dtype}": (
            edit_tensor(f"{DOWN}.{leaf}", lambda t, d=dtype: t.to(d)),
            (f"{DOWN}.{leaf}", str(dtype)),
        )
        for leaf in ("column_norms", "thresholds")
        for dtype in (torch.float16, torch.float64, torch.int32)
    },
    "a weight in integers": (edit_tensor(f"{DOWN}.weight_t", lambda w: w.to(torch.int32)), (f"{DOWN}.weight_t",)),
    "a weight in float64": (edit_tensor(f"{DOWN}.weight_t", lambda w: w.double()), (f"{DOWN}.weight_t",)),
    "a norm too few": (edit_tensor(f"{DOWN}.column_norms", lambda t: t[:-1]), (f"{DOWN}.column_norms", "[31]", "[32]")),
    "a threshold too few": (
        edit_tensor(f"{DOWN}.thresholds", lambda t: t[:-1]),
        (f"{DOWN}.thresholds", "[19]", "[20]"),
    ),
    "thresholds in a row": (edit_tensor(f"{DOWN}.thresholds", lambda t: t[None]), (f"{DOWN}.thresholds", "[1, 20]")),
    "a weight with a dimension more": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[..., None]), (f"{DOWN}.weight_t",)),
    "a weight with a dimension less": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[:, 0]), (f"{DOWN}.weight_t",)),
    "a weight without dimensions": (edit_tensor(f"{DOWN}.weight_t", lambda w: w[0, 0]), (DOWN,)),
    **{
        f"no {leaf}": (edit_tensors(lambda stored, n=f"{DOWN}.{leaf}": stored.pop(n)), (DOWN,))
        for leaf in ("weight_t", "column_norms", "thresholds")
    },
    "config names a projection that is not stored": (modules(lambda names: names.append(OTHER)), (OTHER,)),
    "a projection is named otherwise in config": (modules(lambda names: names.__setitem__(0, OTHER)), (OTHER,)),
    "config does not name a stored projection": (modules(lambda names: names.remove(DOWN)), (DOWN,)),
    "config names nothing": (modules(lambda names: names.clear()), ("does not name",)),
    "a stored projection without a name in config": (edit_tensors(stranger), (OTHER,)),
    "a grid of another length": (edit_block(grid=[0, 0.5, 0.95]), ("thresholds", "[3]")),
    "a sparsity out of range": (edit_block(sparsity=0.96), ("sparsity",)),
    # what transformers would find when it builds the model
    "a projection of another shape": (edit_tensors(transposed), (f"{DOWN}.weight_t", "32")),
    "a norm layer of another shape": (
        edit_tensor("model.norm.weight", lambda w: torch.ones(17)),
        ("model.norm.weight", "17"),
    ),
    "no embedding": (
        edit_tensors(lambda stored: stored.pop("model.embed_tokens.weight")),
        ("model.embed_tokens.weight",),
    ),
    "a layer too many in config": (edit_config(num_hidden_layers=3), ("model.layers.2",)),
}


@pytest.mark.parametrize(("change", "words"), WRONG_CONTENT.values(), ids=WRONG_CONTENT)
def test_wrong_content_under_right_hashes_is_found(change: Change, words: tuple[str, ...], copied: Path):
    change(copied)
    write_manifest(copied)
    with pytest.raises(WinaError) as raised:
        verify_folder(copied)
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"
    refused(run_wina("verify", copied, "--quiet"), *words)


def test_what_is_equal_but_written_otherwise_verifies(copied: Path):
    edit_tensors(lambda stored: None)(copied)  # the same tensors, laid out by another writer
    edit_json("config.json", lambda config: None)(copied)
    write_manifest(copied)
    verify_folder(copied)


def test_norms_and_thresholds_may_differ_by_the_rounding_of_another_machine(copied: Path):
    edit_tensor(f"{DOWN}.column_norms", lambda norms: norms * (1 + 1e-6))(copied)
    edit_tensor(f"{DOWN}.thresholds", lambda curve: curve * (1 + 1e-6))(copied)
    write_manifest(copied)
    verify_folder(copied)


def test_a_column_of_zeros_has_norm_zero_and_verifies(copied: Path):
    edit_tensor(f"{DOWN}.weight_t", lambda w: torch.cat([torch.zeros(1, 16), w[1:]]))(copied)
    edit_tensor(f"{DOWN}.column_norms", lambda norms: nth(norms, 0, 0))(copied)
    write_manifest(copied)
    verify_folder(copied)


# --- retarget ---


def test_retarget_keeps_the_manifest_right(copied: Path):
    before = entries(copied)
    for sparsity in (0.25, 0.0, 0.95, 1 / 3):
        succeeded(run_wina("retarget", copied, "--sparsity", sparsity))
        assert open_checkpoint(copied).config.sparsity == sparsity
        assert verify_folder(copied) == len(before)
    after = entries(copied)
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    succeeded(run_wina("retarget", copied, "--sparsity", 0.5))
    assert entries(copied) == before


@pytest.mark.parametrize("second", [0.25, 0.75])
@pytest.mark.parametrize("written", ["nothing", "manifest"])
def test_a_retarget_that_was_killed_is_repaired_by_another(
    written: str, second: float, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    before = contents(copied)
    killed = before_call(Path.replace, 1 if written == "nothing" else 2, failing(KeyboardInterrupt()))
    with monkeypatch.context() as context:
        context.setattr(Path, "replace", lambda path, target: killed(path, target))
        with pytest.raises(KeyboardInterrupt):
            retarget(copied, 0.25)
    changed = {name for name, data in contents(copied).items() if before.get(name) != data and not name.startswith(".")}
    assert changed == (set() if written == "nothing" else {MANIFEST})
    assert {gate.sparsity for gate in gated_modules(load(str(copied))).values()} == {0.5}
    with pytest.raises(VerificationError):
        verify_folder(copied)
    retarget(copied, second)
    verify_folder(copied)
    assert open_checkpoint(copied).config.sparsity == second
    assert set(contents(copied)) == set(before)


def test_retarget_gives_a_folder_without_a_manifest_none(copied: Path, tmp_path: Path):
    load(str(copied)).save_pretrained(tmp_path / "saved")
    retarget(tmp_path / "saved", 0.25)
    assert open_checkpoint(tmp_path / "saved").config.sparsity == 0.25
    assert not (tmp_path / "saved" / MANIFEST).exists()


def test_retarget_does_not_bless_other_damage(copied: Path):
    (copied / "LICENSE").write_text("changed")
    retarget(copied, 0.25)
    with pytest.raises(VerificationError, match="LICENSE was changed"):
        verify_folder(copied)


def first(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """A field in front of all others."""

    def edit(fields: dict[str, Any]) -> None:
        rest = dict(fields)
        fields.clear()
        fields.update({name: value} | {key: other for key, other in rest.items() if key != name})

    return edit


def inside(edit: Callable[[dict[str, Any]], object]) -> Change:
    return edit_json("config.json", lambda config: edit(config["quantization_config"]))


ODD_CONFIGS: dict[str, Change] = {
    "sparsity is null": edit_block(sparsity=None),
    "no sparsity": inside(lambda block: block.pop("sparsity")),
    "a sparsity in another block first": inside(first("calibration", {"sparsity": 0.125})),
    "the name as a value first": edit_json(
        "config.json", first("note", {"of": "quantization_config", "sparsity": 0.125})
    ),
    "the name in letters": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"quantization_config"', '"quantization\\u005fconfig"')
    ),
    "a block that counts for nothing": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"quantization_config": {"sparsity": 0.125},', 1)
    ),
}


@pytest.mark.parametrize("change", ODD_CONFIGS.values(), ids=ODD_CONFIGS)
def test_retarget_changes_the_sparsity_or_says_that_it_cannot(change: Change, copied: Path):
    change(copied)
    write_manifest(copied)
    before = contents(copied)
    result = run_wina("retarget", copied, "--sparsity", "0.25")
    if result.exit_code:
        refused(result, "config.json")
        assert contents(copied) == before
    else:
        assert open_checkpoint(copied).config.sparsity == 0.25
        assert {name: value for name, value in config_of(copied).items() if name != "quantization_config"} == {
            name: value for name, value in json.loads(before["config.json"]).items() if name != "quantization_config"
        }
        verify_folder(copied)


# --- a source from the Hub ---

NAME = "lab/small"


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        use_endpoint(server.url, tmp_path / "home", monkeypatch)
        server.add(NAME, source)
        yield server


def large_file(folder: Path, path: Path) -> dict[str, Any]:
    """What the Hub says of a file that it keeps in LFS, as it does weights."""
    data = path.read_bytes()
    name, oid = path.relative_to(folder).as_posix(), hashlib.sha256(data).hexdigest()
    lfs = {"oid": oid, "size": len(data), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


@pytest.fixture(params=["git", "lfs"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the Hub keeps files decides which checksum it tells of them."""
    if request.param == "lfs":
        monkeypatch.setattr("hub._entry", large_file)


def in_cache(home: Path, name: str) -> Path:
    """A file that was downloaded: a link to its blob."""
    (path,) = (home / "hub").glob(f"models--*/snapshots/*/{name}")
    return path


def alter(path: Path) -> None:
    """Another last byte; the size stays."""
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "docs/usage.md"])
def test_a_download_that_was_altered_in_the_cache_is_refused(name: str, hub: Hub, source: Path, tmp_path: Path):
    open_source(NAME)
    path = in_cache(tmp_path / "home", name)
    alter(path)
    with pytest.raises(SourceError, match="does not have the Hub's checksum"):
        open_source(NAME)
    refused(run(NAME, "--out", tmp_path / "out", *SMALL), str(path), "does not have the Hub's checksum", "run again")
    assert not (tmp_path / "out").exists()
    path.resolve().unlink()  # what the message tells to do
    open_source(NAME)
    assert path.read_bytes() == (source / name).read_bytes()


@pytest.mark.usefixtures("kept")
def test_a_download_that_is_the_hubs_converts(hub: Hub, source: Path, tmp_path: Path):
    for _ in range(2):  # from the Hub, and from the cache
        assert open_source(NAME).folder.parent.name == "snapshots"
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL))
    verify_folder(tmp_path / "out")


def closed(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", home, monkeypatch)


def failing_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].status = 503


def offline(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("state", [closed, failing_hub, offline])
def test_without_the_hub_what_was_downloaded_still_converts(
    state: Callable[..., None], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = open_source(NAME).revision
    asked = len(hub.requests)
    state(hub, tmp_path / "home", monkeypatch)
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL))
    assert json.loads((tmp_path / "out" / "wina_report.json").read_text())["source"]["revision"] == commit
    assert (len(hub.requests) > asked) == (state is failing_hub)
    verify_folder(tmp_path / "out")
