"""A checkpoint that is not what its source is gets caught before anybody sees it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.commands import SMALL, contents, refused, run
from wina_convert.conversion import proof
from wina_convert.conversion.plan import make_plan
from wina_convert.conversion.proof import Proof, prove
from wina_convert.errors import CheckpointError, VerificationError, WinaError
from wina_convert.models.documents import read_documents
from wina_convert.models.source import open_source
from wina_convert.models.text import load_tokenizer, sequences, split
from wina_convert.progress import silent

pytestmark = pytest.mark.slow

MODEL = "biases and a tied head"  # see support/shared.py

FILE = "model.safetensors"
GATED = "model.layers.1.mlp.down_proj"
ALONE = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias")


@pytest.fixture(scope="module")
def check(source: Path) -> Callable[[Path], Proof]:
    """Verify a folder against the source."""
    opened = open_source(str(source))
    plan = make_plan(opened)
    packed = sequences(read_documents(), load_tokenizer(opened), 32, 24, "here")
    held_out = split(packed, 8, 0)[1]
    return lambda folder: prove(opened, plan, folder, held_out, torch.device("cpu"), 16, silent)


def damaged(converted: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(converted, folder)
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def flip(tensor: torch.Tensor, at: int = 0) -> None:
    """Change the lowest bit of a byte."""
    tensor.view(-1).view(torch.uint8)[at] ^= 1


def test_a_good_checkpoint_passes_and_is_measured(converted: Path, source: Path, check):
    report = check(converted)
    assert report.tensors == len(load_file(source / FILE))
    assert report.parity <= 1e-5
    assert report.held_out.sparsity == 0.5
    assert abs(report.held_out.achieved - 0.5) <= 0.05
    assert json.loads((converted / "wina_report.json").read_text())["verification"]["tensors"] == report.tensors


@pytest.mark.parametrize("name", [*ALONE, f"{GATED}.weight_t", f"{GATED}.column_norms"])
def test_one_flipped_bit_is_found(name: str, converted: Path, check, tmp_path: Path):
    folder = damaged(converted, tmp_path / "damaged", lambda tensors: flip(tensors[name]))
    with pytest.raises(VerificationError, match=f"'{name}' reads back differently"):
        check(folder)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found(
    data: st.DataObject, converted: Path, check, tmp_path_factory: pytest.TempPathFactory
):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        exact = sorted(name for name in tensors if tensors[name].numel() and not name.endswith(".thresholds"))
        tensor = tensors[data.draw(st.sampled_from(exact))]
        flip(tensor, data.draw(st.integers(0, tensor.nbytes - 1)))

    folder = damaged(converted, tmp_path_factory.mktemp("damaged") / "out", change)
    with pytest.raises(VerificationError, match="reads back differently"):
        check(folder)


CURVES = {
    "falls": lambda curve: curve[10:].copy_(curve[10:].flip(0)),
    "starts above 0": lambda curve: curve[0].fill_(1e-9),
    "is negative": lambda curve: curve[:2].fill_(-1e-9),
    "has NaN": lambda curve: curve[7].fill_(float("nan")),
    "ends in infinity": lambda curve: curve[-1].fill_(float("inf")),
}


@pytest.mark.parametrize("change", CURVES.values(), ids=CURVES)
def test_a_threshold_curve_that_cannot_be_is_found(change, converted: Path, check, tmp_path: Path):
    name = f"{GATED}.thresholds"
    folder = damaged(converted, tmp_path / "damaged", lambda tensors: change(tensors[name]))
    with pytest.raises(VerificationError, match=rf"'{name}' is not a finite, ascending curve from 0"):
        check(folder)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_thresholds_that_skip_another_fraction_are_found(factor: float, converted: Path, check, tmp_path: Path):
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(".thresholds"):
                tensors[name] *= factor

    with pytest.raises(VerificationError, match=r"50\.0% of sparsity and achieved \d.*--calibration"):
        check(damaged(converted, tmp_path / "damaged", scale))


MISSING = (*ALONE, *(f"{GATED}.{part}" for part in ("weight_t", "column_norms", "thresholds")))


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_found(name: str, converted: Path, check, tmp_path: Path):
    folder = damaged(converted, tmp_path / "damaged", lambda tensors: tensors.pop(name))
    with pytest.raises(WinaError, match=name.removesuffix(".weight_t")):
        check(folder)


def test_a_missing_sentinel_is_found(converted: Path, check, tmp_path: Path):
    (name,) = [name for name, tensor in load_file(converted / FILE).items() if not tensor.numel()]
    folder = damaged(converted, tmp_path / "damaged", lambda tensors: tensors.pop(name))
    with pytest.raises(VerificationError, match=f"'{name}' was not written as planned"):
        check(folder)


CHANGED = {
    "extra": lambda tensors: tensors.update({"extra": torch.zeros(1)}),
    "other dtype": lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}),
    "other shape": lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][None]}),
    "longer curve": lambda tensors: tensors.update({f"{GATED}.thresholds": torch.arange(21.0)}),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_tensor_other_than_planned_is_found(change, converted: Path, check, tmp_path: Path):
    found = r"was not written as planned|reads back differently|instead of float32 \[20\]"
    with pytest.raises((CheckpointError, VerificationError), match=found):
        check(damaged(converted, tmp_path / "damaged", change))


def test_a_model_that_computes_something_else_at_sparsity_0_is_found(converted: Path, check, tmp_path: Path):
    folder = shutil.copytree(converted, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(VerificationError, match="at sparsity 0 the logits differ from the dense model's"):
        check(folder)


@pytest.mark.parametrize("old", [True, False], ids=["overwrite", "new"])
def test_a_conversion_whose_verification_fails_leaves_what_was_there(
    old: bool, source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def damage(source: object, folder: Path) -> None:
        with (folder / FILE).open("r+b") as file:
            file.seek(-1, 2)
            byte = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr("wina_convert.conversion.pipeline.copy_sidecars", damage)
    if old:
        shutil.copytree(converted, tmp_path / "out")
    before = contents(tmp_path)
    refused(run(source, "--out", tmp_path / "out", "--overwrite", "--quiet", *SMALL), "reads back differently")
    assert contents(tmp_path) == before


def test_a_tensor_in_another_dtype_is_compared_in_slices(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SLICE", 1 << 10)
    assert run(source, "--out", tmp_path / "out", *SMALL, "--dtype", "bfloat16", "--quiet").exit_code == 0
