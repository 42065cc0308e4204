"""Conversions on the GPU of what is made beside norms and thresholds: learned tensors, low-rank terms, a head of its own."""

from pathlib import Path
from typing import Any

import pytest

import wina_convert
from support import TINY
from support.loaded import logits
from wina_convert.conversion import tuning
from wina_convert.fitting import tune as learning
from wina_convert.verbs.verify import verify_folder

OPTIONS: dict[str, dict[str, Any]] = {
    "tuned": {"tune": True, "allocation": "types"},  # what few steps improve
    "low-rank": {"scheme": "r-sparse"},
    "head": {"targets": ("all", "head")},
}


@pytest.mark.parametrize("basis", ["none", "fitted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_converted_on_a_card_verifies_and_is_the_source_at_0(
    options: dict[str, Any], basis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"STEPS": 20, "LOOK": 10, "LEVEL_TOKENS": 192}.items():
        monkeypatch.setattr(learning, name, value)
    for name, value in {"FITTED": 512, "JUDGED": 256, "TOKENS": 1 << 13}.items():
        monkeypatch.setattr(tuning, name, value)
    report = wina_convert.convert(
        str(TINY), tmp_path / "out", samples=16, seq_len=128, device="cuda", basis=basis, dtype="float32", **options
    )
    if "tune" in options and basis == "none":  # behind a fitted basis so few steps may help nothing
        assert report["tuning"]["kept"]
    verify_folder(tmp_path / "out")
    gated = wina_convert.load(str(tmp_path / "out"), sparsity=0.0)
    dense = wina_convert.load(str(tmp_path / "out"), sparsity=0.0).dequantize()
    expected = logits(dense)
    assert (logits(gated) - expected).abs().max() < 1e-4 * expected.abs().max()
