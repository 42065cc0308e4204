"""Calibration on constant scores, zeros, columns of norm zero and extreme sizes."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import wina_convert
from support.families import make_model
from support.folders import tensors_of
from support.products import DTYPES, check, randn
from support.reference import logits
from wina_convert.fitting.calibrate import calibrate_layer
from wina_convert.fitting.schemes import column_norms
from wina_convert.fitting.thresholds import threshold_curve
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear
from wina_convert.runtime.rule import dropped

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gated_layer(n_in: int = 24, n_out: int = 10, seed: int = 0) -> WinaLinear:
    layer = WinaLinear(n_in, n_out, GRID, bias=False)
    with torch.no_grad():
        layer.weight_t.copy_(randn(seed, n_in, n_out))
        layer.column_norms.copy_(column_norms(layer.weight_t))
        layer.thresholds.zero_()
    return layer


def calibrated(layer: WinaLinear, hidden: Tensor) -> Tensor:
    """The curve that calibration finds where these hidden states [B, S, in] enter a projection."""
    states = {level: list(hidden.split(2)) for level in (0.25, 0.5, 0.75)}
    with torch.no_grad():
        found, _ = calibrate_layer(lambda batch, number: layer(batch), {"layer": layer}, states, lambda done: None)
        layer.thresholds.copy_(threshold_curve(found["layer"], GRID))
    assert layer.thresholds.isfinite().all()
    assert (layer.thresholds >= 0).all()
    assert (layer.thresholds.diff() >= 0).all()
    return layer.thresholds


def check_gated_layer(layer: WinaLinear, hidden: Tensor) -> None:
    """At every stored sparsity there are cutoffs that are numbers, and products that are those of float64."""
    for sparsity in GRID:
        layer.set_sparsity(sparsity)
        assert not layer.tau.isnan().any()
        y = layer(hidden)
        assert y.isfinite().all()
        check(y, hidden, layer.weight_t, layer.tau)


def test_constant_scores_have_a_threshold_within_a_bin_of_them():
    layer = gated_layer()
    hidden = (3 / layer.column_norms).expand(4, 6, -1).clone()
    curve = calibrated(layer, hidden)
    torch.testing.assert_close(curve[1:], torch.full((len(GRID) - 1,), 3.0), rtol=2**-7, atol=0)
    check_gated_layer(layer, hidden)


@pytest.mark.parametrize(
    ("dead", "skipped"),
    [(6, 0.25), (12, 0.5), (23, 0.95), (24, 1.0)],  # inputs of 24; what is skipped at the least, at any sparsity
)
def test_inputs_that_are_always_zero_need_no_threshold(dead, skipped):
    layer, hidden = gated_layer(), randn(1, 4, 60, 24)
    hidden[..., :dead] = 0
    curve = calibrated(layer, hidden)
    for sparsity, threshold in zip(GRID, curve.tolist(), strict=True):
        assert (threshold == 0) == (sparsity == 0 or sparsity <= dead / 24)
        layer.set_sparsity(sparsity)
        fraction = dropped(hidden, layer.tau).float().mean().item()
        assert fraction == pytest.approx(max(sparsity, dead / 24), abs=0.02)
    check_gated_layer(layer, hidden)


@pytest.mark.parametrize("dead", [12, 24])
def test_columns_of_norm_zero_are_skipped_at_every_sparsity(dead):
    layer, hidden = gated_layer(), randn(2, 4, 60, 24)
    with torch.no_grad():
        layer.weight_t[:dead] = 0
        layer.column_norms[:dead] = 0
    curve = calibrated(layer, hidden)
    assert (curve[: 1 + 10 * dead // 12] == 0).all()
    assert (curve.max() > 0) == (dead < 24)
    check_gated_layer(layer, hidden)
    layer.set_sparsity(0.0)
    assert torch.equal(dropped(hidden, layer.tau), (torch.arange(24) < dead).expand(4, 60, -1))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_scores_of_any_size_have_finite_thresholds(scale):
    layer, hidden = gated_layer(), randn(3, 4, 60, 24) * scale
    calibrated(layer, hidden)
    check_gated_layer(layer, hidden)


def zero(name: str, rows: slice = slice(None)) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if name in key:
                tensor[rows] = 0

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        zero("up_proj", slice(16, 64)),  # half of what enters down_proj is zero: an expert that nothing uses
        zero("o_proj"),
        zero("mlp"),
        zero("input_layernorm"),
        zero("norm"),
        lambda tensors: tensors["model.embed_tokens.weight"].fill_(1.0),  # every token is the same
    ],
    ids=["a dead block", "a dead projection", "a dead mlp", "dead inputs", "dead logits", "a constant embedding"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_which_parts_are_dead_converts_and_computes(dtype, change, tmp_path):
    source = make_model("llama", tmp_path / "source", dtype)
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    wina_convert.convert(str(source), tmp_path / "out", samples=8, seq_len=32, basis="none")
    curves = {name: t for name, t in tensors_of(tmp_path / "out").items() if name.endswith(".thresholds")}
    assert len(curves) == 14
    for name, curve in curves.items():
        assert curve.isfinite().all(), name
        assert (curve.diff() >= 0).all(), name
    tokens = torch.randint(2, 2048, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    model = wina_convert.load(str(tmp_path / "out"), sparsity=0.0)
    # Skipping what is zero costs nothing; in bfloat16 sums are rounded in another order.
    loose = 1e-5 if dtype is torch.float32 else 0.05
    assert (logits(model, tokens) - expected).norm() <= loose * expected.norm()
    for sparsity in (0.5, 0.95):
        wina_convert.set_sparsity(model, sparsity)
        assert logits(model, tokens).isfinite().all()
        assert logits(model, tokens[:, :3]).isfinite().all()
