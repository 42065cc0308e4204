"""Conversions that search the allocation: what is stored and achieved, what a resume finds again, and who shows it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import wina_convert
from support.commands import run_wina, succeeded
from support.edits import edit_json
from support.families import make_model
from support.folders import config_of, tensors_of
from support.interrupting import interrupted_in_layer
from wina_convert.conversion import search
from wina_convert.errors import VerificationError
from wina_convert.fitting import greedy
from wina_convert.format.manifest import write_manifest
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "basis": "none"}


@pytest.fixture(autouse=True)
def large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "STEP", 0.5)


@pytest.fixture(scope="module", params=["measured", "greedy"])
def searched(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The trained model. Shared: copy it to change it."""
    folder = tmp_path_factory.mktemp(request.param) / "wina"
    options = FAST | {"samples": 16, "seq_len": 64, "allocation": request.param}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(greedy, "STEP", 0.5)
        return folder, wina_convert.convert(str(tiny), folder, **options)


def test_the_config_has_a_share_for_every_projection_and_the_level_is_met(searched: Any):
    """By the whole model, and by each layer where every layer is searched by itself."""
    block, tensors = config_of(searched[0])["quantization_config"], tensors_of(searched[0])
    assert block["allocation"] == searched[1]["options"]["allocation"]
    assert list(block["shares"]) == block["modules"]
    layers = [block["shares"][f"model.layers.{layer}.mlp.up_proj"] for layer in range(4)]
    assert any(layer != layers[0] for layer in layers)
    for part in [f"model.layers.{layer}." for layer in range(4)] if block["allocation"] == "greedy" else [""]:
        weights = {n: tensors[f"{n}.weight_t"].numel() for n in block["modules"] if n.startswith(part)}
        for point, level in enumerate(block["grid"]):
            mean = sum(block["shares"][name][point] * count for name, count in weights.items()) / sum(weights.values())
            assert mean == pytest.approx(level, abs=1e-12)


def test_what_is_asked_is_achieved_on_held_out_text(searched: Any):
    held_out = searched[1]["verification"]["held_out"]
    shares = config_of(searched[0])["quantization_config"]["shares"]
    assert held_out["achieved"] == pytest.approx(0.5, abs=0.03)
    assert held_out["projections"] == pytest.approx({name: share[10] for name, share in shares.items()}, abs=0.12)


def test_it_verifies_and_a_changed_share_does_not(searched: Any, tmp_path: Path):
    verify_folder(searched[0])
    folder = Path(shutil.copytree(searched[0], tmp_path / "changed"))

    def less(config: dict[str, Any]) -> None:
        share = next(s for s in config["quantization_config"]["shares"].values() if s[10] > s[9] + 1e-3)
        share[10] -= 1e-4

    edit_json("config.json", less)(folder)
    write_manifest(folder)
    with pytest.raises(VerificationError, match=r"shares in config\.json come to"):
        verify_folder(folder)


def test_inspect_shows_the_mean_over_the_layers(searched: Any):
    shares = config_of(searched[0])["quantization_config"]["shares"]
    asked = inspect_checkpoint(searched[0]).asked
    for kind, share in asked.items():
        assert share == pytest.approx(sum(shares[f"model.layers.{layer}.{kind}"][10] for layer in range(4)) / 4)
    shown = run_wina("inspect", searched[0])
    succeeded(shown)
    assert f"allocation {searched[1]['options']['allocation']}," in shown.stdout


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize("allocation", ["measured", "greedy"])
def test_an_interrupted_conversion_does_not_search_again_and_comes_to_the_same_bytes(
    allocation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = make_model("llama", tmp_path / "source", num_hidden_layers=3)
    options = FAST | {"allocation": allocation}
    wina_convert.convert(str(source), tmp_path / "once", **options)
    interrupted_in_layer(2, source, tmp_path / "out", **options)
    monkeypatch.setattr(search, "dense_layer", None)
    wina_convert.convert(str(source), tmp_path / "out", resume=True, **options)
    for name in ("config.json", "model.safetensors", "wina_report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_the_plan_counts_the_time_of_the_search(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(greedy, "STEP", 0.001)
    plans = {
        allocation: wina_convert.convert(str(tiny), tmp_path / "out", dry_run=True, **FAST | {"allocation": allocation})
        for allocation in ("uniform", "greedy")
    }
    assert plans["greedy"]["seconds"] > 5 * plans["uniform"]["seconds"]
    assert plans["greedy"]["bytes_per_token"] == plans["uniform"]["bytes_per_token"]


@pytest.mark.parametrize("allocation", ["measured", "greedy"])
@pytest.mark.parametrize(("family", "basis", "targets"), [("gpt2", "none", ["all"]), ("llama-tied", "pca", ["mlp"])])
def test_other_families_bases_and_targets(family: str, basis: str, targets: list[str], allocation: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    options = FAST | {"basis": basis, "targets": targets, "ignore": ["*.0.mlp.*"], "allocation": allocation}
    wina_convert.convert(str(source), tmp_path / "out", **options)  # the first layer may gate nothing
    verify_folder(tmp_path / "out")
