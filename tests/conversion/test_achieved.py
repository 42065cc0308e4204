"""The sparsity asked is the sparsity got, and the report says so."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina_convert
from support.families import make_model
from support.folders import config_of, tensors_of, threshold_of
from wina_convert.errors import CalibrationError
from wina_convert.models import documents, text
from wina_convert.models.source import open_source

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 4, "seq_len": 32, "batch_size": 8, "basis": "none"}
MORE: dict[str, Any] = {"samples": 16, "seq_len": 64, "batch_size": 8, "basis": "none", "allocation": "uniform"}


def skipped_fractions(folder: Path, tokens: Tensor, sparsity: float) -> tuple[float, dict[str, float]]:
    """Count, on a loaded checkpoint, the scores that are at most the threshold: overall by weights, and each."""
    model = wina_convert.load(str(folder), sparsity=sparsity)
    tensors = tensors_of(folder)
    counts: dict[str, list[int]] = {}

    def watch(name: str) -> None:
        threshold = threshold_of(folder, tensors[f"{name}.thresholds"], sparsity)
        norms = tensors[f"{name}.weight_t"].double().norm(dim=1)
        counts[name] = [0, 0]

        def hook(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            drop = inputs[0].double().abs() * norms <= threshold
            counts[name][0] += int(drop.sum())
            counts[name][1] += drop.numel()

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in config_of(folder)["quantization_config"]["modules"]:
        watch(name)
    with torch.no_grad():
        model(tokens)
    fractions = {name: skipped / seen for name, (skipped, seen) in counts.items()}
    weights = {name: tensors[f"{name}.weight_t"].numel() for name in counts}
    overall = sum(fractions[name] * weights[name] for name in counts) / sum(weights.values())
    return overall, fractions


@dataclass(frozen=True)
class Recorded:
    """A conversion with its report and the text it used."""

    folder: Path
    report: dict[str, Any]
    tokens: Tensor
    held_out: Tensor


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("conversion") / "wina"
    report = wina_convert.convert(str(tiny), folder, samples=32, seq_len=128, basis="none", allocation="uniform")
    tokenizer = text.load_tokenizer(open_source(str(tiny)))
    packed = text.sequences(documents.read_documents(), tokenizer, 128, 32 + text.HELD_OUT, documents.BUNDLED)
    tokens, held_out = text.split(packed, 32, 0)
    assert hashlib.sha256(tokens.numpy().tobytes()).hexdigest() == report["calibration"]["tokens_sha256"]
    return Recorded(folder, report, tokens, held_out)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_one_checkpoint_achieves_every_asked_sparsity_on_the_calibration_text(
    sparsity: float, recorded: Recorded
) -> None:
    overall, fractions = skipped_fractions(recorded.folder, recorded.tokens, sparsity)
    assert overall == pytest.approx(sparsity, abs=0.015)
    assert all(fraction == pytest.approx(sparsity, abs=0.05) for fraction in fractions.values()), fractions


@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.65])
def test_one_checkpoint_achieves_every_asked_sparsity_on_held_out_text(sparsity: float, recorded: Recorded) -> None:
    overall, _ = skipped_fractions(recorded.folder, recorded.held_out, sparsity)
    assert overall == pytest.approx(sparsity, abs=0.015)


def test_thresholds_fitted_through_gated_layers_beat_those_of_the_dense_model(
    tiny: Path, recorded: Recorded, tmp_path: Path
) -> None:
    """Quantiles of the dense model's scores skip more than was asked, once everything before them is gated."""
    folder, tokens = recorded.folder, recorded.tokens
    dense = AutoModelForCausalLM.from_pretrained(tiny)
    scores: dict[str, list[Tensor]] = {}
    names = config_of(folder)["quantization_config"]["modules"]

    def collect(name: str, norms: Tensor) -> Callable[..., None]:
        return lambda module, inputs: scores.setdefault(name, []).append((inputs[0].abs() * norms).flatten())

    for name in names:
        module = dense.get_submodule(name)
        module.register_forward_pre_hook(collect(name, module.weight.detach().norm(dim=0)))
    with torch.no_grad():
        dense(tokens)
    naive = tmp_path / "naive"
    shutil.copytree(folder, naive)
    tensors = tensors_of(naive)
    for name in names:
        ordered = torch.cat(scores[name]).sort().values
        grid = config_of(folder)["quantization_config"]["grid"]
        picked = [ordered[max(round(point * len(ordered)) - 1, 0)] for point in grid]
        tensors[f"{name}.thresholds"] = torch.stack(picked).index_fill(0, torch.tensor(0), 0.0)
    (naive / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    asked = 0.65
    ours, theirs = (abs(skipped_fractions(path, tokens, asked)[0] - asked) for path in (folder, naive))
    assert theirs > 0.01
    assert ours < theirs / 2


def test_another_seed_chooses_other_text(tiny: Path, tmp_path: Path) -> None:
    reports = [wina_convert.convert(str(tiny), tmp_path / str(seed), seed=seed, **FAST) for seed in (0, 1)]
    first, second = (report["calibration"]["tokens_sha256"] for report in reports)
    assert first != second


def test_the_report_says_what_was_done(tiny: Path, recorded: Recorded) -> None:
    folder, report = recorded.folder, recorded.report
    assert json.loads((folder / "wina_report.json").read_text()) == report
    assert report["versions"]["wina-convert"] == wina_convert.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["source"] == {"name": "wina-lab-tiny", "revision": None}
    assert report["options"] == {
        "sparsity": 0.5,
        "max_ppl_increase": None,
        "calibration": "bundled",
        "samples": 32,
        "seq_len": 128,
        "basis": "none",
        "scheme": "wina",
        "allocation": "uniform",
        "tune": False,
        "batch_size": 1,
        "seed": 0,
        "dtype": "auto",
        "max_shard_size": "5GB",
        "targets": ["all"],
        "ignore": [],
    }
    assert report["layers"] == 4
    assert report["disk_bytes"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    shapes = {name: t.shape for name, t in tensors_of(tiny).items()}
    assert report["projections"] == {
        name: dict(zip(("out_features", "in_features"), shapes[f"{name}.weight"], strict=True))
        for name in config_of(folder)["quantization_config"]["modules"]
    }
    assert report["calibration"] == config_of(folder)["quantization_config"]["calibration"]
    assert report["calibration"]["samples"] == len(recorded.tokens) == 32
    verification = report["verification"]
    assert verification["tensors"] == len(shapes)
    assert 0 <= verification["parity"] < 1e-5
    held_out = verification["held_out"]
    assert held_out["tokens"] == len(recorded.held_out) * 127
    assert held_out["achieved"] == pytest.approx(0.5, abs=0.03)
    assert 1 < held_out["dense_perplexity"] < held_out["perplexity"] < 1.5 * held_out["dense_perplexity"]
    assert 0 < held_out["kl"] < 1
    assert 0.5 < held_out["agreement"] < 1
    assert all(math.isfinite(fraction) for fraction in held_out["projections"].values())


def test_held_out_perplexity_is_that_of_transformers(tiny: Path, recorded: Recorded) -> None:
    for folder, key in ((tiny, "dense_perplexity"), (recorded.folder, "perplexity")):
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(folder)(recorded.held_out, labels=recorded.held_out).loss
        assert recorded.report["verification"]["held_out"][key] == pytest.approx(math.exp(loss), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_inputs_that_are_zero_anyway_may_exceed_the_asked_sparsity(sparsity: float, tmp_path: Path) -> None:
    """A ReLU model skips half of its down projections' inputs without being asked."""
    source = make_model("llama", tmp_path / "source", hidden_act="relu", intermediate_size=192)
    report = wina_convert.convert(str(source), tmp_path / "out", sparsity=sparsity, **MORE)
    achieved = report["verification"]["held_out"]["projections"]
    for name, fraction in achieved.items():
        assert fraction == pytest.approx(0.5 if name.endswith("down_proj") else sparsity, abs=0.1), name


@pytest.mark.parametrize("sparsity", [0.25, 0.4, 0.5])
def test_columns_of_zeros_count_as_skipped(sparsity: float, tiny: Path, tmp_path: Path) -> None:
    """A pruned model: two fifths of the columns hold nothing but zeros."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    tensors, generator = tensors_of(source), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            tensor[:, torch.rand(tensor.shape[1], generator=generator) < 0.4] = 0
    (source / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    report = wina_convert.convert(str(source), tmp_path / "out", sparsity=sparsity, **MORE)
    assert report["verification"]["held_out"]["achieved"] == pytest.approx(max(0.4, sparsity), abs=0.03)


def test_fewer_samples_are_used_where_the_text_has_fewer(tiny: Path, tmp_path: Path) -> None:
    words = " ".join(f"The river rose by {k * k} cm and {k} people carried sand." for k in range(60))
    (tmp_path / "short.txt").write_text(words)
    tokens = len(AutoTokenizer.from_pretrained(tiny)(words, add_special_tokens=False).input_ids)
    report = wina_convert.convert(
        str(tiny),
        tmp_path / "out",
        calibration=str(tmp_path / "short.txt"),
        samples=500,
        seq_len=32,
        batch_size=8,
        basis="none",
    )
    rows = report["calibration"]["samples"] + report["verification"]["sequences"]
    assert tokens // 32 <= rows <= tokens // 31  # a sequence may begin with a BOS
    assert report["calibration"]["samples"] < 500
    assert report["calibration"]["text"] == "short.txt"


def test_text_for_less_than_two_sequences_is_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time there was a river.")
    with pytest.raises(CalibrationError, match=r"short\.txt has \d+ tokens; at least"):
        wina_convert.convert(str(tiny), tmp_path / "out", calibration=str(tmp_path / "short.txt"), seq_len=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.95])
def test_the_ends_of_the_range(sparsity: float, tiny: Path, tmp_path: Path) -> None:
    report = wina_convert.convert(str(tiny), tmp_path / "out", sparsity=sparsity, **MORE)
    assert config_of(tmp_path / "out")["quantization_config"]["sparsity"] == sparsity
    held_out = report["verification"]["held_out"]
    assert held_out["achieved"] == pytest.approx(sparsity, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.arange(2, 42)[None]
    with torch.no_grad():
        expected, found = AutoModelForCausalLM.from_pretrained(tiny)(prompt).logits, model(prompt).logits
    gap = float((expected - found).abs().max() / expected.abs().max())
    assert gap < 1e-5 if sparsity == 0 else gap > 1e-3
