"""`wina inspect`: each layer with its thresholds and what it achieved, with a report and without."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.commands import run_wina, succeeded


def test_inspect_shows_each_layer_and_its_thresholds(wina_tiny: Path):
    result = run_wina("inspect", wina_tiny)
    succeeded(result)
    stored = load_file(wina_tiny / "model.safetensors")
    block = json.loads((wina_tiny / "config.json").read_text())["quantization_config"]
    at = block["grid"].index(0.5)
    table = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    header = table["layer"]
    assert header[:4] == ["layer", "MB", "MB/token", "achieved"]
    for layer in range(4):
        row = dict(zip(header, table[str(layer)], strict=True))
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            threshold = stored[f"model.layers.{layer}.self_attn.{kind}.thresholds"][at]
            assert float(row[kind]) == pytest.approx(float(threshold), rel=1e-3)
        for kind in ("gate_proj", "up_proj", "down_proj"):
            threshold = stored[f"model.layers.{layer}.mlp.{kind}.thresholds"][at]
            assert float(row[kind]) == pytest.approx(float(threshold), rel=1e-3)
        weights = {
            name.removesuffix(".weight_t"): tensor
            for name, tensor in stored.items()
            if name.startswith(f"model.layers.{layer}.") and name.endswith(".weight_t")
        }
        nbytes = sum(tensor.nbytes for tensor in weights.values())
        assert float(row["MB"]) == pytest.approx(nbytes / 1e6, abs=0.005)
        skipped = sum(tensor.nbytes * block["shares"][name][at] for name, tensor in weights.items())
        cutoffs = sum(4 * tensor.shape[0] for tensor in weights.values())
        assert float(row["MB/token"]) == pytest.approx((nbytes - skipped + cutoffs) / 1e6, abs=0.005)
        assert float(row["achieved"].rstrip("%")) == pytest.approx(100 * skipped / nbytes, abs=5)
    assert "default sparsity 50.0%" in result.stdout


def test_inspect_json_has_the_achieved_sparsity_of_the_report(wina_tiny: Path):
    found = json.loads(run_wina("inspect", wina_tiny, "--json").stdout)
    assert (found["sparsity"], found["measured_at"], found["source"]) == (0.5, 0.5, "wina-lab-tiny")
    report = json.loads((wina_tiny / "wina_report.json").read_text())
    for layer in found["layers"]:
        inside = {
            name: fraction
            for name, fraction in report["verification"]["held_out"]["projections"].items()
            if name.startswith(f"model.layers.{layer['layer']}.")
        }
        sizes = {name: shape["in_features"] * shape["out_features"] for name, shape in report["projections"].items()}
        mean = sum(inside[name] * sizes[name] for name in inside) / sum(sizes[name] for name in inside)
        assert layer["achieved"] == pytest.approx(mean)
    stored = load_file(wina_tiny / "model.safetensors")
    inside_bytes = sum(layer["nbytes"] for layer in found["layers"])
    assert inside_bytes + found["other_bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_inspect_follows_retarget(wina_tiny: Path, tmp_path: Path):
    out = shutil.copytree(wina_tiny, tmp_path / "out")
    result = run_wina("retarget", out, "--sparsity", "0.25")
    succeeded(result)
    assert result.stdout == f"{out}: default sparsity is now 25.0%\n"
    found = json.loads(run_wina("inspect", out, "--json").stdout)
    assert (found["sparsity"], found["measured_at"]) == (0.25, 0.5)
    curve = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.thresholds"]
    assert found["layers"][0]["thresholds"]["mlp.up_proj"] == pytest.approx(float(curve[5]))


@pytest.mark.parametrize("damage", ["missing", "not JSON", "other"])
def test_inspect_does_without_a_report(damage: str, wina_tiny: Path, tmp_path: Path):
    out = shutil.copytree(wina_tiny, tmp_path / "out")
    (out / "wina_report.json").unlink()
    if damage != "missing":
        (out / "wina_report.json").write_text({"not JSON": "{", "other": '{"verification": null}'}[damage])
    result = run_wina("inspect", out)
    succeeded(result)
    assert re.search(r"^0 +\S+ +\S+ +- ", result.stdout, re.MULTILINE)
