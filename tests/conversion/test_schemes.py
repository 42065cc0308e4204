"""Conversions with every scheme: what they store, what the loaded model masks, and what `wina verify` finds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

import wina_convert
from support.commands import refused, run, run_wina, succeeded
from support.edits import edit_block
from support.families import make_model
from support.folders import config_of, tensors_of, threshold_of
from wina_convert.errors import OptionError, VerificationError
from wina_convert.fitting.schemes import SCHEMES
from wina_convert.format.manifest import write_manifest
from wina_convert.runtime.linear import gated_modules
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"samples": 8, "seq_len": 32}
WEIGHTED = ("k_proj", "gate_proj", "c_attn", "c_fc")
MADE = [(scheme, "qwen2", "none") for scheme in SCHEMES if scheme != "wina"]
MADE += [("r-sparse", "gpt2", "none"), ("r-sparse", "llama-tied", "pca")]
MADE += [("wina-paper", "gpt2", "none"), ("teal", "llama-tied", "pca"), ("was", "llama-tied", "pca")]


def reference(weight_t: Tensor, scheme: str, name: str) -> Tensor:
    """Column weights [in] of W^T [in, out] without a column of zeros, in float64."""
    if scheme == "was":
        return weight_t.double().abs().sum(1)
    if scheme == "teal" or (scheme == "wina-paper" and not name.endswith(WEIGHTED)):
        return torch.ones(len(weight_t), dtype=torch.float64)
    return weight_t.double().square().sum(1).sqrt()


def nearest(weight_t: Tensor) -> Tensor:
    """The matrix of rank r nearest to W^T [in, out], float64."""
    u, s, vh = torch.linalg.svd(weight_t, full_matrices=False)
    n_in, n_out = weight_t.shape
    rank = max(1, int(0.05 * n_in * n_out / (n_in + n_out) + 0.5))
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.fixture(scope="module", params=MADE, ids=lambda made: "-".join(made))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A scheme and a checkpoint of it. Shared: copy it to change it."""
    scheme, family, basis = request.param
    folder = tmp_path_factory.mktemp("scheme")
    source = make_model(family, folder / "source")
    wina_convert.convert(str(source), folder / "out", scheme=scheme, basis=basis, **FAST)
    return scheme, folder / "out"


def test_a_checkpoint_stores_the_column_weights_of_its_scheme_and_verifies(made: tuple[str, Path]):
    scheme, out = made
    block, tensors = config_of(out)["quantization_config"], tensors_of(out)
    assert block["scheme"] == scheme
    assert json.loads((out / "wina_report.json").read_text())["options"]["scheme"] == scheme
    assert inspect_checkpoint(out).scheme == scheme
    for name in block["modules"]:
        expected = reference(tensors[f"{name}.weight_t"], scheme, name)
        torch.testing.assert_close(tensors[f"{name}.column_norms"].double(), expected, rtol=1e-6, atol=0)
    verify_folder(out)


def test_a_loaded_checkpoint_masks_by_the_column_weights_of_its_scheme(made: tuple[str, Path]):
    """Of every projection's own inputs in a forward pass, against float64."""
    scheme, out = made
    model, tensors = AutoModelForCausalLM.from_pretrained(out), tensors_of(out)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, gate in gated_modules(model).items():
        gate.register_forward_hook(lambda gate, inputs, output, name=name: calls.update({name: (inputs[0], output)}))
    with torch.no_grad():
        model(torch.randint(2, 2048, (4, 40), generator=torch.Generator().manual_seed(1)))
    assert list(calls) == config_of(out)["quantization_config"]["modules"]
    masked, seen = 0, 0
    for name, (x, y) in calls.items():
        weight_t = tensors[f"{name}.weight_t"].double()
        scores = x.double().abs() * reference(weight_t, scheme, name)
        threshold = threshold_of(out, tensors[f"{name}.thresholds"], 0.5)
        clear = ((scores / threshold - 1).abs() > 1e-5).all(-1)  # tokens without a score that rounding decides
        bias = tensors.get(f"{name}.bias", torch.zeros(1)).double()
        expected = torch.where(scores > threshold, x.double(), 0.0) @ weight_t + bias
        if scheme == "r-sparse":
            expected += torch.where(scores > threshold, 0.0, x.double()) @ nearest(weight_t)
        assert clear.double().mean() > 0.9
        torch.testing.assert_close(y[clear].double(), expected[clear], rtol=0, atol=1e-5 * float(expected.abs().max()))
        masked += int((scores <= threshold).sum()) * weight_t.shape[1]
        seen += scores.numel() * weight_t.shape[1]
    assert masked / seen == pytest.approx(0.5, abs=0.06)


def test_column_weights_of_another_scheme_do_not_verify(made: tuple[str, Path], tmp_path: Path):
    scheme, out = made
    for other in set(SCHEMES) - {scheme}:
        folder = Path(shutil.copytree(out, tmp_path / other))
        edit_block(scheme=other)(folder)
        write_manifest(folder)
        with pytest.raises(
            VerificationError, match=f"(are not those of its weights for|does not go with) scheme '{other}'"
        ):
            verify_folder(folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_columns_of_zeros_are_skipped_first_in_every_scheme(scheme: str, tmp_path: Path):
    source, generator = make_model("llama", tmp_path / "source"), torch.Generator().manual_seed(0)
    tensors = tensors_of(source)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            tensor[:, torch.rand(tensor.shape[1], generator=generator) < 0.4] = 0
    (source / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    options = {"scheme": scheme, "allocation": "uniform", "sparsity": 0.25, "basis": "none"}
    wina_convert.convert(str(source), tmp_path / "out", **options, **FAST)
    written = tensors_of(tmp_path / "out")
    zeros = 0
    for name, gate in gated_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).items():
        empty = ~written[f"{name}.weight_t"].any(1)
        assert gate.tau is not None
        assert torch.equal(gate.tau.isinf(), empty)
        assert not gate.tau[~empty].any()  # the zeros are more than the 25% that were asked
        zeros += int(empty.sum())
    assert zeros
    verify_folder(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["l2", "", "WINA", None, [], 7])
def test_an_unknown_scheme_is_refused_before_anything_is_read(scheme: Any, tmp_path: Path):
    with pytest.raises(OptionError, match=r"scheme is .*; give one of wina, wina-paper, teal, was"):
        wina_convert.convert(str(tmp_path / "nowhere"), tmp_path / "out", scheme=scheme)


def test_the_command_takes_a_scheme_and_inspect_shows_it(tmp_path: Path):
    source = make_model("llama", tmp_path / "source")
    succeeded(
        run(source, "--out", tmp_path / "out", "--scheme", "was", "--basis", "none", "--samples", 4, "--seq-len", 16)
    )
    shown = run_wina("inspect", tmp_path / "out")
    succeeded(shown)
    assert "scheme was," in shown.stdout
    refused(run(source, "--out", tmp_path / "other", "--scheme", "l1"), "scheme is 'l1'", "teal")
