"""Conversions that divide the sparsity by type of projection: what is asked, what is achieved, and who shows it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wina_convert
from support.commands import refused, run, run_wina, succeeded
from support.edits import edit_block, edit_json
from support.families import FAMILIES, make_model
from support.folders import config_of, tensors_of, threshold_of
from support.interrupting import interrupted_in_layer
from wina_convert import pictures
from wina_convert.architectures import ARCHITECTURES
from wina_convert.conversion import plot
from wina_convert.errors import CheckpointError, OptionError, VerificationError
from wina_convert.fitting.budget import Budget
from wina_convert.format.manifest import write_manifest
from wina_convert.models import documents, text
from wina_convert.models.source import open_source
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

SPREAD = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "basis": "none", "allocation": "types"}


def kind(name: str) -> str:
    return name.split(".", 3)[3]


def expected_shares(prior: dict[str, float], weights: dict[str, int], level: float) -> dict[str, float]:
    """By projection, in float64: the prior's odds times one factor that makes the mean over weights the level."""
    odds = {name: prior[kind(name)] / (1 - prior[kind(name)]) for name in weights}

    def shares(factor: float) -> dict[str, float]:
        return {name: odds[name] * factor / (1 + odds[name] * factor) for name in weights}

    low, high = 1e-12, 1e12
    for _ in range(200):
        middle = (low * high) ** 0.5
        found = shares(middle)
        mean = sum(weights[name] * found[name] for name in weights) / sum(weights.values())
        low, high = (middle, high) if mean < level else (low, middle)
    return shares(low)


def weights_of(folder: Path) -> dict[str, int]:
    tensors = tensors_of(folder)
    return {name: tensors[f"{name}.weight_t"].numel() for name in config_of(folder)["quantization_config"]["modules"]}


@dataclass(frozen=True)
class Divided:
    """A conversion of the trained model by types and its report."""

    folder: Path
    report: dict[str, Any]

    def shares(self, level: float) -> dict[str, float]:
        return expected_shares(dict(ARCHITECTURES["llama"].prior), weights_of(self.folder), level)


@pytest.fixture(scope="module")
def divided(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Divided:
    """Shared: copy it to change it."""
    folder = tmp_path_factory.mktemp("types") / "wina"
    options = FAST | {"samples": 16, "seq_len": 64}
    return Divided(folder, wina_convert.convert(str(tiny), folder, **options))


@pytest.fixture
def changed(divided: Divided, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(divided.folder, tmp_path / "changed"))


def test_the_config_stores_what_is_asked_by_kind(divided: Divided):
    block = config_of(divided.folder)["quantization_config"]
    assert block["allocation"] == "types"
    assert set(block["shares"]) == {kind(name) for name in block["modules"]}
    for point, level in enumerate(block["grid"]):
        shares = divided.shares(level)
        found = {name: block["shares"][kind(name)][point] for name in shares}
        assert found == pytest.approx(shares, abs=1e-9)


def calibration(model: Path) -> Tensor:
    """The token ids that `divided` was calibrated on."""
    tokenizer = text.load_tokenizer(open_source(str(model)))
    packed = text.sequences(documents.read_documents(), tokenizer, 64, 16 + text.HELD_OUT, documents.BUNDLED)
    return text.split(packed, 16, 0)[0]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
def test_every_projection_skips_its_share_of_what_it_was_calibrated_on(sparsity: float, tiny: Path, divided: Divided):
    """Counted on a loaded model, with the thresholds as they are stored."""
    model, tensors = wina_convert.load(str(divided.folder), sparsity=sparsity), tensors_of(divided.folder)
    counts: dict[str, list[int]] = {}

    def watch(name: str) -> None:
        threshold = threshold_of(divided.folder, tensors[f"{name}.thresholds"], sparsity)
        norms, counts[name] = tensors[f"{name}.weight_t"].double().norm(dim=1), [0, 0]

        def hook(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            drop = inputs[0].double().abs() * norms <= threshold
            counts[name] = [counts[name][0] + int(drop.sum()), counts[name][1] + drop.numel()]

        model.get_submodule(name).register_forward_pre_hook(hook)

    shares, weights = divided.shares(sparsity), weights_of(divided.folder)
    for name in shares:
        watch(name)
    with torch.no_grad():
        model(calibration(tiny))
    found = {name: skipped / seen for name, (skipped, seen) in counts.items()}
    assert max(shares.values()) - min(shares.values()) > 0.15
    assert found == pytest.approx(shares, abs=0.06)
    assert sum(weights[name] * found[name] for name in found) / sum(weights.values()) == pytest.approx(
        sparsity, abs=0.02
    )


def test_the_report_says_how_and_what_was_achieved(divided: Divided):
    assert divided.report["options"]["allocation"] == "types"
    held_out, shares = divided.report["verification"]["held_out"], divided.shares(0.5)
    assert held_out["achieved"] == pytest.approx(0.5, abs=0.03)
    assert held_out["projections"] == pytest.approx(shares, abs=0.1)
    mean = {one: sum(part for name, part in held_out["projections"].items() if kind(name) == one) / 4 for one in SPREAD}
    assert mean["self_attn.q_proj"] > mean["self_attn.k_proj"] + 0.05 > mean["self_attn.v_proj"] + 0.1


def test_it_verifies_and_after_retarget_too(changed: Path):
    verify_folder(changed)
    succeeded(run_wina("retarget", changed, "--sparsity", "0.3"))
    verify_folder(changed)


def test_inspect_shows_the_allocation_and_what_is_asked(divided: Divided):
    shown = run_wina("inspect", divided.folder)
    succeeded(shown)
    assert "allocation types," in shown.stdout
    table = {line.split()[0]: line.split() for line in shown.stdout.splitlines() if line.strip()}
    found = dict(zip(table["layer"][4:], table["asked"][2:], strict=True))
    shares = {kind(name).rpartition(".")[2]: share for name, share in divided.shares(0.5).items()}
    assert table["asked"][1] == "50.0%"
    assert found == {short: f"{share:.1%}" for short, share in shares.items()}
    assert list(table).index("asked") > list(table).index("3")


def test_inspect_of_a_uniform_checkpoint_has_no_such_row(tiny: Path, tmp_path: Path):
    wina_convert.convert(str(tiny), tmp_path / "out", **{**FAST, "allocation": "uniform"})
    shown = run_wina("inspect", tmp_path / "out")
    assert "allocation uniform," in shown.stdout
    assert not any(line.startswith("asked") for line in shown.stdout.splitlines())
    assert set(inspect_checkpoint(tmp_path / "out").asked.values()) == {0.5}
    assert config_of(tmp_path / "out")["quantization_config"]["shares"] == {}
    verify_folder(tmp_path / "out")


def less(config: dict[str, Any]) -> None:
    share = config["quantization_config"]["shares"]["mlp.up_proj"]
    share[10] -= 1e-5


def test_shares_that_do_not_come_to_the_sparsity_do_not_verify(changed: Path):
    edit_json("config.json", less)(changed)
    write_manifest(changed)
    with pytest.raises(
        VerificationError, match=r"shares in config\.json come to 49\.9\d+% .* where 50\.0000% is asked"
    ):
        verify_folder(changed)


@pytest.mark.parametrize(
    "fields",
    [{"shares": {}}, {"allocation": "uniform"}, {"shares": {"mlp.up_proj": [k / 20 for k in range(20)]}}],
    ids=str,
)
def test_a_config_that_does_not_tell_the_budget_is_refused_and_still_loads(fields: dict[str, Any], changed: Path):
    edit_block(**fields)(changed)
    write_manifest(changed)
    for read in (verify_folder, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"in config\.json"):
            read(changed)
    wina_convert.load(str(changed))  # the thresholds contain the budget


def test_the_picture_of_the_sparsity_has_a_line_for_what_is_asked_of_each_kind(
    divided: Divided, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(plot.pictures, "save", lambda figure, path: drawn.append(figure.axes[0]))
    shares = divided.shares(0.5)
    budget = Budget("types", {name: (0.0, share) for name, share in shares.items()}, (0.0, 0.5))
    for each in (budget, Budget()):
        plot.draw_sparsity(tmp_path / "picture.png", divided.report, each)
    dashed = [[line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] for axes in drawn]
    assert dashed[1] == [0.5]
    kinds = {kind(name): share for name, share in shares.items()}
    assert sorted(dashed[0]) == pytest.approx(sorted([*kinds.values(), 0.5]))
    low, high = drawn[0].get_ylim()
    assert low < min(kinds.values())
    assert max(kinds.values()) < high


def test_the_pictures_have_axes_and_legends(divided: Divided, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    scores = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    names = divided.report["verification"]["held_out"]["projections"]
    plot.draw_sparsity(tmp_path / "picture.png", divided.report, Budget())
    plot.draw_scores(tmp_path / "picture.png", 0.5, {name: plot.ScoreCurve(scores, scores / 9, 0.4) for name in names})
    sparsity, found = drawn
    assert sparsity.axes[0].get_xlabel() == "decoder layer"
    assert sparsity.axes[0].get_ylabel() == "fraction of inputs skipped"
    assert len(sparsity.axes[0].get_legend().get_texts()) == len({kind(name) for name in names}) + 1
    assert found.get_supxlabel() == "score |x| · column weight"
    assert found.get_supylabel() == "scores in a factor of 2"
    assert [text.get_text() for text in found.legends[0].get_texts()] == ["threshold at 50%"]
    assert found.axes[-1].get_ylabel() == "decoder layer"  # of the colours
    assert all(len(axes.get_yticks()) > 1 for axes in found.axes if axes.get_visible())


@pytest.mark.parametrize("family", ["phi3", "gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_families_with_fused_projections_have_shares_too(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source")
    wina_convert.convert(str(source), tmp_path / "out", **FAST)
    block, weights = config_of(tmp_path / "out")["quantization_config"], weights_of(tmp_path / "out")
    prior = dict(ARCHITECTURES[FAMILIES[family]["model_type"]].prior)
    shares = expected_shares(prior, weights, 0.5)
    assert {name: block["shares"][kind(name)][10] for name in weights} == pytest.approx(shares, abs=1e-9)
    verify_folder(tmp_path / "out")


def test_what_stays_dense_is_not_in_the_mean(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    options = {"targets": ["*.q_proj", "mlp"], "ignore": ["model.layers.0.mlp.*"]}
    wina_convert.convert(str(source), tmp_path / "out", **options, **FAST)
    block, weights = config_of(tmp_path / "out")["quantization_config"], weights_of(tmp_path / "out")
    assert len(weights) == 5
    tensors = tensors_of(tmp_path / "out")
    shares = expected_shares(dict(ARCHITECTURES["llama"].prior), weights, 0.5)
    assert {name: block["shares"][kind(name)][10] for name in weights} == pytest.approx(shares, abs=1e-9)
    for layer in inspect_checkpoint(tmp_path / "out").layers:  # the first has queries alone, which skip more than half
        inside = {name: tensors[f"{name}.weight_t"] for name in shares if f".{layer.layer}." in name}
        read = sum(tensor.nbytes * (1 - shares[name]) + 4 * len(tensor) for name, tensor in inside.items())
        assert layer.bytes_per_token == pytest.approx(read, abs=len(inside))
    verify_folder(tmp_path / "out")


@pytest.mark.usefixtures("snapshots")
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path):
    source = make_model("llama", tmp_path / "source", num_hidden_layers=3)
    wina_convert.convert(str(source), tmp_path / "once", **FAST)
    interrupted_in_layer(2, source, tmp_path / "out", **FAST)
    wina_convert.convert(str(source), tmp_path / "out", resume=True, **FAST)
    for name in ("config.json", "model.safetensors", "wina_report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.parametrize("allocation", ["Greedy", "", "Types", None, [], 7])
def test_an_unknown_allocation_is_refused_before_anything_is_read(allocation: Any, tmp_path: Path):
    with pytest.raises(OptionError, match=r"allocation is .*; give one of uniform, types, measured, greedy, auto"):
        wina_convert.convert(str(tmp_path / "nowhere"), tmp_path / "out", allocation=allocation)


def test_the_command_takes_an_allocation(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    small = ("--basis", "none", "--samples", 4, "--seq-len", 16)
    succeeded(run(source, "--out", tmp_path / "out", "--allocation", "uniform", *small))
    report = json.loads((tmp_path / "out" / "wina_report.json").read_text())
    assert report["options"]["allocation"] == "uniform"
    refused(run(source, "--out", tmp_path / "other", "--allocation", "type"), "allocation is 'type'", "uniform, types")
