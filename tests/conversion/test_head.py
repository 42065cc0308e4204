"""The output head gated like any projection: what is stored, what it computes, and what every verb makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from support.commands import SMALL, refused, run, run_wina, succeeded
from support.edits import edit_block
from support.families import make_model
from support.folders import config_of, files_of, tensors_of, threshold_of
from support.interrupting import CALIBRATE, count_layers, interrupt_in_layer
from support.loaded import equal, greedy, logits
from wina_convert import WinaConfig, convert, load
from wina_convert.conversion import tuning
from wina_convert.errors import CheckpointError, OptionError
from wina_convert.fitting import tune as learning
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.export import export
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "basis": "none"}
TIED = {"llama-tied": True, "gemma2": True, "gpt2": True, "gpt_neox": False, "mistral": False}


@pytest.fixture(scope="module", params=TIED)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, its source and that with the head and the feed-forward blocks gated. Shared: copy them to change them."""
    folder = tmp_path_factory.mktemp("head")
    source = make_model(request.param, folder / "source")
    convert(str(source), folder / "out", targets=["head", "mlp"], **FAST)
    return request.param, source, folder / "out"


def test_the_head_is_the_last_gated_projection_and_its_own_tensor(made: tuple[str, Path, Path]):
    family, source, out = made
    config, tensors = config_of(out), tensors_of(out)
    report = json.loads((out / "wina_report.json").read_text())
    names = config["quantization_config"]["modules"]
    assert names[-1] == "lm_head"
    assert all(".layers." in name or ".h." in name for name in names[:-1])
    dense = AutoModelForCausalLM.from_pretrained(source)
    weight = dense.lm_head.weight.detach()
    assert torch.equal(tensors["lm_head.weight_t"], weight.t())
    torch.testing.assert_close(tensors["lm_head.column_norms"], weight.norm(dim=0))
    embedding = dense.get_input_embeddings().weight
    assert any(tensor.shape == embedding.shape and torch.equal(tensor, embedding) for tensor in tensors.values())
    assert report["head"] == {"copied_bytes": weight.nbytes if TIED[family] else 0}
    assert report["disk_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    if TIED[family]:
        assert config["tie_word_embeddings"] is False


def test_it_computes_by_its_threshold_and_without_sparsity_as_the_dense_model(made: tuple[str, Path, Path]):
    _, source, out = made
    model = load(str(out), sparsity=0.0)
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))
    tensors, seen = tensors_of(out), []
    gate = gated_modules(model)["lm_head"]
    gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for sparsity in (0.3, 0.5, 0.8):
        gate.set_sparsity(sparsity)
        logits(model)
        x, y = seen[-1]
        score = x.double().abs() * tensors["lm_head.column_norms"].double()
        keep = score > threshold_of(out, tensors["lm_head.thresholds"], sparsity)
        torch.testing.assert_close(
            y.double(), (x.double() * keep) @ tensors["lm_head.weight_t"].double(), rtol=0, atol=1e-4
        )
        assert 0.05 < 1 - keep.double().mean() < 1


def test_every_verb_knows_it(made: tuple[str, Path, Path], tmp_path: Path):
    family, source, out = made
    verify_folder(out)
    head = inspect_checkpoint(out).layers[-1]
    weight_t = tensors_of(out)["lm_head.weight_t"]
    assert head.layer is None
    assert head.nbytes == weight_t.nbytes
    assert abs(head.achieved - 0.5) < 0.05
    assert 0.4 < head.bytes_per_token / head.nbytes < 0.6
    shown = run_wina("inspect", out)
    succeeded(shown)
    assert any(line.startswith("head ") for line in shown.stdout.splitlines())
    done = export(out, tmp_path / "dense")
    assert ("a tensor of its own" in done.said) == TIED[family]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(exported), logits(AutoModelForCausalLM.from_pretrained(source)))
    moved = Path(shutil.copytree(out, tmp_path / "moved"))
    before = json.loads((out / "wina_report.json").read_text())["bytes_per_token"]
    retarget(moved, 0.8)
    verify_folder(moved)
    after = json.loads((moved / "wina_report.json").read_text())["bytes_per_token"]
    assert after["dense"] == before["dense"]
    assert before["gated"] - after["gated"] > 0.25 * weight_t.nbytes


def test_saved_again_made_plain_and_without_its_head_it_is_the_same_model(made: tuple[str, Path, Path], tmp_path: Path):
    _, source, out = made
    model = load(str(out))
    model.save_pretrained(tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(out))
    again = load(str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(greedy(again), greedy(model))
    base = AutoModel.from_pretrained(out)
    assert "lm_head" not in gated_modules(base)
    hidden = base(torch.tensor([[3, 4, 5]])).last_hidden_state
    assert torch.equal(hidden, model.base_model(torch.tensor([[3, 4, 5]])).last_hidden_state)
    model.dequantize()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))


@pytest.mark.parametrize("options", [{}, {"basis": "pca"}, {"allocation": "greedy"}], ids=["none", "pca", "greedy"])
def test_alone_it_skips_what_was_asked_and_gated_in_memory_it_is_the_converted_one(
    options: dict[str, Any], tmp_path: Path
):
    source = make_model("llama-tied", tmp_path / "source")
    report = convert(str(source), tmp_path / "out", **FAST | options, targets=["head"], sparsity=0.6)
    assert list(report["projections"]) == ["lm_head"]
    assert abs(report["verification"]["held_out"]["achieved"] - 0.6) < 0.03
    verify_folder(tmp_path / "out")
    if "basis" in options:
        return
    fields = {name: value for name, value in {**FAST, **options}.items() if name != "basis"}
    asked = WinaConfig(calibration="bundled", sparsity=0.6, conversion={**fields, "targets": ("head",)})
    model, converted = (
        AutoModelForCausalLM.from_pretrained(source, quantization_config=asked),
        load(str(tmp_path / "out")),
    )
    assert torch.equal(logits(model), logits(converted))
    model.save_pretrained(tmp_path / "saved")
    assert equal(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out"))
    taken = AutoModelForCausalLM.from_pretrained(source, quantization_config=WinaConfig(thresholds=tmp_path / "out"))
    assert torch.equal(logits(taken), logits(converted))


def test_its_threshold_is_the_quantile_of_what_the_gated_layers_before_it_give(tmp_path: Path):
    source = make_model("mistral", tmp_path / "source")
    convert(str(source), tmp_path / "out", **FAST, targets=["all", "head"], allocation="uniform", sparsity=0.5)
    model, scores = load(str(tmp_path / "out")), []
    gate = gated_modules(model)["lm_head"]

    def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
        scores.append((inputs[0].abs() * gate.column_norms).flatten())

    gate.register_forward_pre_hook(see)
    logits(model, torch.randint(3, 2000, (32, 32)))
    threshold = gate.thresholds[list(gate.grid).index(0.5)]
    assert abs((torch.cat(scores) <= threshold).double().mean() - 0.5) < 0.05


@pytest.mark.parametrize("layer", [2, 3], ids=["before the head", "in the head"])
def test_an_interrupted_conversion_goes_on(
    layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshots: None
):
    source = make_model("llama-tied", tmp_path / "source")
    options = (*SMALL, "--quiet", "--targets", "all,head")
    succeeded(run(source, "--out", tmp_path / "whole", *options))
    with monkeypatch.context() as patched:
        interrupt_in_layer(patched, layer)
        assert run(source, "--out", tmp_path / "out", *options).exit_code == 130
    calls = count_layers(monkeypatch)
    succeeded(run(source, "--out", tmp_path / "out", "--resume", *options))
    assert len(calls) == 4 - layer, CALIBRATE
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_it_is_tuned_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"STEPS": 10, "LOOK": 5, "LEVEL_TOKENS": 128}.items():
        monkeypatch.setattr(learning, name, value)
    for name, value in {"FITTED": 512, "JUDGED": 256, "TOKENS": 1 << 13}.items():
        monkeypatch.setattr(tuning, name, value)
    source = make_model("llama-tied", tmp_path / "source", num_hidden_layers=1)
    report = convert(str(source), tmp_path / "out", **FAST | {"seq_len": 64}, targets=["mlp", "head"], tune=True)
    assert report["tuning"]["kept"], report["tuning"]
    block = config_of(tmp_path / "out")["quantization_config"]
    assert block["shares"]["lm_head"][10] > 0.1
    assert tensors_of(tmp_path / "out")["lm_head.biases"][1:].any()
    verify_folder(tmp_path / "out")


def test_a_dry_run_tells_that_a_tied_head_is_copied(tmp_path: Path):
    source = make_model("llama-tied", tmp_path / "source")
    shown = run(source, "--out", tmp_path / "out", "--targets", "head", "--dry-run", "--basis", "none")
    succeeded(shown)
    assert "it was tied to the embedding and is stored by itself: 393.22 kB more" in shown.stdout
    assert "lm_head" in shown.stdout
    plain = convert(str(source), tmp_path / "out", dry_run=True, basis="none")
    gated = convert(str(source), tmp_path / "out", dry_run=True, basis="none", targets=["all", "head"])
    assert "head" not in plain
    assert gated["bytes_per_token"]["dense"] == plain["bytes_per_token"]["dense"]
    saved = plain["bytes_per_token"]["gated"] - gated["bytes_per_token"]["gated"]
    assert abs(saved / 393216 - 0.5) < 0.05


def test_what_is_no_head_is_refused(made: tuple[str, Path, Path], tmp_path: Path):
    _, source, out = made
    with pytest.raises(OptionError, match="'lm_head' matches no projection"):
        convert(str(source), tmp_path / "new", targets=["mlp", "lm_head"], **FAST)
    with pytest.raises(OptionError, match="nothing is left to gate"):
        convert(str(source), tmp_path / "new", targets=["head"], ignore=["lm_head"], **FAST)
    names = config_of(out)["quantization_config"]["modules"]
    for number, wrong in enumerate(([names[-1], *names[:-1]], [*names, "score"])):
        copy = Path(shutil.copytree(out, tmp_path / str(number)))
        edit_block(modules=wrong)(copy)
        with pytest.raises(CheckpointError):
            load(str(copy))
        refused(run_wina("inspect", copy), "config.json")
