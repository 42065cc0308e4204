"""Conversions that tune: what they store and say, that they are kept only where they help, and that they are resumed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import wina_convert
from support import TINY
from support.commands import refused, run, succeeded
from support.edits import edit_tensor
from support.families import make_model
from support.folders import config_of, files_of, tensors_of
from support.interrupting import HIDDEN, interrupt_in_layer
from wina_convert.cli.text import plan_text, report_text
from wina_convert.conversion import tuning
from wina_convert.conversion.weights import steps_of
from wina_convert.errors import VerificationError
from wina_convert.fitting import tune as learning
from wina_convert.fitting.schemes import SCHEMES
from wina_convert.fitting.tune import LEVELS
from wina_convert.format.grid import GRID
from wina_convert.format.manifest import write_manifest
from wina_convert.models.structure import Projection
from wina_convert.progress import lines
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 64, "basis": "none", "allocation": "types", "tune": True}
QUICK = {"STEPS": 4, "LOOK": 2, "LEVEL_TOKENS": 64}
BETTER = {"STEPS": 20, "LOOK": 10, "LEVEL_TOKENS": 192}  # enough to be kept


def patch(patched: pytest.MonkeyPatch, values: dict[str, int]) -> None:
    for name, value in values.items():
        patched.setattr(learning, name, value)
    for name, value in {"FITTED": 512, "JUDGED": 256, "TOKENS": 1 << 13}.items():
        patched.setattr(tuning, name, value)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, QUICK)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The trained model, tuned, and its report. Shared: copy it to change it."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patch(patched, BETTER)
        report = wina_convert.convert(str(TINY), out, **FAST)
    return out, report


def test_what_was_learned_is_stored(tuned: tuple[Path, dict[str, Any]]):
    out, report = tuned
    assert report["tuning"]["kept"]
    block, tensors = config_of(out)["quantization_config"], tensors_of(out)
    assert (block["scheme"], block["allocation"], block["biases"]) == ("learned", "learned", True)
    assert list(block["shares"]) == block["modules"]
    learned = 0
    for name in block["modules"]:
        norms, biases = tensors[f"{name}.weight_t"].norm(dim=1), tensors[f"{name}.biases"]
        assert biases.shape == (len(block["grid"]), tensors[f"{name}.weight_t"].shape[1])
        assert not biases[0].any()
        assert biases[1:].any()
        learned += not torch.allclose(tensors[f"{name}.column_norms"], norms, rtol=1e-4)
    assert learned == len(block["modules"])
    assert report["disk_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert verify_folder(out).files > 4


def test_the_sparsity_that_was_asked_is_achieved(tuned: tuple[Path, dict[str, Any]]):
    held_out = tuned[1]["verification"]["held_out"]
    assert held_out["achieved"] == pytest.approx(0.5, abs=0.02)
    assert tuned[1]["verification"]["parity"] < 1e-5  # and at 0 it is the dense model


def test_it_says_what_it_came_to(tuned: tuple[Path, dict[str, Any]]):
    out, report = tuned
    said = report["tuning"]
    assert (said["levels"], said["steps"]) == (list(LEVELS), BETTER["STEPS"])
    assert all(after <= before for before, after in zip(said["kl_before"], said["kl_after"], strict=True))
    assert said["kl_after"][2] < 0.95 * said["kl_before"][2]
    assert f"{said['kl_before'][2]:.3g} -> {said['kl_after'][2]:.3g} at 50%" in report_text(report, "out", 1.0)
    card = (out / "README.md").read_text()
    assert "biases by sparsity and column weights were learned" in card
    assert "--tune --targets all`" in card
    assert json.loads((out / "wina_report.json").read_text()) == report
    found = inspect_checkpoint(out)
    assert (found.scheme, found.allocation, found.biases) == ("learned", "learned", True)
    shares, names = config_of(out)["quantization_config"]["shares"], list(report["projections"])
    same = [shares[name][10] for name in names if name.endswith("up_proj")]
    assert found.asked["mlp.up_proj"] == pytest.approx(sum(same) / len(same))


def test_the_loaded_model_adds_the_biases_and_changes_its_sparsity(tuned: tuple[Path, dict[str, Any]]):
    out, _ = tuned
    model, dense = wina_convert.load(str(out)), wina_convert.load(str(out), sparsity=0.0)
    tokens = torch.arange(2, 34)[None]
    stored = tensors_of(out)
    for name, gate in gated_modules(model).items():
        torch.testing.assert_close(gate.shifted, stored[f"{name}.biases"][10], rtol=1e-6, atol=0)
    with torch.no_grad():
        gated, expected = model(tokens).logits, dense(tokens).logits
        assert not torch.allclose(gated, expected, atol=0.1)
        wina_convert.set_sparsity(model, 0.0)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    ("leaf", "edit", "said"),
    [
        ("column_norms", lambda norms: norms.index_fill(0, torch.tensor([3]), 0.0), "are not those of its weights"),
        (
            "column_norms",
            lambda norms: norms.index_fill(0, torch.tensor([3]), torch.inf),
            "are not those of its weights",
        ),
        ("biases", lambda biases: biases + 1, "not finite and 0 at sparsity 0"),
        ("thresholds", lambda thresholds: 2 * thresholds, "is not that of wina_report.json"),
    ],
)
def test_verify_finds_what_cannot_have_been_learned(
    leaf: str, edit: Any, said: str, tuned: tuple[Path, dict[str, Any]], tmp_path: Path
):
    out = shutil.copytree(tuned[0], tmp_path / "out")
    edit_tensor(f"model.layers.1.mlp.up_proj.{leaf}", edit)(out)
    write_manifest(out)
    with pytest.raises(VerificationError, match=said):
        verify_folder(out)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_does_not_help_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning, "RATES", (5.0, 50.0, 5.0))
    said: list[str] = []
    report = wina_convert.convert(str(TINY), tmp_path / "tuned", **FAST, progress=lines(said.append))
    assert not report["tuning"]["kept"]
    assert report["tuning"]["kl_before"] == report["tuning"]["kl_after"]
    assert "untuned: nothing that was learned was as good as untuned at every level" in report_text(report, "out", 1.0)
    assert "was asked for and not kept" in (tmp_path / "tuned" / "README.md").read_text()
    block = config_of(tmp_path / "tuned")["quantization_config"]
    assert (block["scheme"], block["allocation"], "biases" in block) == ("wina", "types", False)
    assert any("of 4 steps, loss " in line and line.endswith(" left") for line in said)
    verify_folder(tmp_path / "tuned")


@pytest.mark.parametrize(("free", "how"), [(None, "takes"), ("checkpointing", "computed again"), ("none", "untuned")])
def test_a_model_that_does_not_fit_is_checkpointed_or_left_untuned(
    free: str | None, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learning, "LEVEL_TOKENS", 1024)
    source = make_model("llama", tmp_path / "source", num_hidden_layers=6)
    options = FAST | {"dry_run": True}
    needed = wina_convert.convert(str(source), tmp_path / "out", **options)["tuning"]["memory_bytes"]
    if free is not None:
        room = {"checkpointing": needed, "none": needed / 100}[free]
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": room}))
    plan = wina_convert.convert(str(source), tmp_path / "out", **options)
    assert how in plan_text(plan, "out")
    if free == "none":
        report = wina_convert.convert(str(source), tmp_path / "out", **FAST)
        assert report["tuning"]["reason"].startswith("learning takes ")
        assert "biases" not in config_of(tmp_path / "out")["quantization_config"]
    elif free:
        assert plan["tuning"]["memory_bytes"] < needed


def test_checkpointing_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_model("llama", tmp_path / "source")
    found = []
    for name, checkpointed in {"plain": False, "sparing": True}.items():
        planned = tuning.TuningPlan(1, checkpointed, "", 0, 0, 1.0)
        monkeypatch.setattr("wina_convert.conversion.tuning.plan_tuning", lambda *_, made=planned: made)
        found.append(wina_convert.convert(str(source), tmp_path / name, **FAST)["tuning"])
    torch.testing.assert_close(*(torch.tensor(said["kl_after"]) for said in found), rtol=1e-4, atol=1e-6)


def test_too_little_text_leaves_it_untuned(tmp_path: Path):
    source, text = make_model("llama", tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had three sons. " * 60)
    report = wina_convert.convert(str(source), tmp_path / "out", **FAST | {"samples": 8, "calibration": str(text)})
    assert "of 8 needed" in report["tuning"]["reason"]
    assert "kl_after" not in report["tuning"]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen2", "gemma2"])
def test_families_are_tuned(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    report = wina_convert.convert(str(source), tmp_path / "out", **FAST | {"basis": "pca", "dtype": "bfloat16"})
    said = report["tuning"]
    assert all(after <= before for before, after in zip(said["kl_before"], said["kl_after"], strict=True))
    verify_folder(tmp_path / "out")


# --- interrupted ---


def resume(source: Path, out: Path, interrupt: Callable[[pytest.MonkeyPatch], object], **options: Any) -> int:
    """A conversion that is interrupted and continued; how many steps of learning were made when it was."""
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched)
        with pytest.raises(KeyboardInterrupt):
            wina_convert.convert(str(source), out, **FAST | options)
    assert (out.parent / HIDDEN).exists()
    with pytest.MonkeyPatch.context() as patched:
        steps = stop_at_step(patched, 100)
        wina_convert.convert(str(source), out, **FAST | options, resume=True)
    return len(steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tuned conversion that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patch(patched, QUICK)
        assert wina_convert.convert(str(TINY), out, **FAST)["tuning"]["kept"]
    return files_of(out)


@pytest.mark.parametrize("number", [3, 4])
def test_learning_is_resumed_to_the_same_bytes(number: int, whole: dict[str, bytes], tmp_path: Path):
    assert resume(TINY, tmp_path / "out", lambda patched: stop_at_step(patched, number)) == 2
    assert files_of(tmp_path / "out") == whole


def test_what_was_learned_is_resumed_to_the_same_bytes(whole: dict[str, bytes], tmp_path: Path):
    assert resume(TINY, tmp_path / "out", lambda patched: interrupt_in_layer(patched, 3)) == 0
    assert files_of(tmp_path / "out") == whole


def test_learning_in_another_basis_is_resumed_to_the_same_bytes(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    wina_convert.convert(str(source), tmp_path / "whole" / "out", **FAST | {"basis": "pca"})
    assert resume(source, tmp_path / "out", lambda patched: stop_at_step(patched, 3), basis="pca") == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole" / "out")


def stop_at_step(patched: pytest.MonkeyPatch, number: int) -> list[int]:
    """Interrupt the n-th step of learning; a list that grows by an entry for each."""
    steps: list[int] = []
    learn = learning._Learner.learn

    def counted(self: Any, batches: Any) -> float:
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        return learn(self, batches)

    patched.setattr(learning._Learner, "learn", counted)
    return steps


def test_tuning_is_part_of_what_a_resume_compares(tmp_path: Path):
    with pytest.MonkeyPatch.context() as patched:
        stop_at_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            wina_convert.convert(str(TINY), tmp_path / "out", **FAST)
    small = ("--samples", "8", "--seq-len", "64", "--basis", "none", "--allocation", "types", "--quiet")
    refused(run(TINY, "--out", tmp_path / "out", *small, "--resume"), "options.tune was True and is False")


def test_the_command_tunes(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    result = run(source, "--out", tmp_path / "out", "--samples", "8", "--seq-len", "32", "--basis", "none", "--tune")
    succeeded(result)
    assert "  tuning        " in result.stdout


def test_what_becomes_of_a_weight_is_on_its_device():
    one = Projection("up_proj", "up_proj", 0, 4, 3, False, False, torch.float32)
    (gate,) = steps_of([one], SCHEMES["wina"], None, {"up_proj": torch.zeros(len(GRID), 3)})
    made = gate.make("up_proj.weight", torch.empty(3, 4, device="meta"))
    assert set(made) == {"up_proj.weight_t", "up_proj.column_norms", "up_proj.biases"}
    assert all(tensor.is_meta for tensor in made.values())
