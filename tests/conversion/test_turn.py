"""Conversions into another basis: exact, measured, resumable, and said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import wina_convert
from support.bases import random_basis, turn_of
from support.breaking import failing
from support.commands import SMALL, refused, run, run_wina, succeeded
from support.families import make_model
from support.folders import config_of, files_of, tensors_of
from support.interrupting import interrupted_in_layer
from support.reference import assert_dense_at_0
from wina_convert.conversion import turn, turn_proof
from wina_convert.conversion.turn import carried_basis
from wina_convert.fitting import fit_basis
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 32}
BASES = {
    "llama": "turned",
    "llama-tied": "turned",
    "qwen2": "turned",
    "phi3": "turned",
    "gemma2": "as it was",
    "gpt2": "as it was",
}


@pytest.fixture(autouse=True)
def fewest_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit_basis, "STEPS", fit_basis.FEWEST_STEPS)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "wina_report.json").read_text())
    return report


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("basis", ["pca", "fitted"])
def test_at_sparsity_0_the_turned_checkpoint_is_the_source(family: str, basis: str, tmp_path: Path):
    dense = make_model(family, tmp_path / "dense")
    wina_convert.convert(str(dense), tmp_path / "gated", basis=basis, **FAST)
    assert_dense_at_0(dense, tmp_path / "gated")
    said = report_of(tmp_path / "gated")["basis"]
    assert said["stream"].startswith(BASES[family])
    assert said["values"] == "balanced"
    assert said["logits_differ"] <= 1e-5
    assert config_of(tmp_path / "gated")["quantization_config"]["basis"] == {
        name: said[name] for name in said if name != "logits_differ"
    }
    assert said["kind"] == (basis if said["stream"] == "turned" else "values")
    verify_folder(tmp_path / "gated")


def test_the_weights_of_a_turned_checkpoint_are_others_and_its_norms_have_no_gain(tmp_path: Path):
    dense = make_model("llama-tied", tmp_path / "dense")
    wina_convert.convert(str(dense), tmp_path / "gated", basis="pca", **FAST)
    before, after = tensors_of(dense), tensors_of(tmp_path / "gated")
    assert json.loads((tmp_path / "gated" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in after
    assert "lm_head.weight" not in before
    norms = [name for name in after if name.endswith("norm.weight") and "self_attn" not in name]
    assert norms
    assert all((after[name] == 1).all() for name in norms)
    q = before["model.embed_tokens.weight"].double().pinverse() @ after["model.embed_tokens.weight"].double()
    torch.testing.assert_close(q @ q.t(), torch.eye(len(q), dtype=torch.float64), atol=1e-4, rtol=0)
    assert not torch.allclose(q, torch.eye(len(q), dtype=torch.float64), atol=0.1)


def test_in_half_precision_a_turned_model_rounds_once(tmp_path: Path):
    dense = make_model("llama", tmp_path / "dense", torch.bfloat16)
    wina_convert.convert(str(dense), tmp_path / "gated", basis="pca", **FAST)
    tokens = torch.randint(2, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
        found = wina_convert.load(str(tmp_path / "gated"), sparsity=0.0, dtype=torch.float32)(tokens).logits
    assert ((expected - found).abs().max() / expected.abs().max()) < 0.02


def test_the_basis_keeps_more_of_the_model_at_the_same_sparsity(tiny: Path, tmp_path: Path):
    rises = {}
    for basis in ("none", "pca", "fitted"):
        report = wina_convert.convert(str(tiny), tmp_path / basis, basis=basis, samples=16, seq_len=64)
        rises[basis] = report["verification"]["held_out"]["kl"]
    assert rises["pca"] < 0.75 * rises["none"]
    assert rises["fitted"] < rises["pca"]


def test_auto_is_fitted_on_a_small_model_and_a_dry_run_says_so_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = make_model("llama", tmp_path / "dense")
    monkeypatch.setattr("wina_convert.format.folder.read_tensors", failing(AssertionError("read")))
    plan = wina_convert.convert(str(dense), tmp_path / "gated", dry_run=True)
    assert plan["basis"]["kind"] == "fitted"
    shown = succeeded_text(run(dense, "--out", tmp_path / "gated", "--dry-run"))
    assert "basis" in shown
    assert "fitted" in shown
    values = succeeded_text(run(make_model("gpt2", tmp_path / "gpt2"), "--out", tmp_path / "gated", "--dry-run"))
    assert "LayerNorm" in values
    assert "none" in succeeded_text(run(dense, "--out", tmp_path / "gated", "--dry-run", "--basis", "none"))


def succeeded_text(result: Any) -> str:
    succeeded(result)
    return str(result.stdout)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_disk_of_a_snapshot_is_counted_with_its_basis(family: str, tmp_path: Path):
    turn = turn_of(make_model(family, tmp_path / "dense"))
    basis = carried_basis(random_basis(turn))
    assert sum(tensor.nbytes for tensor in basis.values()) == turn.basis_bytes > 0


def test_a_basis_that_is_none_of_them_is_refused(tmp_path: Path):
    dense = make_model("llama", tmp_path / "dense")
    refused(run(dense, "--out", tmp_path / "gated", "--basis", "best"), "'best'", "none, pca, fitted, auto")
    assert not (tmp_path / "gated").exists()


def test_a_turned_model_that_differs_stops_the_conversion_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = make_model("llama", tmp_path / "dense")
    monkeypatch.setattr(turn_proof, "TOLERANCE", 0.0)
    refused(
        run(dense, "--out", tmp_path / "gated", *SMALL[:4], "--basis", "pca", "--quiet"), "new basis", "--basis none"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_resumed_conversion_has_the_same_basis_without_finding_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = make_model("llama", tmp_path / "dense", num_hidden_layers=3)
    wina_convert.convert(str(dense), tmp_path / "whole", basis="fitted", **FAST)
    interrupted_in_layer(2, dense, tmp_path / "out", basis="fitted", **FAST)
    monkeypatch.setattr(turn, "find_basis", failing(AssertionError("found again")))
    wina_convert.convert(str(dense), tmp_path / "out", basis="fitted", resume=True, **FAST)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_inspect_and_the_card_say_what_was_done(tmp_path: Path):
    dense = make_model("llama", tmp_path / "dense")
    wina_convert.convert(str(dense), tmp_path / "gated", basis="pca", **FAST)
    shown = run_wina("inspect", tmp_path / "gated")
    succeeded(shown)
    assert "basis pca" in shown.stdout
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "--basis pca" in card
    assert "unchanged" not in card
