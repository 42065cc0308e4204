"""The schemes: the weight of every column against a formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wina_convert.architectures import ARCHITECTURES
from wina_convert.errors import CheckpointError
from wina_convert.fitting.schemes import SCHEMES, scheme_of

KEY = "model.layers.3.self_attn.k_proj"
QUERY = "model.layers.3.self_attn.q_proj"
# Where the keys or the gate come from, by family.
KEY_OR_GATE = {
    "phi3": {"qkv_proj", "gate_up_proj"},
    "gpt_neox": {"query_key_value", "dense_h_to_4h"},
    "gpt2": {"c_attn", "c_fc"},
}


def reference(weight_t: Tensor, scheme: str, name: str) -> Tensor:
    """Column weights [in] of W^T [in, out], in float64."""
    size = weight_t.double().abs()
    norms = (size**2).sum(1).sqrt()
    ones = (size.sum(1) > 0).double()
    return {
        "wina": norms,
        "wina-paper": norms if name == KEY else ones,
        "teal": ones,
        "was": size.sum(1),
        "r-sparse": norms,
    }[scheme]


@given(seed=st.integers(0, 2**32 - 1), n_in=st.integers(1, 40), n_out=st.integers(1, 40), zeros=st.booleans())
@pytest.mark.parametrize("name", [KEY, QUERY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=10, deadline=None)
def test_column_weights_are_those_of_float64(scheme, dtype, name, seed, n_in, n_out, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight_t = torch.randn(n_in, n_out, generator=generator).to(dtype)
    if zeros:
        weight_t[torch.rand(n_in, generator=generator) < 0.3] = 0
    found = SCHEMES[scheme].column_weights(name, weight_t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(weight_t, scheme, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_column_of_zeros_weighs_0_of_either_sign_and_one_small_number_makes_it_count(scheme: str):
    weight_t = torch.zeros(3, 5)
    weight_t[1], weight_t[2, 4] = -0.0, -1e-15
    found = SCHEMES[scheme].column_weights(QUERY, weight_t)
    assert not found[:2].any()
    assert found[2] > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_column_weights_of_float16_do_not_overflow(scheme: str):
    weight_t = torch.full((2, 4), 60_000.0, dtype=torch.float16)
    expected = reference(weight_t, scheme, KEY).float()
    torch.testing.assert_close(SCHEMES[scheme].column_weights(KEY, weight_t), expected)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_paper_weights_one_matrix_of_each_block_of_every_family(family: str):
    facts = ARCHITECTURES[family]
    weight_t = torch.full((2, 9), 2.0)  # norms of 6
    found = {}
    for short in (*facts.attention, *facts.mlp):
        first, second = SCHEMES["wina-paper"].column_weights(f"{facts.layers}.11.{short}", weight_t).tolist()
        assert first == second
        found[short] = first
    expected = KEY_OR_GATE.get(family, {"k_proj", "gate_proj"})
    assert found == {short: 6 if short.rpartition(".")[2] in expected else 1 for short in found}
    assert [sum(found[short] == 6 for short in block) for block in (facts.attention, facts.mlp)] == [1, 1]


@pytest.mark.parametrize("scheme", ["nosuch", "", "WINA", "wina_paper", "r_sparse"])
def test_a_scheme_that_is_not_known_is_refused(scheme: str):
    with pytest.raises(CheckpointError, match=f"scheme in config.json is {scheme!r}, which this version does not know"):
        scheme_of(scheme)
