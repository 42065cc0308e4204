"""Mixtures of experts: every expert is gated as a projection of its own, on the tokens that it is given."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import wina_convert
from support.commands import run_wina
from support.experts import MIXTURES
from support.families import make_type
from support.folders import config_of, tensors_of
from support.interrupting import CLOCK, interrupted_in_layer
from support.reader import Reader
from support.reference import (
    any_expert,
    assert_dense_at_0,
    assert_each_product_follows_the_rule,
    assert_equals_reference,
    convert,
    logits,
    random_prompt,
)
from wina_convert.conversion import proof
from wina_convert.errors import CheckpointError, OptionError, SourceError
from wina_convert.verbs.export import export
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

QUICK = ("mixtral",)
PLAIN = ("mixtral", "qwen3_moe", "olmoe")  # SiLU, gate behind up, no biases: as the few lines of support.experts


def parameters(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixtral")
    dense = make_type("mixtral", folder / "dense", **MIXTURES["mixtral"])
    return dense, folder / "gated", convert(dense, folder / "gated")


@pytest.mark.parametrize("kind", parameters(MIXTURES))
def test_a_mixture_converts(kind: str, tmp_path: Path) -> None:
    dense, gated = make_type(kind, tmp_path / "dense", **MIXTURES[kind]), tmp_path / "gated"
    report = convert(dense, gated)
    assert report["verification"]["parity"] < 1e-5
    assert report["verification"]["held_out"]["achieved"] == pytest.approx(0.5, abs=0.03)
    gates = set(map(any_expert, report["projections"]))
    assert {name.partition(".experts.*.")[2] for name in gates if "experts.*" in name} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert not any(re.search(r"\.(gate|router|shared_expert_gate)$", name) for name in gates)
    assert_dense_at_0(dense, gated)
    assert_each_product_follows_the_rule(dense, gated, 0.5)
    verify_folder(gated)


@pytest.mark.parametrize("kind", parameters(PLAIN))
def test_a_mixture_equals_a_token_at_a_time(kind: str, tmp_path: Path) -> None:
    dense, gated = make_type(kind, tmp_path / "dense", **MIXTURES[kind]), tmp_path / "gated"
    convert(dense, gated)
    assert_equals_reference(dense, gated, 0.5)


def test_bytes_of_a_token_count_the_experts_that_it_is_given(mixtral: tuple[Path, Path, dict[str, Any]]) -> None:
    dense, gated, report = mixtral
    stored = load_file(dense / "model.safetensors")
    share = config_of(dense)["num_experts_per_tok"] / config_of(dense)["num_local_experts"]
    shares = {name: share if ".experts." in name else 1.0 for name in stored if "embed_tokens" not in name}
    assert report["bytes_per_token"]["dense"] == round(sum(part * stored[name].nbytes for name, part in shares.items()))
    cutoffs, skipped = 0.0, 0.0
    budget = config_of(gated)["quantization_config"]["shares"]
    grid = config_of(gated)["quantization_config"]["grid"]
    for name, shape in report["projections"].items():
        part = share if ".experts." in name else 1.0
        asked = budget[name.split(".", 3)[3]][grid.index(0.5)]
        cutoffs += part * 4 * shape["in_features"]
        skipped += part * 4 * shape["in_features"] * shape["out_features"] * asked
    assert report["bytes_per_token"]["gated"] == pytest.approx(
        report["bytes_per_token"]["dense"] + cutoffs - skipped, abs=200
    )
    layers = inspect_checkpoint(gated).layers
    gated_dense = report["bytes_per_token"]["dense"] - sum(
        part * stored[name].nbytes
        for name, part in shares.items()
        if name.endswith("norm.weight") or name == "lm_head.weight" or name.endswith("block_sparse_moe.gate.weight")
    )
    assert sum(layer.bytes_per_token for layer in layers) == pytest.approx(gated_dense + cutoffs - skipped, abs=200)


def test_what_is_asked_is_half_of_what_a_token_meets(mixtral: tuple[Path, Path, dict[str, Any]]) -> None:
    dense, gated, report = mixtral
    share = config_of(dense)["num_experts_per_tok"] / config_of(dense)["num_local_experts"]
    budget = config_of(gated)["quantization_config"]["shares"]
    grid = config_of(gated)["quantization_config"]["grid"]
    met = {
        name: (share if ".experts." in name else 1.0) * shape["in_features"] * shape["out_features"]
        for name, shape in report["projections"].items()
    }
    asked = sum(met[name] * budget[name.split(".", 3)[3]][grid.index(0.5)] for name in met) / sum(met.values())
    assert asked == pytest.approx(0.5, abs=1e-4)


def test_experts_lie_in_the_checkpoint_one_by_one(mixtral: tuple[Path, Path, dict[str, Any]]) -> None:
    dense, gated, _ = mixtral
    stored, made = load_file(dense / "model.safetensors"), tensors_of(gated)
    for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        weight = stored[f"model.layers.1.block_sparse_moe.experts.3.{theirs}.weight"]
        assert torch.equal(made[f"model.layers.1.mlp.experts.3.{ours}.weight_t"], weight.t())
    router = stored["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(made["model.layers.1.mlp.gate.weight"], router)
    assert not any("block_sparse_moe" in name for name in made)


def test_a_reader_of_the_specification_computes_an_expert(mixtral: tuple[Path, Path, dict[str, Any]]) -> None:
    _, gated, _ = mixtral
    reader, model = Reader(gated), wina_convert.load(str(gated))
    for part in ("gate_proj", "up_proj", "down_proj"):
        module = model.get_submodule(name := f"model.layers.1.mlp.experts.2.{part}")
        x = torch.randn(3, module.in_features)
        expected, kept = reader.product(name, x.numpy())
        assert 0 < kept.mean() < 1
        torch.testing.assert_close(module(x), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_a_saved_mixture_loads_again(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, gated, _ = mixtral
    model = wina_convert.load(str(gated))
    model.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(gated).keys()
    assert torch.equal(
        logits(wina_convert.load(str(tmp_path / "again")), random_prompt(3)), logits(model, random_prompt(3))
    )


def test_a_dense_prefill_gates_decoding_alone(mixtral: tuple[Path, Path, dict[str, Any]]) -> None:
    _, gated, _ = mixtral
    prompt = random_prompt(4).view(2, -1)  # two sequences: a call that decodes both brings an expert several tokens
    model, plain = wina_convert.load(str(gated), prefill="dense"), wina_convert.load(str(gated), sparsity=0.0)
    always = wina_convert.load(str(gated))
    torch.testing.assert_close(logits(model, prompt), logits(plain, prompt), rtol=0, atol=1e-5)
    with torch.no_grad():
        caches = [plain(prompt, use_cache=True).past_key_values for _ in range(2)]
        found = model(prompt[:, :1], past_key_values=caches[0]).logits
        expected = always(prompt[:, :1], past_key_values=caches[1]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(
        found, plain(prompt[:, :1], past_key_values=plain(prompt).past_key_values).logits, atol=1e-3
    )


def test_experts_that_are_given_too_little_share_thresholds(
    mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    dense, gated, report = mixtral
    own, shared = report["experts"], convert(dense, tmp_path / "gated", samples=1, seq_len=32)["experts"]  # 32 tokens
    every = sorted(f"model.layers.{layer}.mlp.experts.{number}" for layer in (0, 1) for number in range(4))
    assert shared == {"gated": 8, "fewest_tokens": 64, "pooled": every}
    assert "8 of 8 experts were given\nfewer than 64 tokens" in (tmp_path / "gated" / "README.md").read_text()
    curves = {name: tensors_of(tmp_path / "gated")[f"{name}.up_proj.thresholds"] for name in every}
    for name, curve in curves.items():
        alike = [other for other in every if torch.equal(curves[other], curve)]
        assert alike == [other for other in every if other[:15] == name[:15]]  # those of its layer
    assert own["pooled"] == []
    assert "experts were given" not in (gated / "README.md").read_text()
    curves = {name: tensors_of(gated)[f"{name}.up_proj.thresholds"] for name in every}
    assert not any(torch.equal(curves[name], curves[other]) for name in every for other in every if name != other)


def test_a_resumed_conversion_knows_which_experts_were_given_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_type("olmoe", tmp_path / "dense", **MIXTURES["olmoe"])
    options: dict[str, Any] = {"samples": 2, "seq_len": 32, "basis": "none"}
    expected = wina_convert.convert(str(dense), tmp_path / "whole", **options)["experts"]
    monkeypatch.setattr(CLOCK, SimpleNamespace(monotonic=lambda: 0.0))  # a snapshot after every layer
    interrupted_in_layer(2, dense, tmp_path / "gated", **options)
    assert wina_convert.convert(str(dense), tmp_path / "gated", resume=True, **options)["experts"] == expected
    assert any(name.startswith("model.layers.0.") for name in expected["pooled"])


def test_retarget_counts_the_same_bytes(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    dense, _, report = mixtral
    convert(dense, tmp_path / "gated", sparsity=0.25)
    retarget(tmp_path / "gated", 0.5)
    again = json.loads((tmp_path / "gated" / "wina_report.json").read_text())
    assert again["bytes_per_token"] == report["bytes_per_token"]


def test_experts_may_stay_dense(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    dense, _, _ = mixtral
    report = convert(dense, tmp_path / "gated", targets=("attention",))
    assert not any("experts" in name for name in report["projections"])
    assert "experts" not in report
    assert_dense_at_0(dense, tmp_path / "gated")
    model = wina_convert.load(str(tmp_path / "gated"))
    model.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "gated").keys()


def test_experts_that_stay_dense_are_held_against_the_source_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SLICE", 1 << 10)
    dense = make_type("granitemoe", tmp_path / "dense", **MIXTURES["granitemoe"])  # cut out of tensors of all experts
    report = convert(dense, tmp_path / "gated", targets=("attention",), dtype="bfloat16")
    assert report["verification"]["tensors"] == len(tensors_of(dense)) + 2 * 3 * 4 - 2 * 2
    assert tensors_of(tmp_path / "gated")["model.layers.0.block_sparse_moe.experts.3.down_proj.weight"].shape == (
        64,
        96,
    )


def test_a_plan_tells_the_experts(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    dense, gated, _ = mixtral
    done = run_wina(
        "convert", str(dense), "--out", str(tmp_path / "x"), "--dry-run", "--basis", "none", "--samples", "8"
    )
    assert re.search(r"up_proj of 4 experts +64 +96 +2\n", done.stdout)
    shown = run_wina("inspect", str(gated)).stdout
    assert re.search(r"layer .*gate_proj +up_proj +down_proj\n", shown)
    assert shown.count(" to ") == 6
    text = tmp_path / "text.txt"
    text.write_text("A token is given to two of four experts. " * 200)
    shown = run_wina("eval", str(gated), "--text", str(text), "--samples", "2").stdout
    assert re.search(r"layer +q_proj +k_proj +v_proj +o_proj +gate_proj +up_proj +down_proj\n", shown)


def test_a_search_over_every_expert_is_refused(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    dense, _, _ = mixtral
    with pytest.raises(OptionError, match=r"every matrix of dense by itself, and it has 32.*--ignore '\*.experts.\*'"):
        convert(dense, tmp_path / "gated", allocation="greedy")


def test_tuning_leaves_experts_as_they_are_and_says_so(
    mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    dense, _, _ = mixtral
    plan = convert(dense, tmp_path / "gated", tune=True, dry_run=True)
    assert plan["tuning"] == {"kept": False, "reason": "thresholds of experts are not learned yet"}


def test_experts_of_an_unknown_form_are_refused(tmp_path: Path) -> None:
    dense = make_type("jetmoe", tmp_path / "dense")
    with pytest.raises(SourceError, match="keeps its experts in a form that is not known"):
        convert(dense, tmp_path / "gated", dry_run=True)


def test_a_mixture_becomes_the_dense_model_again(mixtral: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    dense, gated, _ = mixtral
    model = wina_convert.load(str(gated)).dequantize()
    expected = AutoModelForCausalLM.from_pretrained(dense)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, random_prompt(0)), logits(expected, random_prompt(0)))
    with pytest.raises(CheckpointError, match="dequantize"):
        export(gated, tmp_path / "exported")
    with pytest.raises(CheckpointError, match="convert it with wina-convert"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=wina_convert.WinaConfig(sparsity=0.5, calibration="bundled")
        )
