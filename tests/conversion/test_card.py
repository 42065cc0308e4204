"""The card of a checkpoint."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support.cards import run_snippets
from support.commands import SMALL, contents, run, succeeded
from support.folders import tensors_of

pytestmark = pytest.mark.slow

MODEL = "one layer"  # see support/shared.py


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
    (results,) = data["model-index"]  # what was measured here, not of the source
    assert results["name"] == "source-wina"


@pytest.mark.parametrize(
    ("metadata", "field", "value"),
    [
        ("license: mit\nlanguage: de\ntags: stories", "tags", {"stories", "wina", "activation-sparsity"}),
        ("license: mit\nlanguage: de\ntags: stories", "language", {"de"}),
        ("language:\n- 'no'\n- en", "language", {"no", "en"}),  # to YAML, an unquoted no is false
        ("language:\n- no\n- en", "language", {"en"}),
        ("tags:\n- {task: chat}\n- [a, b]\n- 7\n- null\n- stories", "tags", {"stories", "wina", "activation-sparsity"}),
        ("tags: {task: chat}", "tags", {"task", "wina", "activation-sparsity"}),
        ("license: [mit, other]\nlanguage: de", "language", {"de"}),
    ],
)
def test_a_single_value_or_a_word_that_yaml_misreads_is_carried(
    metadata: str, field: str, value: set[str], source: Path, tmp_path: Path
):
    found = with_card(source, tmp_path / "source", f"---\n{metadata}\n---\n").data.to_dict()[field]
    assert set([found] if isinstance(found, str) else found) == value


def test_a_card_and_the_terminal_say_that_the_text_holds_less_than_was_asked_for(source: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("The cat sat on the mat and looked at the rain. " * 60)
    options = ("--calibration", tmp_path / "short.txt", "--samples", 999, "--seq-len", 32, "--basis", "none")
    plan = json.loads(run(source, "--out", tmp_path / "out", *options, "--dry-run", "--json").stdout)
    result = run(source, "--out", tmp_path / "out", *options)
    succeeded(result)
    samples = json.loads((tmp_path / "out" / "wina_report.json").read_text())["calibration"]["samples"]
    assert 0 < samples < 100
    assert plan["calibration"] == {"text": "short.txt", "samples": samples, "asked": 999, "seq_len": 32}
    said = f"{samples} sequences of 32 tokens of short.txt, fewer than the 999 asked for"
    assert said in result.stdout
    assert said in run(source, "--out", tmp_path / "other", *options, "--dry-run").stdout
    assert "999 were asked for; the text is short." in (tmp_path / "out" / "README.md").read_text()


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
    assert "{" not in card.text.replace("{#", "")


def test_the_metadata_of_a_card_holds_what_was_measured(converted: Path):
    held_out = json.loads((converted / "wina_report.json").read_text())["verification"]["held_out"]
    perplexity, kl = ModelCard.load(converted / "README.md").data.eval_results
    assert (perplexity.task_type, perplexity.metric_type) == ("text-generation", "perplexity")
    assert perplexity.metric_value == round(held_out["perplexity"], 3)
    assert (
        f"at {held_out['sparsity']:.1%} sparsity (dense: {held_out['dense_perplexity']:.3f})" in perplexity.metric_name
    )
    assert perplexity.metric_args["achieved"] == round(held_out["achieved"], 4)
    assert (kl.metric_type, kl.metric_value) == ("kl_divergence", round(held_out["kl"], 4))
    assert perplexity.dataset_type == "bundled"


def test_the_metadata_of_a_card_is_what_was_written(converted: Path):
    text = (converted / "README.md").read_text()
    assert ModelCard(text).data.to_yaml() == text.split("---\n")[1].rstrip("\n")


def test_the_snippets_of_a_card_run_as_pasted_in_its_folder(converted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(converted)
    before = contents(converted)
    run_snippets(ModelCard.load("README.md").text)
    assert contents(converted) == before


def test_a_card_names_the_empty_tensor_and_what_to_install(converted: Path):
    (empty,) = (name for name, tensor in tensors_of(converted).items() if tensor.numel() == 0)
    text = (converted / "README.md").read_text()
    assert f"the empty tensor `{empty}` is there to stop them" in text
    assert "Install `wina-convert` for them" in text


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
