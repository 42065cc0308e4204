"""Biases along the sparsity: what a module adds at each sparsity, and that a model with them loads, saves and changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import wina_convert
from support.folders import bias_of, tensors_of, write_biases
from support.loaded import PROMPT, equal, greedy, logits
from wina_convert.errors import CheckpointError, VerificationError
from wina_convert.format.manifest import write_manifest
from wina_convert.runtime.linear import WinaLinear, gated_modules
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

MODEL = "three layers"
GRID = (0.0, 0.3, 0.8, 0.95)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32, bias: bool = True, biases: bool = True) -> WinaLinear:
    """24 inputs and 10 outputs, random."""
    generator = torch.Generator().manual_seed(0)
    gate = WinaLinear(24, 10, GRID, bias, dtype, biases=biases)
    made = {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in gate.state_dict().items()}
    made["column_norms"] = made["weight_t"].float().norm(dim=1)
    made["thresholds"] = torch.tensor([0.0, 1.0, 2.5, 4.0])
    if biases:
        made["biases"][0] = 0
    gate.load_state_dict(made)
    return gate


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def added(gate: WinaLinear, sparsity: float) -> Tensor:
    """The bias [out] in float64, linear between its points."""
    assert gate.biases is not None
    shift = torch.tensor([np.interp(sparsity, GRID, column) for column in gate.biases.double().t().numpy()])
    return shift if gate.bias is None else shift + gate.bias.double()


@given(st.floats(0, 0.95), st.booleans(), st.sampled_from(DTYPES))
@settings(deadline=None)
def test_a_module_adds_the_bias_of_its_sparsity(sparsity: float, bias: bool, dtype: torch.dtype):
    gate, x = make(dtype, bias), inputs(3, 24, dtype=dtype)
    gate.set_sparsity(sparsity)
    kept = x.double() * (x.float().abs() > gate.tau)
    expected = kept @ gate.weight_t.double() + added(gate, sparsity)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(gate(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_at_sparsity_zero_it_is_the_module_without_them_bit_for_bit(bias: bool, dtype: torch.dtype):
    gate, plain, x = make(dtype, bias), make(dtype, bias, biases=False), inputs(9, 24, dtype=dtype)
    plain.load_state_dict({name: t for name, t in gate.state_dict().items() if name != "biases"})
    for module in (gate, plain):
        module.set_sparsity(0.0)
    assert gate.shifted is None
    assert torch.equal(gate(x), plain(x))
    gate.set_sparsity(0.3)
    plain.set_sparsity(0.3)
    assert not torch.allclose(gate(x), plain(x))


def test_the_sparsity_can_be_changed_again_and_again():
    gate, x, found = make(bias=False), inputs(2, 24), {}
    for sparsity in (0.5, 0.0, 0.95, 0.5, 0.0):
        gate.set_sparsity(sparsity)
        assert torch.equal(found.setdefault(sparsity, gate(x)), gate(x))


def test_a_threshold_of_its_own_comes_with_the_bias_of_a_sparsity():
    gate, x = make(), torch.zeros(1, 24)
    gate.set_threshold(1.0, 0.5)
    torch.testing.assert_close(gate(x)[0].double(), added(gate, 0.5), rtol=1e-6, atol=1e-6)
    gate.set_threshold(0.0)
    assert torch.equal(gate(x)[0], gate.bias)


def test_dense_prefill_adds_none_where_a_call_brings_several_tokens():
    gate, x = make(), inputs(5, 24)
    gate.dense_prefill = True
    gate.set_sparsity(0.5)
    torch.testing.assert_close(gate(x), x @ gate.weight_t + gate.bias)
    torch.testing.assert_close(gate(torch.zeros(1, 24))[0].double(), added(gate, 0.5), rtol=1e-6, atol=1e-6)


def test_what_was_computed_for_a_sparsity_can_be_forgotten():
    gate, x = make(), inputs(3, 24)
    gate.set_sparsity(0.5)
    before = gate(x)
    gate.forget_threshold()
    assert gate.tau is gate.shifted is None
    assert torch.equal(gate(x), before)


def test_a_module_on_the_meta_device_is_filled_later():
    with torch.device("meta"):
        gate = WinaLinear(24, 10, GRID, True, torch.bfloat16, biases=True)
    gate.set_sparsity(0.5)
    filled, x = make(torch.bfloat16), inputs(3, 24, dtype=torch.bfloat16)
    gate.load_state_dict(filled.state_dict(), assign=True)
    filled.set_sparsity(0.5)
    assert torch.equal(gate(x), filled(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_they_stay_exact_when_the_module_is_cast(dtype: torch.dtype):
    gate = make()
    before = gate.biases.clone()
    gate.set_sparsity(0.5)
    gate.to(dtype)
    assert torch.equal(gate.biases, before)
    assert gate.biases.dtype == torch.float32
    assert gate.shifted.dtype == dtype
    torch.testing.assert_close(gate.shifted.double(), added(gate, 0.5), rtol=0.01, atol=0.01)


def test_siblings_in_one_call_add_their_own():
    first, second, x = make(), make(bias=False), inputs(2, 24)
    for gate in (first, second):
        gate.set_sparsity(0.5)
    alone = [gate(x) for gate in (first, second)]
    first.siblings = (second,)
    assert all(torch.equal(gate(x), expected) for gate, expected in zip((first, second), alone, strict=True))


# --- models ---


@pytest.fixture
def biased(copied: Path) -> Path:
    write_biases(copied, 0.1)
    write_manifest(copied)
    return copied


def test_a_model_with_biases_is_dense_at_sparsity_zero_and_adds_them_elsewhere(biased: Path, converted: Path):
    gated, plain = wina_convert.load(str(biased), sparsity=0.0), wina_convert.load(str(converted), sparsity=0.0)
    assert torch.equal(logits(gated), logits(plain))
    stored = tensors_of(biased)
    wina_convert.set_sparsity(gated, 0.6)
    for name, gate in gated_modules(gated).items():
        y = gate(torch.zeros(1, gate.in_features, dtype=gate.weight_t.dtype))[0]
        expected = bias_of(biased, stored[f"{name}.biases"], 0.6)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loading", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_a_model_with_biases_loads_however_it_is_asked(biased: Path, loading: dict[str, Any]):
    model = AutoModelForCausalLM.from_pretrained(biased, **loading)
    stored = tensors_of(biased)
    for name, gate in gated_modules(model).items():
        assert torch.equal(gate.biases, stored[f"{name}.biases"])
    assert greedy(model).shape == (1, 12)


def test_a_saved_model_keeps_them(biased: Path, tmp_path: Path):
    model = wina_convert.load(str(biased))
    model.save_pretrained(tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(biased))
    assert torch.equal(logits(wina_convert.load(str(tmp_path / "again"))), logits(model, PROMPT))


def test_another_sparsity_takes_the_same_numbers_from_the_file_and_from_the_call(biased: Path):
    model = wina_convert.load(str(biased), sparsity=0.4)
    retarget(biased, 0.4)
    assert torch.equal(logits(wina_convert.load(str(biased))), logits(model))


def test_verify_looks_at_them(biased: Path):
    verify_folder(biased)
    write_biases(biased, float("inf"))
    write_manifest(biased)
    with pytest.raises(VerificationError, match="are not finite and 0 at sparsity 0"):
        verify_folder(biased)
    with pytest.raises(CheckpointError, match="biases not finite from 0"):
        wina_convert.load(str(biased))
