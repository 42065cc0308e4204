"""Checkpoints with a low-rank term (`--scheme r-sparse`): what they compute, what they cost, and what every verb makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.commands import refused, run
from support.edits import edit_tensor, edit_tensors
from support.families import make_model
from support.folders import config_of, tensors_of
from support.loaded import equal, greedy, logits
from wina_convert import WinaConfig, convert, load
from wina_convert.errors import CheckpointError, VerificationError
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.format.manifest import write_manifest
from wina_convert.models.cost import token_cost
from wina_convert.models.stream import checkpoint_stream
from wina_convert.runtime.linear import WinaLinear
from wina_convert.verbs.export import export
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 32, "basis": "none"}
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its checkpoint. Shared: copy them to change them."""
    folder = tmp_path_factory.mktemp("low-rank")
    source = make_model("llama", folder / "source")
    convert(str(source), folder / "out", scheme="r-sparse", **FAST)
    return source, folder / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_term_multiplies_what_is_skipped(rows: int, dtype: torch.dtype):
    gate = WinaLinear(48, 24, [0.0, 0.5], True, dtype, low_rank=0.2)
    for name, parameter in gate.named_parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
        if name in ("column_norms", "thresholds"):
            parameter.data = torch.tensor([0.0, 0.7]) if name == "thresholds" else parameter.data.abs()
    x = torch.randn(2, rows, 48).to(dtype)
    left, right, weight_t = gate.low_rank_in.double(), gate.low_rank_out.double(), gate.weight_t.double()
    assert left.shape == (48, 3)
    gate.set_sparsity(0.5)
    keep = x.float().abs() > gate.tau
    assert 0.1 < keep.double().mean() < 0.9
    expected = (x.double() * keep) @ weight_t + (x.double() * ~keep) @ left @ right + gate.bias.double()
    room = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(gate(x).double(), expected, rtol=0, atol=room)
    for change in (
        lambda: gate.set_sparsity(0.0),
        lambda: (gate.set_sparsity(0.5), setattr(gate, "dense_prefill", True)),
    ):
        change()
        if rows > 1 or gate.sparsity == 0:
            expected = x.double() @ weight_t + gate.bias.double()
            torch.testing.assert_close(gate(x).double(), expected, rtol=0, atol=room)


def test_the_gradient_passes_through_both_parts(made: tuple[Path, Path]):
    gate = load(str(made[1])).get_submodule(NAME)
    x = torch.randn(3, gate.in_features, requires_grad=True)
    gate(x).sum().backward()
    keep = x.detach().abs() > gate.tau
    full, term = gate.weight_t.sum(1), (gate.low_rank_in @ gate.low_rank_out).sum(1)
    torch.testing.assert_close(x.grad, torch.where(keep, full, term))


def test_it_is_dense_at_sparsity_0_and_the_term_brings_it_nearer_elsewhere(made: tuple[Path, Path], tmp_path: Path):
    source, out = made
    dense = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(logits(load(str(out), sparsity=0.0)), logits(dense))
    gated = load(str(out), sparsity=0.6).get_submodule(NAME)
    x = torch.randn(64, gated.in_features)
    exact = x @ gated.weight_t
    with_term = (gated(x) - exact).norm()
    gated.low_rank_in.zero_()
    assert with_term < 0.97 * (gated(x) - exact).norm()


def test_its_bytes_and_operations_are_counted_everywhere(made: tuple[Path, Path], tmp_path: Path):
    _, out = made
    tensors, report = tensors_of(out), json.loads((out / "wina_report.json").read_text())
    terms = sum(tensor.nbytes for name, tensor in tensors.items() if ".low_rank_" in name)
    weights = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".weight_t"))
    assert 0.04 < terms / weights < 0.06
    assert report["disk_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    source = made[0]
    plain = convert(str(source), tmp_path / "plain", dry_run=True, **FAST)["bytes_per_token"]
    assert report["bytes_per_token"]["gated"] - plain["gated"] == terms
    assert report["bytes_per_token"]["dense"] == plain["dense"]
    assert (
        abs(sum(layer.bytes_per_token for layer in inspect_checkpoint(out).layers) / weights - 0.5 - terms / weights)
        < 0.03
    )
    checkpoint = open_checkpoint(out)
    stream, specs = checkpoint_stream(checkpoint, torch.device("cpu")), checkpoint.folder.tensors
    names = checkpoint.config.modules
    dense = token_cost(stream, specs)
    at_0 = token_cost(stream, specs, dict.fromkeys(names, 0.0))
    at_half = token_cost(stream, specs, dict.fromkeys(names, 0.5))
    assert at_0.macs == dense.macs == at_half.macs + weights // 8 - terms // 4
    assert at_0.nbytes - at_half.nbytes == weights // 2 - terms
    moved = Path(shutil.copytree(out, tmp_path / "moved"))
    retarget(moved, 0.0)
    after = json.loads((moved / "wina_report.json").read_text())["bytes_per_token"]
    assert after["gated"] == at_0.nbytes
    verify_folder(moved)


def test_export_and_dequantize_drop_it_exactly_and_saving_keeps_it(made: tuple[Path, Path], tmp_path: Path):
    source, out = made
    done = export(out, tmp_path / "dense")
    assert "bit for bit" in done.said
    assert equal(tensors_of(tmp_path / "dense"), tensors_of(source))
    model = load(str(out))
    model.save_pretrained(tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(out))
    assert torch.equal(greedy(load(str(tmp_path / "again"))), greedy(model))
    model.dequantize()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))


def test_gated_in_memory_it_is_the_converted_one(made: tuple[Path, Path]):
    source, out = made
    expected = logits(load(str(out)))
    fields = {"samples": 8, "seq_len": 32, "scheme": "r-sparse"}
    for asked in (WinaConfig(calibration="bundled", conversion=fields), WinaConfig(thresholds=out)):
        found = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked)
        assert torch.equal(logits(found), expected)


def test_another_term_does_not_verify_or_load(made: tuple[Path, Path], tmp_path: Path):
    _, out = made
    changes = {
        "scaled": edit_tensor(f"{NAME}.low_rank_out", lambda tensor: 1.5 * tensor),
        "random": edit_tensor(f"{NAME}.low_rank_in", torch.randn_like),
    }
    for name, change in changes.items():
        folder = Path(shutil.copytree(out, tmp_path / name))
        change(folder)
        write_manifest(folder)
        with pytest.raises(VerificationError, match="the low-rank term is not that of its weights"):
            verify_folder(folder)
    wrong = {
        "missing": edit_tensors(lambda stored: stored.pop(f"{NAME}.low_rank_in")),
        "another rank": edit_tensor(f"{NAME}.low_rank_out", lambda tensor: tensor[:-1].contiguous()),
    }
    for name, change in wrong.items():
        folder = Path(shutil.copytree(out, tmp_path / name))
        change(folder)
        with pytest.raises(CheckpointError, match="low_rank_"):
            load(str(folder))
    assert config_of(out)["quantization_config"]["low_rank"] == 0.05


def test_it_is_not_tuned(tmp_path: Path):
    refused(run(tmp_path, "--out", tmp_path / "out", "--scheme", "r-sparse", "--tune"), "low-rank", "leave out tune")
