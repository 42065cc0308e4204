"""The manifest of hashes: what a conversion wrote is told from what it did not, byte by byte."""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import SMALLEST, contents, refused, run, run_wina
from support.folders import entries, files_of
from wina_convert.errors import CheckpointError, VerificationError, WinaError
from wina_convert.format.manifest import renewed_manifest, write_manifest
from wina_convert.format.names import MANIFEST
from wina_convert.verbs.verify import verify_folder

MODEL = "kilobytes in shards"  # see support/shared.py


# --- the manifest ---


def test_a_manifest_names_every_file_with_its_size_and_hash(converted: Path):
    expected = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files_of(converted).items()
        if name != MANIFEST
    }
    assert entries(converted) == expected
    assert {"config.json", "LICENSE", "docs/usage.md", "README.md", "wina_report.json"} <= set(expected)
    assert verify_folder(converted).files == len(expected)


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
    result = run(folder, "--out", tmp_path / "out", *SMALLEST)
    if result.exit_code == 0:
        verify_folder(tmp_path / "out")
    else:
        refused(result, "caf")


def test_a_renewed_manifest_is_the_one_that_would_be_written(copied: Path):
    content = (copied / "config.json").read_bytes() + b"\n"
    renewed = renewed_manifest(copied, {"config.json": content})
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
    for act in (lambda: verify_folder(copied), lambda: renewed_manifest(copied, {"config.json": b"{}"})):
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged; get it again"):
            act()
    before = contents(copied)
    refused(run_wina("retarget", copied, "--sparsity", "0.25"), MANIFEST, "damaged")
    assert contents(copied) == before


# --- the folder against the manifest ---


@pytest.mark.slow
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
    refused(run_wina("verify", source, "--quiet"), str(source), "not a WINA checkpoint")
    refused(run_wina("verify", tmp_path / "nowhere", "--quiet"), str(tmp_path / "nowhere"))
    refused(run_wina("verify", source / "config.json", "--quiet"), "config.json")
    folder = shutil.copytree(source, tmp_path / "source")
    write_manifest(folder)
    refused(run_wina("verify", folder, "--quiet"), "not a WINA checkpoint")
