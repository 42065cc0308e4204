"""`--max-ppl-increase`: the largest sparsity within a loss becomes the default."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import wina_convert
from support.commands import refused, run, run_wina, succeeded
from support.folders import config_of, tensors_of
from wina_convert.conversion import loss_limit
from wina_convert.conversion.loss_limit import largest_sparsity
from wina_convert.models import documents, text
from wina_convert.models.source import open_source
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 16, "seq_len": 64, "basis": "none"}


@pytest.mark.parametrize("limit", [0.05, 0.2, 0.31, 0.62, 0.7999, 0.94])
def test_the_largest_sparsity_is_found_to_1_3_points(limit: float):
    seen: list[float] = []

    def rises(sparsities: Sequence[float]) -> list[float]:
        seen.extend(sparsities)
        return [0.01 if sparsity <= limit else 0.06 for sparsity in sparsities]

    assert limit - 0.0131 <= largest_sparsity(rises, 5, 0.95) <= limit
    assert len(seen) <= 11


@pytest.mark.parametrize(
    ("rise", "expected"),
    [(lambda s: 0.0, 0.95), (lambda s: 0.05, 0.95), (lambda s: 0.0501, 0.0), (lambda s: math.nan, 0.0)],
)
def test_everything_or_nothing_may_be_good(rise: Any, expected: float):
    assert largest_sparsity(lambda sparsities: [rise(s) for s in sparsities], 5, 0.95) == expected


def test_a_good_sparsity_behind_a_bad_one_does_not_count():
    found = largest_sparsity(lambda sparsities: [0.2 * (0.3 < s < 0.5) for s in sparsities], 5, 0.95)
    assert 0.28 < found <= 0.3


@pytest.fixture(scope="module")
def limited(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("limited") / "out"
    return folder, wina_convert.convert(str(tiny), folder, max_ppl_increase=5, plot=True, **FAST)


def test_the_default_is_what_the_loss_allows(limited: tuple[Path, dict[str, Any]], tiny: Path):
    """Perplexities of the loaded models on the held-out sequences, in float64."""
    folder, report = limited
    found = report["verification"]["max_ppl_increase"]
    assert config_of(folder)["quantization_config"]["sparsity"] == found["sparsity"] > 0
    assert report["verification"]["held_out"]["sparsity"] == found["sparsity"]
    tokenizer = text.load_tokenizer(open_source(str(tiny)))
    packed = text.sequences(documents.read_documents(), tokenizer, 64, 16 + text.HELD_OUT, documents.BUNDLED)
    held_out = text.split(packed, 16, 0)[1]

    def loss(model: Any) -> float:
        with torch.no_grad():
            log_p = model(held_out).logits[:, :-1].double().log_softmax(-1)
        return float(-log_p.gather(2, held_out[:, 1:, None]).mean())

    dense = loss(wina_convert.load(str(folder), sparsity=0.0))
    at, beyond = (loss(wina_convert.load(str(folder), sparsity=found["sparsity"] + more)) for more in (0, 0.02))
    assert 100 * math.expm1(at - dense) == pytest.approx(found["increase"], abs=0.01)
    assert 100 * math.expm1(at - dense) <= 5 < 100 * math.expm1(beyond - dense)


def test_what_is_skipped_is_told_for_all_and_for_the_feed_forward_weights(limited: tuple[Path, dict[str, Any]]):
    folder, report = limited
    held_out, tensors = report["verification"]["held_out"]["projections"], tensors_of(folder)
    weights = {name: tensors[f"{name}.weight_t"].numel() for name in held_out}

    def mean(names: list[str]) -> float:
        return sum(held_out[name] * weights[name] for name in names) / sum(weights[name] for name in names)

    found = report["verification"]["max_ppl_increase"]
    assert found["achieved"] == pytest.approx(mean(list(held_out)))
    assert found["achieved_feed_forward"] == pytest.approx(mean([name for name in held_out if ".mlp." in name]))
    assert found["achieved"] != found["achieved_feed_forward"]
    gated = report["bytes_per_token"]["gated"]
    skipped = sum(4 * weights[name] * held_out[name] for name in weights)
    cutoffs = sum(4 * len(tensors[f"{name}.weight_t"]) for name in weights)
    assert gated == pytest.approx(report["bytes_per_token"]["dense"] - skipped + cutoffs, rel=0.03)


def test_it_verifies(limited: tuple[Path, dict[str, Any]]):
    verify_folder(limited[0])


def test_the_command_prints_both_and_the_plan_says_it(tmp_path: Path, tiny: Path):
    small = ("--basis", "none", "--samples", 4, "--seq-len", 32, "--max-ppl-increase", "20")
    plan = run(tiny, "--out", tmp_path / "out", "--dry-run", *small)
    succeeded(plan)
    assert "the largest sparsity within +20% of perplexity, found at conversion" in plan.stdout
    done = run(tiny, "--out", tmp_path / "out", *small)
    succeeded(done)
    report = json.loads((tmp_path / "out" / "wina_report.json").read_text())
    found = report["verification"]["max_ppl_increase"]
    (line,) = [line for line in done.stdout.splitlines() if "PPL-20%" in line]
    assert f"{found['achieved']:.2%} of all gated weights" in line
    assert f"{found['achieved_feed_forward']:.2%} of the feed-forward ones alone" in line
    assert f"asked {found['sparsity']:.1%}" in done.stdout
    succeeded(run_wina("verify", tmp_path / "out"))


def test_without_feed_forward_projections_there_is_no_such_number(tmp_path: Path, tiny: Path):
    done = run(
        *(tiny, "--out", tmp_path / "out", "--basis", "none", "--samples", 4, "--seq-len", 32),
        *("--max-ppl-increase", "10", "--targets", "attention"),
    )
    succeeded(done)
    report = json.loads((tmp_path / "out" / "wina_report.json").read_text())
    assert report["verification"]["max_ppl_increase"]["achieved_feed_forward"] is None
    assert "feed-forward" not in done.stdout


def test_a_loss_that_nothing_meets_leaves_the_model_dense(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_limit, "largest_sparsity", lambda rises, percent, highest: 0.0)
    done = run(
        *(tiny, "--out", tmp_path / "out", "--basis", "none", "--samples", 4, "--seq-len", 32),
        *("--max-ppl-increase", "1"),
    )
    succeeded(done)
    assert config_of(tmp_path / "out")["quantization_config"]["sparsity"] == 0
    assert "no sparsity measured stays within it" in done.stdout
    succeeded(run_wina("verify", tmp_path / "out"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_loss_that_is_none_is_refused(value: str, tiny: Path, tmp_path: Path):
    refused(run(tiny, "--out", tmp_path / "out", "--max-ppl-increase", value), "max ppl increase", "above 0")
