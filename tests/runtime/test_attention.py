"""Attention of a gated model on a CPU against transformers' own and a float64 reference."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.families import FAMILIES, random_weights
from wina_convert import load
from wina_convert.runtime import attention
from wina_convert.runtime.kernels import attend, cpu, streaming

HALF = [torch.bfloat16, torch.float16]
MASKS = ["none", "boolean", "float"]
SHAPES = [  # batch, heads, heads of keys, queries, keys
    (1, 4, 4, 1, 9),
    (1, 8, 2, 1, 33),
    (2, 8, 2, 7, 7),
    (2, 6, 1, 5, 12),
    (3, 4, 2, 1, 1),
]


def problem(seed: int, shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of an attention function; every query may look at some key."""
    batch, heads, kv_heads, queries, keys = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // kv_heads, True
    setattr(module, attention.MARK, True)
    allowed = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
    allowed[..., 0] = True
    masks = {
        "none": None,
        "boolean": allowed,
        "a float a head": randn(batch, heads, queries, keys),
        "float": randn(batch, 1, queries, keys).masked_fill(~allowed, torch.finfo(dtype).min),
    }
    query, key, value = (
        randn(batch, heads, queries, 16),
        randn(batch, kv_heads, keys, 16),
        randn(batch, kv_heads, keys, 16),
    )
    tensors = {"query": query, "key": key, "value": value, "attention_mask": masks[mask]}
    return {"module": module, "scaling": 0.3, **tensors}


def otherwise(shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> bool:
    """Whether a token is computed by the compiled kernel or as several, so that sums may be made in another order."""
    _, heads, kv_heads, queries, _ = shape
    return queries == 1 and (mask == "none" or heads > kv_heads or dtype in HALF)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def exact(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float) -> Tensor:
    """[batch, queries, heads, size] in float64."""
    key, value = (t.double().repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = scaling * query.double() @ key.transpose(-1, -2)
    queries, keys = scores.shape[-2:]
    if attention_mask is None and queries > 1:  # a prefill: the first queries and the first keys
        attention_mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if attention_mask is not None:
        hidden = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if hidden else scores + attention_mask.double()
    return (scores.softmax(-1) @ value).transpose(1, 2)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from(MASKS), st.sampled_from(HALF))
@settings(deadline=None)
def test_half_precision_is_the_attention_in_float32_rounded_once(seed, shape, mask, dtype):
    arguments = problem(seed, shape, mask, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "multiplies", lambda dtype: False)
        output, weights = attention.attention(**arguments)
    assert weights is None
    assert output.dtype == dtype
    if not otherwise(shape, mask, torch.float32):
        assert torch.equal(output, sdpa_attention_forward(**widened(arguments))[0].to(dtype))
    expected = exact(**arguments)
    assert output.shape == expected.shape
    assert ((output.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("dtype", "instructions"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, True)],
)
def test_in_float32_and_with_instructions_for_half_precision_it_is_the_one_of_transformers(
    dtype, instructions, mask, shape, monkeypatch
):
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: instructions)
    arguments = problem(0, shape, mask, dtype)
    output, weights = attention.attention(**arguments)
    assert weights is None
    assert output.dtype == dtype
    expected = sdpa_attention_forward(**arguments)[0]
    close = 8 * torch.finfo(dtype).eps if otherwise(shape, mask, dtype) else 0.0
    torch.testing.assert_close(output, expected, rtol=close, atol=close)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    keys=st.integers(1, 70),
    mask=st.sampled_from(["boolean", "float", "a float a head"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_a_token_under_a_mask_is_computed_as_several(seed, batch, kv_heads, group, keys, mask, dtype):
    arguments = problem(seed, (batch, kv_heads * group, kv_heads, 1, keys), mask, dtype)
    shapes: list[torch.Size] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shapes.extend((query.shape, key.shape))
        return scaled_dot_product_attention(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "multiplies", lambda dtype: True)
        patch.setattr(attention, "scaled_dot_product_attention", watched)
        output, weights = attention.attention(**arguments)
    if group > 1 or dtype in HALF:
        assert shapes == [(batch, kv_heads, max(group, 2), 16), (batch, kv_heads, keys, 16)]
    assert weights is None
    expected = exact(**arguments)
    assert output.shape == expected.shape
    assert ((output.double() - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*[st.integers(1, most) for most in (3, 4, 70, 80, 80)]),
    group=st.sampled_from([1, 3, 4]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, *HALF]),
    room=st.integers(0, 5),
)
@settings(deadline=None)
def test_the_compiled_attention_is_the_definition_however_the_keys_lie(seed, sizes, group, scale, dtype, room):
    batch, kv_heads, keys, size, width = sizes
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, 1, size, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, keys + room, size, generator=generator).to(dtype)[:, :, :keys]
    value = torch.randn(batch, kv_heads, keys + room, width, generator=generator).to(dtype)[:, :, :keys]
    found = attend(query, key, value, scale)
    module = SimpleNamespace(num_key_value_groups=group)
    expected = exact(module, query, key, value, None, scale)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    # a score of n terms is rounded n times, each time by the size of what is summed, and its exponential by as much
    rounding = torch.finfo(torch.float32).eps * (8 + scale * size * 8)
    bound = torch.finfo(dtype).eps * expected.abs() + rounding * value.double().abs().max() + 1e-7
    assert ((found.double() - expected).abs() <= bound).all()
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2), value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(query, *transposed, scale), found)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with mock.patch.object(streaming, "GRAIN", 1):  # a few keys are divided among the threads too
            assert torch.equal(attend(query, key, value, scale), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_nan_is_seen_in_the_heads_that_it_reaches(where: str, dtype: torch.dtype):
    tensors = {"query": torch.randn(1, 8, 1, 64), "key": torch.randn(1, 4, 33, 64), "value": torch.randn(1, 4, 33, 64)}
    tensors[where][0, 2, 0, 3] = torch.nan
    found = attend(*(tensor.to(dtype) for tensor in tensors.values()), 0.1)[0, 0].isnan()
    expected = torch.zeros(8, 64, dtype=torch.bool)
    expected[{"query": slice(2, 3)}.get(where, slice(4, 6)), 3 if where == "value" else slice(None)] = True
    assert torch.equal(found, expected)


def test_a_gradient_passes_the_attention_of_a_token():
    arguments = problem(0, SHAPES[1], "none", torch.float32)
    arguments["query"].requires_grad_()
    output = attention.attention(**arguments)[0]
    output.sum().backward()
    assert arguments["query"].grad.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(attention.attention(**arguments)[0], output, rtol=1e-5, atol=1e-5)


def test_more_heads_than_the_kernel_has_code_for_share_keys():
    arguments = problem(0, (1, 34, 2, 1, 40), "none", torch.float32)
    torch.testing.assert_close(attention.attention(**arguments)[0], exact(**arguments).float(), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_together_is_refused_before_memory_is_read():
    query, key, value = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 24)
    for wrong in (
        (query[..., :8], key, value),
        (query[:, :3], key, value),
        (query.expand(1, 4, 2, 16), key, value),
        (query, key[:, :, :8], value),
        (query, key, value.bfloat16()),
    ):
        with pytest.raises(ValueError, match="are needed"):
            streaming.attend(*wrong, 0.25)


@pytest.mark.parametrize("narrow", ["query", "key", "value"])
def test_tensors_of_several_dtypes_are_left_to_torch(narrow: str):
    """Under autocast torch casts them."""
    arguments = problem(0, SHAPES[1], "none", torch.float32)
    expected = exact(**arguments).float()
    arguments[narrow] = arguments[narrow].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attention(**arguments)[0]
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_the_op_keeps_what_torch_asks_of_one():
    tensors = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 24)
    torch.library.opcheck(torch.ops.wina.attend.default, (*tensors, 0.25))


def test_a_bias_by_position_is_left_to_transformers():
    arguments = problem(3, (1, 8, 2, 1, 33), "none", torch.float32)
    arguments["position_bias"] = torch.randn(1, 8, 1, 33)
    assert torch.equal(attention.attention(**arguments)[0], sdpa_attention_forward(**arguments)[0])


@pytest.mark.parametrize("mask", MASKS)
def test_the_arguments_stay_as_they_are(mask):
    arguments, before = problem(1, SHAPES[2], mask, torch.bfloat16), problem(1, SHAPES[2], mask, torch.bfloat16)
    attention.attention(**arguments)[0].zero_()
    for name in ("query", "key", "value", "attention_mask"):
        assert arguments[name] is before[name] is None or torch.equal(arguments[name], before[name])


def make(implementation: str, dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    """A model of a family whose several queries share a key."""
    fields = dict(FAMILIES[family])
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    random_weights(model, 0)
    return model.to(dtype).eval()


def logits(model: Any) -> list[Tensor]:
    """Of a batch of which one text is padded on the left, and of a token after it."""
    tokens = torch.arange(18).view(2, 9) + 3
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad():
        first = model(tokens, attention_mask=mask, use_cache=True)
        mask = torch.cat([mask, mask[:, -1:]], 1)
        then = model(tokens[:, :1], attention_mask=mask, past_key_values=first.past_key_values)
    return [first.logits[0, 4:], first.logits[1], then.logits]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_a_model_switched_over_answers_as_before(family):
    model = make("sdpa", family=family)
    before = logits(model)
    attention.use(model)
    assert model.config._attn_implementation == "sdpa"  # the name that transformers knows
    *prompts, token = logits(model)
    torch.testing.assert_close(prompts, before[:2], rtol=0, atol=0)
    close = 0 if family == "gpt2" else 1e-5  # where heads share keys, the token's sums are made in another order
    torch.testing.assert_close(token, before[2], rtol=close, atol=close)


def test_every_layer_of_a_model_switched_over_asks_whether_the_processor_has_the_instructions(monkeypatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: asked.append(dtype))
    model = make("sdpa", torch.bfloat16)
    before = logits(model)
    assert asked == []
    attention.use(model)
    for found, expected in zip(logits(model), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert asked == [torch.bfloat16] * 2 * model.config.num_hidden_layers
    attention.use(model, False)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert asked == [torch.bfloat16] * 2 * model.config.num_hidden_layers


def test_a_model_with_another_attention_keeps_it():
    model = make("eager")
    before = logits(model)
    attention.use(model)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(("asked_for", "used"), [(None, True), ("sdpa", False), ("eager", False)])
def test_an_attention_that_was_asked_for_is_not_replaced(asked_for, used, wina_tiny):
    chosen = {} if asked_for is None else {"attn_implementation": asked_for}
    model = load(str(wina_tiny), **chosen)
    assert model.config._attn_implementation == (asked_for or "sdpa")
    assert getattr(model.model.layers[0].self_attn, attention.MARK) is used


def test_a_paged_cache_gets_keys_and_values_as_they_are(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    seen = []
    monkeypatch.setattr(
        attention, "before", lambda module, *args, **kwargs: (seen.append((args, kwargs)), (args[0], None))[1]
    )
    arguments = problem(0, SHAPES[0], "none", torch.bfloat16)
    attention.attention(**arguments, cache="paged")
    assert [tensor.dtype for tensor in seen[0][0][:3]] == [torch.bfloat16] * 3
    assert seen[0][1]["cache"] == "paged"


@pytest.mark.parametrize("chosen", [{}, {"attn_implementation": "sdpa"}, {"dtype": torch.bfloat16}])
def test_continuous_batching_generates_what_generate_does(chosen, wina_tiny):
    model = load(str(wina_tiny), **chosen)
    prompts = [[5, 9, 200, 31, 7], [44, 3, 90]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else the masks are for as much as memory holds
    outputs = model.generate_batch(prompts, settings, room, progress_bar=False)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        if model.dtype == torch.float32:
            expected = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :]
            assert output.generated_tokens == expected.tolist()
        with torch.no_grad():  # in bfloat16 another order of sums may decide between two tokens
            scores = model(torch.tensor([prompt + output.generated_tokens])).logits[0, len(prompt) - 1 : -1]
        taken = scores.gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
        assert (scores.amax(1) - taken < 0.1).all()
