"""A checkpoint holds everything of its source, never takes the place of something else, and can be read and retargeted."""

import errno
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import before_call, failing
from commands import SMALL, contents, refused, run, run_wina, succeeded
from families import make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wina_convert.checkpoint import open_checkpoint
from wina_convert.errors import CheckpointError, OptionError
from wina_convert.integrity import MANIFEST, verify_folder
from wina_convert.runtime.linear import gated_modules


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer with random weights. Shared: copy it to change it."""
    return make_model("llama", tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, converted. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    succeeded(run(source, "--out", out, *SMALL))
    return out


# --- the target ---


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize(
    ("options", "words"),
    [((), ("exists", "--out", "--overwrite")), (("--overwrite",), ("not a WINA checkpoint", "another --out"))],
    ids=["plain", "overwrite"],
)
def test_a_folder_that_exists_is_refused(options, words, dry: tuple[str, ...], source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    refused(run(source, "--out", tmp_path / "out", *options, *dry), str(tmp_path / "out"), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_file_in_the_place_of_the_target_is_refused(options: tuple[str, ...], source: Path, tmp_path: Path):
    (tmp_path / "out").write_text("precious")
    refused(run(source, "--out", tmp_path / "out", *options), str(tmp_path / "out"), "is a file", "another --out")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize(
    "way", ["source", "source/out", "source/deep/out", ".", "link", "link/out", "../{}/source/out"]
)
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_target_in_the_source_or_around_it_is_refused(
    way: str, options: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    refused(run("source", "--out", way.format(tmp_path.name), *options), "one inside the other", "another --out")
    assert contents(tmp_path) == before


def test_a_source_behind_a_link_is_protected_too(source: Path, tmp_path: Path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source", target_is_directory=True)
    refused(run(tmp_path / "link", "--out", tmp_path / "source" / "out"), "one inside the other")


def test_an_empty_folder_is_a_target(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    succeeded(run(source, "--out", tmp_path / "out", *SMALL))
    open_checkpoint(tmp_path / "out")


def test_missing_parents_of_a_target_are_made(source: Path, tmp_path: Path):
    succeeded(run(source, "--out", tmp_path / "new" / "deep" / "out", *SMALL))
    open_checkpoint(tmp_path / "new" / "deep" / "out")


def test_overwrite_replaces_a_checkpoint_and_leaves_nothing_of_it(source: Path, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    (out / "added.txt").write_text("from before")
    succeeded(run(source, "--out", out, "--overwrite", "--sparsity", "0.25", *SMALL))
    assert open_checkpoint(out).config.sparsity == 0.25
    assert not (out / "added.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_through_a_link_keeps_the_link(source: Path, converted: Path, tmp_path: Path):
    shutil.copytree(converted, tmp_path / "real")
    (tmp_path / "out").symlink_to("real", target_is_directory=True)
    succeeded(run(source, "--out", tmp_path / "out", "--overwrite", "--sparsity", "0.25", *SMALL))
    assert (tmp_path / "out").is_symlink()
    assert open_checkpoint(tmp_path / "real").config.sparsity == 0.25


# --- what a checkpoint holds ---

SIDECARS = {
    "LICENSE": b"Apache License 2.0\n",
    "NOTICE.txt": "Grüße\r\n".encode(),
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "special_tokens_map.json": b'{"bos_token": "<s>"}',
    "preprocessor_config.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "tokenizer.model": b"\0\1\2",
    "assets/picture.png": b"\x89PNG",
    "modeling_own.py": b"raise RuntimeError\n",
}
LEFT_BEHIND = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "model.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"msgpack",
    "consolidated.safetensors": b"other safetensors",
    ".gitattributes": b"hidden",
    ".cache/huggingface/download.lock": b"hidden",
}


def test_everything_beside_the_weights_comes_along_unchanged(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "source")
    for name, data in {**SIDECARS, **LEFT_BEHIND}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    succeeded(run(folder, "--out", tmp_path / "out", *SMALL))
    found = {name: data for name, data in contents(tmp_path / "out").items() if (tmp_path / "out" / name).is_file()}
    assert {name: found.get(name) for name in SIDECARS} == SIDECARS
    kept = {name for name in contents(source) if name not in ("model.safetensors", "config.json")}
    assert set(found) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "wina_report.json",
        MANIFEST,
        *SIDECARS,
        *kept,
    }
    for name in kept:
        assert found[name] == (source / name).read_bytes()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a name stands twice: {[name for name, _ in pairs]}"
    return dict(pairs)


FORMATS: dict[str, Callable[[str], str]] = {
    "as saved": lambda text: text,
    "compact": lambda text: json.dumps(json.loads(text), separators=(",", ":")),
    "tabs": lambda text: json.dumps(json.loads(text), indent="\t") + "\n\n",
    "windows": lambda text: text.replace("\n", "\r\n"),
    "blanks around": lambda text: f"\n  {text} \n ",
    "brace on the last line": lambda text: text.rstrip().removesuffix("}").rstrip() + "}",
    "exponents": lambda text: re.sub(r'("rms_norm_eps": )[^,]*', r"\g<1>1E-05", text).replace(
        '"initializer_range": 0.02', '"initializer_range": 2.0e-02'
    ),
    "letters": lambda text: text.replace("{", '{"author": "Zoë 世界", "escaped": "Zo\\u00eb \\/ \\"",', 1),
    "unknown fields": lambda text: text.replace("{", '{"own": [1, {"deep": {}}], "sparsity": 0.125, "n": null,', 1),
    "dtype null": lambda text: text.replace('"dtype": "float32"', '"dtype": null'),
    "empty quantization": lambda text: text.replace("{", '{"quantization_config": null, "sparsity": 0.125,', 1),
}


def reformat(source: Path, folder: Path, change: Callable[[str], str]) -> bytes:
    shutil.copytree(source, folder)
    text = change((source / "config.json").read_text("utf-8")).encode()
    (folder / "config.json").write_bytes(text)
    return text


@pytest.fixture(scope="module", params=FORMATS)
def reformatted(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, Path]:
    """config.json of a source in some form, and what that source becomes."""
    folder = tmp_path_factory.mktemp("reformatted")
    before = reformat(source, folder / "source", FORMATS[request.param])
    succeeded(run(folder / "source", "--out", folder / "out", *SMALL))
    return before, folder / "out"


def test_the_text_of_config_json_stays_and_our_block_is_added(reformatted: tuple[bytes, Path]):
    before, out = reformatted
    after = (out / "config.json").read_bytes()
    fields = json.loads(after, object_pairs_hook=unique)
    ours = {name: fields.pop(name) for name in ("quantization_config", "transformers_weights")}
    original = json.loads(before)
    if original.get("quantization_config", "") is None:
        del original["quantization_config"]
    elif original["dtype"] is None:
        original["dtype"] = "float32"
    else:
        assert after.startswith(before.rstrip()[:-1].rstrip())
    assert fields == original
    assert ours["quantization_config"]["quant_method"] == "wina"


def test_a_checkpoint_loads_whatever_the_form_of_its_config(reformatted: tuple[bytes, Path]):
    model = AutoModelForCausalLM.from_pretrained(reformatted[1])
    assert {gate.sparsity for gate in gated_modules(model).values()} == {0.5}
    assert model.dtype == torch.float32


def test_retarget_changes_the_one_number(
    reformatted: tuple[bytes, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = shutil.copytree(reformatted[1], tmp_path / "out")
    for step in ("StreamedModel", "build_skeleton", "read_tensors"):  # no model is run, no weight is read
        monkeypatch.setattr(f"wina_convert.checkpoint.{step}", failing(AssertionError(step)))
    before = contents(out)
    result = run_wina("retarget", out, "--sparsity", "0.3125")
    succeeded(result)
    assert "31.2%" in result.stdout
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {"config.json", MANIFEST}
    assert set(after) == set(before)
    old, new = before["config.json"], after["config.json"]
    start = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert new[:start].endswith(b'"sparsity": 0.')
    assert (old[start:].startswith(b"5"), new[start:].startswith(b"3125")) == (True, True)
    assert old[start + 1 :] == new[start + 4 :]
    assert json.loads(new)["quantization_config"]["sparsity"] == 0.3125


@pytest.mark.parametrize("name", ["as saved", "compact", "blanks around"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
def test_a_chosen_dtype_changes_the_dtype_alone(name: str, field: str | None, source: Path, tmp_path: Path):
    def change(text: str) -> str:
        fields = json.loads(text)
        del fields["dtype"]
        return FORMATS[name](json.dumps(fields | ({field: "float32"} if field else {}), indent=2))

    before = json.loads(reformat(source, tmp_path / "source", change))
    succeeded(run(tmp_path / "source", "--out", tmp_path / "out", "--dtype", "bfloat16", *SMALL))
    after = json.loads((tmp_path / "out" / "config.json").read_bytes(), object_pairs_hook=unique)
    ours = {name: after.pop(name) for name in ("quantization_config", "transformers_weights")}
    assert ours["quantization_config"]["quant_method"] == "wina"
    assert after == before | {field or "dtype": "bfloat16"}


# --- retarget, and reading a checkpoint ---


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.95])
def test_a_retargeted_checkpoint_loads_at_its_new_sparsity(sparsity: float, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    succeeded(run_wina("retarget", out, "--sparsity", sparsity))
    verify_folder(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {gate.sparsity for gate in gated_modules(model).values()} == {sparsity}


@pytest.mark.parametrize("sparsity", ["-0.1", "0.96", "50", "nan", "inf", "abc", ""])
def test_retarget_refuses_what_is_no_sparsity(sparsity: str, converted: Path, tmp_path: Path):
    out = shutil.copytree(converted, tmp_path / "out")
    before = contents(out)
    refused(run_wina("retarget", out, "--sparsity", sparsity), "sparsity")
    assert contents(out) == before


@pytest.mark.parametrize("command", [("retarget", "--sparsity", "0.5"), ("inspect",), ("eval", "--text", "bundled")])
def test_what_is_no_checkpoint_is_refused(command: tuple[str, ...], source: Path, tmp_path: Path):
    verb, *options = command
    folder = shutil.copytree(source, tmp_path / "source")
    before = contents(folder)
    refused(run_wina(verb, folder, *options), str(folder), "not a WINA checkpoint", f"wina-convert {folder} --out")
    refused(run_wina(verb, tmp_path / "nowhere", *options), str(tmp_path / "nowhere"))
    refused(run_wina(verb, folder / "config.json", *options), "config.json")
    assert contents(folder) == before


@pytest.mark.parametrize(("call", "file"), [(1, MANIFEST), (2, "config.json")])
def test_a_checkpoint_that_cannot_be_retargeted_stays(
    call: int, file: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = shutil.copytree(converted, tmp_path / "out")
    before = contents(out)
    fail = failing(OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(Path, "replace", before_call(Path.replace, call, fail))
    refused(run_wina("retarget", out, "--sparsity", "0.25"), str(out / file), "Read-only file system")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"format version 2 .* reads version 1; run `pip install --upgrade wina-convert`"),
        ({"format_version": None}, r"format version None"),
        ({"surprise": 1}, r"unknown fields: surprise"),
        ({"modules": ["model.layers.0.mlp.nosuch"]}, r"gates 'model.layers.0.mlp.nosuch'"),
        ({"grid": [0, 0.5, 0.4]}, r"grid .* ascending"),
        ({"grid": "0"}, r"grid .* ascending"),
        ({"sparsity": 2}, r"sparsity is 2"),
        ({"modules": None}, r"modules"),
        ({"modules": [1]}, r"modules"),
    ],
)
def test_a_checkpoint_that_cannot_be_understood_is_refused(
    change: dict[str, Any], message: str, converted: Path, tmp_path: Path
):
    out = shutil.copytree(converted, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, OptionError), match=message):
        open_checkpoint(out)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda stored: stored.pop("model.layers.0.mlp.up_proj.thresholds"),
            ("model.layers.0.mlp.up_proj.thresholds",),
        ),
        (lambda stored: stored.pop("model.layers.0.mlp.up_proj.weight_t"), ("model.layers.0.mlp.up_proj", "again")),
        (lambda stored: stored.clear(), ("model.layers.0.", "again")),
    ],
    ids=["no thresholds", "no weight", "no tensors"],
)
@pytest.mark.parametrize("command", [("inspect",), ("eval", "--text", "bundled", "--quiet")], ids=["inspect", "eval"])
def test_a_damaged_checkpoint_is_refused(
    command: tuple[str, ...], damage: Callable[[dict[str, Any]], Any], words: tuple[str, ...], converted: Path, tmp_path
):
    out = shutil.copytree(converted, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    damage(stored)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    refused(run_wina(command[0], out, *command[1:]), *words)


# --- the card ---


def with_card(source: Path, folder: Path, card: str | bytes) -> ModelCard:
    """The card of what a source with this card becomes."""
    shutil.copytree(source, folder)
    (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    succeeded(run(folder, "--out", folder.parent / "out", *SMALL))
    return ModelCard.load(folder.parent / "out" / "README.md")


def test_a_card_carries_what_the_source_card_says(source: Path, tmp_path: Path):
    text = """---
license: other
license_name: own
license_link: LICENSE
language: [de, zh]
tags: [stories, wina]
datasets: [org/stories]
base_model: org/larger
model-index: []
---
# Stories
"""
    card = with_card(source, tmp_path / "source", text)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert data["language"] == ["de", "zh"]
    assert data["datasets"] == ["org/stories"]
    assert data["tags"] == ["stories", "wina", "activation-sparsity"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert "base_model" not in data  # a folder is no model of the Hub


@pytest.mark.parametrize(
    ("metadata", "field", "value"),
    [
        ("license: mit\nlanguage: de\ntags: stories", "tags", {"stories", "wina", "activation-sparsity"}),
        ("license: mit\nlanguage: de\ntags: stories", "language", {"de"}),
        ("language:\n- 'no'\n- en", "language", {"no", "en"}),  # to YAML, an unquoted no is false
    ],
)
def test_a_single_value_or_a_word_that_yaml_misreads_is_carried(
    metadata: str, field: str, value: set[str], source: Path, tmp_path: Path
):
    found = with_card(source, tmp_path / "source", f"---\n{metadata}\n---\n").data.to_dict()[field]
    assert set([found] if isinstance(found, str) else found) == value


@pytest.mark.parametrize(
    "card", ["", "no metadata", "---\n: broken: [yaml\n---\n", "---\ntags: 7\n---\n", b"---\nlicense: \xff\n---\n"]
)
def test_a_source_without_a_usable_card_gets_one(card: str | bytes, source: Path, tmp_path: Path):
    assert {"wina", "activation-sparsity"} <= set(with_card(source, tmp_path / "source", card).data.tags)


def test_a_card_shows_what_was_measured(converted: Path):
    card = ModelCard.load(converted / "README.md")
    report = json.loads((converted / "wina_report.json").read_text())
    held_out = report["verification"]["held_out"]
    assert f"| perplexity | {held_out['dense_perplexity']:.3f} | {held_out['perplexity']:.3f} |" in card.text
    assert f"| sparsity achieved | 0% | {held_out['achieved']:.2%} |" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "{" not in card.text.replace("{#", "")


def test_the_command_on_a_card_makes_the_same_checkpoint(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = (
        "--sparsity",
        "0.3",
        "--seed",
        "3",
        "--batch-size",
        "2",
        "--dtype",
        "bfloat16",
        "--max-shard-size",
        "1MB",
    )
    patterns = ("--targets", "mlp,*.q_proj", "--ignore", "*.layers.0.*.up_proj")
    out = tmp_path / "out"
    succeeded(run(source, "--out", out, *SMALL, *options, *patterns))
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("`wina-convert")]
    command = shlex.split(line.split("`")[1])
    monkeypatch.chdir(source.parent)  # a folder is named by its last part
    again = [str(tmp_path / "again") if word == "DIR" else word for word in command[1:]]
    succeeded(run(*again, "--quiet"))
    assert contents(tmp_path / "again") == contents(out)
