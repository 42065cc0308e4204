"""WinaLinear and DenseLinear: the modules in a loaded model."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wina_convert.runtime import linear
from wina_convert.runtime.linear import DenseLinear, WinaLinear, gated_modules

GRID = (0.0, 0.25, 0.5, 0.95)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = ("column_norms", "thresholds", "tau")


def make(dtype: torch.dtype = torch.float32, bias: bool = True, n_in: int = 24, n_out: int = 10) -> WinaLinear:
    generator = torch.Generator().manual_seed(n_in)
    gate = WinaLinear(n_in, n_out, GRID, bias, dtype)
    weight_t = torch.randn(n_in, n_out, generator=generator).to(dtype)
    thresholds = torch.tensor([0.0, 1.0, 2.123456789, 4.0])
    norms = weight_t.double().square().sum(1).sqrt().float()
    values = {"weight_t": weight_t, "column_norms": norms, "thresholds": thresholds}
    if bias:
        values["bias"] = torch.randn(n_out, generator=generator).to(dtype)
    gate.load_state_dict(values)
    return gate


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(gate: WinaLinear, x: Tensor, threshold: float) -> Tensor:
    """The gated product in float64."""
    weight = gate.weight_t.double()
    score = x.double().abs() * weight.square().sum(1).sqrt()
    return (x.double() * (score > threshold)) @ weight + gate.bias.double()


@given(st.floats(0, 0.95))
@settings(deadline=None)
def test_the_sparsity_chooses_the_threshold_between_the_stored_ones(sparsity):
    gate = make()
    gate.set_sparsity(sparsity)
    points = list(zip(GRID, [0.0, 1.0, 2.123456789, 4.0], strict=True))
    (s0, t0), (s1, t1) = next(pair for pair in pairwise(points) if sparsity <= pair[1][0])
    threshold = t0 + (t1 - t0) * (sparsity - s0) / (s1 - s0)
    assert gate.sparsity == sparsity
    torch.testing.assert_close(gate.tau.double(), threshold / gate.column_norms.double(), rtol=1e-5, atol=1e-7)
    x = inputs(3, 24)
    score = x.double().abs() * gate.column_norms.double()
    assume(((score - threshold).abs() > 1e-5 * threshold).all())  # no tie up to rounding
    torch.testing.assert_close(gate(x).double(), expected(gate, x, threshold), rtol=1e-5, atol=1e-5)


def test_the_sparsity_can_be_changed_again_and_again():
    gate, x = make(), inputs(2, 24)
    found = {}
    for sparsity in (0.5, 0.0, 0.95, 0.5, 0.0):
        gate.set_sparsity(sparsity)
        assert torch.equal(found.setdefault(sparsity, gate(x)), gate(x))
    torch.testing.assert_close(found[0.0], nn.functional.linear(x, gate.weight, gate.bias))
    assert not torch.equal(found[0.5], found[0.0])


def test_before_any_sparsity_is_set_nothing_is_skipped():
    gate, x = make(), inputs(2, 24)
    assert gate.tau is None
    torch.testing.assert_close(gate(x), nn.functional.linear(x, gate.weight, gate.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_at_sparsity_zero_it_is_the_linear_layer_it_replaces(bias, dtype):
    gate, x = make(dtype, bias), inputs(2, 5, 24, dtype=dtype)
    gate.set_sparsity(0.0)
    plain = nn.Linear(24, 10, bias, dtype=dtype)
    plain.load_state_dict({"weight": gate.weight} | ({"bias": gate.bias} if bias else {}))
    torch.testing.assert_close(gate(x), plain(x))


@pytest.mark.parametrize("shape", [(7, 24), (1, 7, 24), (3, 7, 24), (2, 3, 7, 24)])
@pytest.mark.parametrize("sparsity", [0.25, 0.95])
def test_dense_prefill_skips_nothing_where_a_call_brings_several_tokens(shape, sparsity):
    gate, x = make(), inputs(*shape)
    gate.set_sparsity(sparsity)
    assert not torch.allclose(gate(x), nn.functional.linear(x, gate.weight, gate.bias))
    gate.dense_prefill = True
    torch.testing.assert_close(gate(x), nn.functional.linear(x, gate.weight, gate.bias))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (5, 1, 24)])
def test_dense_prefill_gates_where_a_call_brings_one_token_a_sequence(shape):
    gate, x = make(), inputs(*shape)
    gate.set_sparsity(0.5)
    gated = gate(x)
    gate.dense_prefill = True
    assert torch.equal(gate(x), gated)
    torch.testing.assert_close(gated.double(), expected(gate, x, 2.123456789), rtol=1e-5, atol=1e-5)


def test_gated_prefill_is_the_same_function_as_decoding_token_by_token():
    gate, x = make(), inputs(2, 7, 24)
    gate.set_sparsity(0.5)
    one_by_one = torch.cat([gate(x[:, t : t + 1]) for t in range(7)], 1)
    torch.testing.assert_close(gate(x), one_by_one)


@pytest.mark.parametrize(
    "cast",
    [
        lambda gate: gate.to(torch.bfloat16),
        lambda gate: gate.to(torch.float16),
        lambda gate: gate.half(),
        lambda gate: gate.bfloat16(),
        lambda gate: gate.to("cpu", torch.float16),
        lambda gate: nn.Sequential(gate).half()[0],
        lambda gate: gate.double(),
        lambda gate: gate.half().float(),
    ],
    ids=["to-bfloat16", "to-float16", "half", "bfloat16", "to-device-dtype", "in-a-model", "double", "there-and-back"],
)
def test_a_cast_changes_the_weight_and_leaves_norms_thresholds_and_cutoffs_alone(cast):
    gate = make()
    gate.set_sparsity(0.5)
    before = copy.deepcopy(gate)
    weight = nn.Linear(1, 1)
    weight.weight, weight.bias = nn.Parameter(gate.weight_t.clone()), nn.Parameter(gate.bias.clone())
    plain = cast(weight)  # what the cast does to any module
    after = cast(gate)
    assert torch.equal(after.weight_t, plain.weight)
    assert torch.equal(after.bias, plain.bias)
    assert after.weight_t.dtype == plain.weight.dtype
    for name in EXACT:
        assert getattr(after, name).dtype == torch.float32
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert isinstance(after.column_norms, nn.Parameter)
    assert not after.column_norms.requires_grad


def test_a_cast_to_half_before_a_sparsity_is_set_keeps_the_norms():
    gate = make()
    norms, thresholds = gate.column_norms.clone(), gate.thresholds.clone()
    gate.half()
    assert torch.equal(gate.column_norms, norms)
    assert torch.equal(gate.thresholds, thresholds)
    assert gate.tau is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_module_computes_in_its_new_dtype(dtype):
    gate = make()
    gate.set_sparsity(0.5)
    x = inputs(3, 24, dtype=dtype)
    y = gate.to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), expected_with_norms(gate, x), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )


def expected_with_norms(gate: WinaLinear, x: Tensor) -> Tensor:
    keep = x.double().abs() * gate.column_norms.double() > 2.123456789
    return (x.double() * keep) @ gate.weight_t.double() + gate.bias.double()


def test_weight_is_a_view_of_the_stored_transpose():
    gate = make()
    assert gate.weight.shape == (10, 24)
    assert torch.equal(gate.weight, gate.weight_t.t())
    assert gate.weight.data_ptr() == gate.weight_t.data_ptr()
    assert gate.weight_t.is_contiguous()


def test_a_loaded_weight_is_not_initialised_anew_through_the_view():
    gate = make()
    assert not hasattr(gate.weight, "_is_hf_initialized")
    gate.weight_t._is_hf_initialized = True
    assert gate.weight._is_hf_initialized


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_holds_the_stored_tensors_and_nothing_else(bias):
    gate = make(bias=bias)
    keys = ["weight_t", "column_norms", "thresholds", *(["bias"] if bias else [])]
    assert list(gate.state_dict()) == keys
    gate.set_sparsity(0.5)
    assert list(gate.state_dict()) == keys


def test_nothing_is_trainable():
    assert not any(parameter.requires_grad for parameter in make().parameters())


def test_a_copy_is_independent_and_equal():
    gate, x = make(), inputs(3, 24)
    gate.set_sparsity(0.5)
    gate.dense_prefill = True
    before = gate(x), gate(x[:1])
    twin = copy.deepcopy(gate)
    assert torch.equal(twin(x), before[0])
    assert torch.equal(twin(x[:1]), before[1])
    twin.set_sparsity(0.0)
    with torch.no_grad():
        twin.weight_t.zero_()
    assert torch.equal(gate(x[:1]), before[1])


def test_it_can_be_built_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        gate = WinaLinear(24, 10, GRID, bias=True, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in gate.parameters())
    assert gate.weight_t.dtype == gate.bias.dtype == torch.bfloat16
    assert gate.column_norms.dtype == gate.thresholds.dtype == torch.float32
    gate.set_sparsity(0.5)
    assert gate.tau is None  # nothing to compute it from
    assert gate(torch.empty(2, 3, 24, dtype=torch.bfloat16, device="meta")).shape == (2, 3, 10)
    filled = make(torch.bfloat16)
    gate.load_state_dict(filled.state_dict(), assign=True)
    filled.set_sparsity(0.5)
    x = inputs(3, 24, dtype=torch.bfloat16)
    assert torch.equal(gate(x), filled(x))


def test_moving_an_empty_module_to_a_device_keeps_the_dtypes():
    gate = WinaLinear(24, 10, GRID, bias=True, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    assert gate.weight_t.dtype == torch.bfloat16
    assert gate.column_norms.dtype == gate.thresholds.dtype == torch.float32
    assert not any(parameter.is_meta for parameter in gate.parameters())


def test_its_text_says_what_it_is():
    gate = make()
    gate.set_sparsity(0.4)
    assert repr(gate) == "WinaLinear(in_features=24, out_features=10, bias=True, sparsity=0.4)"
    assert "bias=False" in repr(make(bias=False))


def test_gated_modules_are_found_by_name_in_order():
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Sequential(make(), nn.ReLU()))
    assert list(gated_modules(model)) == ["1", "2.0"]
    assert gated_modules(model)["1"] is model[1]


@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_the_fraction_skipped_grows_with_the_sparsity(seed, dtype):
    gate = make(dtype)
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    skipped = []
    for sparsity in (0.0, 0.1, 0.25, 0.4, 0.6, 0.95):
        gate.set_sparsity(sparsity)
        skipped.append((x.float().abs() <= gate.tau).sum().item())
    assert skipped == sorted(skipped)


def twins(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, DenseLinear]:
    """An nn.Linear, and a DenseLinear that was made of its equal."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = nn.Linear(24, 10, bias, dtype=dtype)
    dense = copy.deepcopy(plain)
    dense.__class__ = DenseLinear
    return plain, dense


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (8, 24), (9, 24), (2, 4, 24), (2, 1, 7, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_module_is_the_linear_layer_it_was(bias, shape, dtype):
    plain, dense = twins(dtype, bias)
    x = inputs(*shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), plain(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, True), (True, False), (False, True)])
def test_a_dense_module_gives_the_gradients_of_a_linear_layer(x_grad, weight_grad, rows, dtype):
    results = []
    for module in twins(dtype):
        x = inputs(rows, 24, dtype=dtype).requires_grad_(x_grad)
        module.requires_grad_(weight_grad)
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in (x, module.weight, module.bias) if t.requires_grad)])
    assert len(results[1]) == 1 + x_grad + 2 * weight_grad
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_dense_module_takes_the_fast_product_only_where_no_gradient_is_wanted(enabled, frozen, monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "dense_linear", lambda *args: calls.append(args) or nn.functional.linear(*args))
    plain, dense = twins()
    x = inputs(2, 24)
    with torch.set_grad_enabled(enabled):
        y = dense.requires_grad_(not frozen)(x)
    assert len(calls) == (frozen or not enabled)
    assert torch.equal(y, plain(x))


def test_a_dense_module_is_stored_and_loaded_as_a_linear_layer():
    plain, _ = twins()
    dense = DenseLinear(24, 10)
    assert list(dense.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    dense.load_state_dict(plain.state_dict())
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert DenseLinear(24, 10, device="meta")(torch.empty(2, 24, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("rows", [2, 20])
def test_a_dense_module_refuses_what_a_linear_layer_refuses(rows):
    _, dense = twins()
    with torch.no_grad():
        for x in (inputs(rows, 24, dtype=torch.float64), inputs(rows, 24, dtype=torch.bfloat16), inputs(rows, 23)):
            with pytest.raises((RuntimeError, ValueError)):
                dense(x)


@pytest.mark.parametrize("rows", [2, 20])
def test_under_autocast_a_float32_projection_stays_float32_and_gradients_flow(rows):
    gate = make()
    gate.set_sparsity(0.5)
    x = inputs(rows, gate.in_features)
    expected = gate(x.requires_grad_())
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert gradient.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        y = gate(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("rows", [2, 20])
def test_a_dense_layer_follows_autocast_like_a_plain_one(rows):
    dense, plain = DenseLinear(24, 10).requires_grad_(False), torch.nn.Linear(24, 10).requires_grad_(False)
    plain.load_state_dict(dense.state_dict())
    x = inputs(rows, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense(x), plain(x))


def test_a_trainable_bias_of_a_dense_layer_gets_its_gradient():
    dense = DenseLinear(24, 10).requires_grad_(False)
    dense.bias.requires_grad_(True)
    dense(inputs(2, 24)).sum().backward()
    assert torch.equal(dense.bias.grad, torch.full((10,), 2.0))
