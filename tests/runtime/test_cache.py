"""The growing cache of a gated model against transformers' own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from wina_convert import load
from wina_convert.runtime import cache as module
from wina_convert.runtime.cache import ROOM, RoomyLayer

MODEL = "three layers"
MODES = {"no grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


def states(generator: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(batch, 2, length, 3, generator=generator)


def held(layer: Any) -> list[Tensor]:
    return [layer.keys, layer.values]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "append", "crop", "reorder", "repeat", "select", "copy", "share"]),
            st.integers(1, 5),
            st.sampled_from(list(MODES)),
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([1, 3, ROOM]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_to_it_it_holds_what_transformers_would_and_changes_nothing_it_gave(seed, steps, room):
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[Any, Any]] = [(DynamicLayer(), RoomyLayer())]
    given: list[tuple[Tensor, Tensor]] = []  # with what they were when they were given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROOM", room)
        for action, number, mode in steps:
            plain, roomy = pairs[number % len(pairs)]
            batch = plain.keys.shape[0] if plain.is_initialized else 2
            new = states(generator, batch, number)
            with MODES[mode]():
                for layer in (plain, roomy):
                    if action == "append":
                        layer.update(*new)
                    elif action == "crop" and layer.get_seq_length() > number:
                        layer.crop(-number)
                    elif action == "reorder":
                        layer.reorder_cache(torch.arange(batch).flip(0))
                    elif action == "repeat" and batch < 8:
                        layer.batch_repeat_interleave(2)
                    elif action == "select" and batch > 1:
                        layer.batch_select_indices(torch.arange(batch - 1))
                if action in ("copy", "share"):
                    pairs.append(
                        tuple((copy.deepcopy if action == "copy" else copy.copy)(one) for one in (plain, roomy))
                    )
            for before, kept in given:
                assert torch.equal(before, kept)
            for one, other in pairs:
                assert one.get_seq_length() == other.get_seq_length()
                if one.is_initialized:
                    assert all(torch.equal(a, b) for a, b in zip(held(one), held(other), strict=True))
                    given += [(tensor, tensor.clone()) for tensor in held(other)]


def test_tokens_are_written_behind_the_others_until_the_room_is_used_up():
    generator, layer = torch.Generator().manual_seed(0), RoomyLayer()
    with torch.no_grad():
        layer.update(*states(generator, 1, 10))
        layer.update(*states(generator, 1, 1))
        places = [tensor.data_ptr() for tensor in held(layer)]
        for _ in range(ROOM):
            layer.update(*states(generator, 1, 1))
            assert [tensor.data_ptr() for tensor in held(layer)] == places
        layer.update(*states(generator, 1, 1))
    assert all(tensor.data_ptr() != place for tensor, place in zip(held(layer), places, strict=True))


def test_a_gradient_passes_what_was_kept_when_more_has_come():
    layer, generator = RoomyLayer(), torch.Generator().manual_seed(0)
    query, losses, expected = torch.ones(4, requires_grad=True), [], torch.zeros(4)
    for _ in range(3):  # the keys need no gradient, but that of the query needs the keys as they were
        keys, _ = layer.update(*states(generator, 1, 2))
        losses.append((keys * query).sum())
        expected += keys.sum((0, 1, 2))
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(query.grad, expected)


def kinds(cache: DynamicCache) -> set[type]:
    return {type(layer) for layer in cache.layers}


@torch.no_grad()
def test_a_gated_model_keeps_its_past_in_it_and_a_dense_one_does_not(converted: Path, source: Path):
    tokens = torch.tensor([[5, 6, 7, 8]])
    for folder, kind in ((converted, RoomyLayer), (source, DynamicLayer)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for cache in (DynamicCache(config=model.config), DynamicCache()):
            whole = model(tokens).logits
            parts = [model(token[None], past_key_values=cache).logits for token in tokens[0, :, None]]
            assert kinds(cache) == {kind}
            torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_a_restored_model_does_not(converted: Path):
    model: Any = load(str(converted))
    model.dequantize()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6]]), past_key_values=cache)
    assert kinds(cache) == {DynamicLayer}


@torch.no_grad()
def test_other_caches_stay_as_they_are(converted: Path):
    model = load(str(converted))
    fixed = StaticCache(config=model.config, max_cache_len=8)
    before = kinds(fixed)
    model(torch.tensor([[5, 6]]), past_key_values=fixed)
    assert kinds(fixed) == before


def test_it_can_be_switched_off(converted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(module.SWITCH, "0")
    assert module._make_room not in load(str(converted))._forward_pre_hooks.values()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_generation_is_the_same_in_it(options: dict[str, Any], converted: Path, monkeypatch: pytest.MonkeyPatch):
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv(module.SWITCH, switch)
        model: Any = load(str(converted))
        found.append(model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **options))
    assert torch.equal(*found)
