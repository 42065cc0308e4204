"""A loaded checkpoint: its sparsity and prefill can be chosen, and what cannot be right is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
)

from support.folders import tensors_of
from support.loaded import PROMPT, cutoffs_of, logits
from wina_convert import WinaConfig, load, set_sparsity
from wina_convert.errors import CheckpointError, OptionError
from wina_convert.runtime.linear import gated_modules

BAD = [-0.01, 0.951, 1, 40, float("nan"), float("inf"), "0.5", True, [0.5]]


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the stored quantization_config; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text("utf-8"))
    block = {**content["quantization_config"], **changes}
    content["quantization_config"] = {name: value for name, value in block.items() if value is not None}
    path.write_text(json.dumps(content), "utf-8")


# Choosing the sparsity and the prefill


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.05, 0.4, 0.425, 0.95])
def test_load_and_from_pretrained_take_another_sparsity(sparsity, wina_tiny, model):
    loaded = load(str(wina_tiny), sparsity=sparsity)
    plain = AutoModelForCausalLM.from_pretrained(wina_tiny, quantization_config=WinaConfig(sparsity=sparsity))
    changed = copy.deepcopy(model)
    set_sparsity(changed, sparsity)
    name = "model.layers.2.mlp.down_proj"
    expected = cutoffs_of(wina_tiny, name, sparsity)
    for other in (loaded, plain, changed):
        assert other.config.quantization_config.sparsity == sparsity
        assert {gate.sparsity for gate in gated_modules(other).values()} == {sparsity}
        np.testing.assert_allclose(other.get_submodule(name).tau.numpy(), expected, rtol=1e-5)
        assert torch.equal(logits(other), logits(loaded))
    assert torch.equal(logits(model), logits(load(wina_tiny)))  # the copy was changed, not the model


def test_choosing_a_sparsity_or_prefill_warns_of_nothing_whatever_the_filters(wina_tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # after the loader was imported, as a test runner or a library does it
        load(wina_tiny, sparsity=0.4, prefill="dense")
        AutoModelForCausalLM.from_pretrained(wina_tiny, quantization_config=WinaConfig(sparsity=0.4))


def test_at_sparsity_zero_the_logits_are_the_dense_models(wina_tiny, dense):
    expected = logits(dense)
    found = logits(load(wina_tiny, sparsity=0))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_default_is_the_stored_sparsity(damaged):
    edit(damaged, sparsity=0.2)
    assert load(damaged).config.quantization_config.sparsity == 0.2
    assert {gate.sparsity for gate in gated_modules(load(damaged)).values()} == {0.2}
    assert load(damaged, sparsity=0.3).model.layers[0].mlp.up_proj.sparsity == 0.3


def test_the_sparsity_can_be_changed_again_and_again(wina_tiny, model):
    changed = load(wina_tiny, sparsity=0.9)
    for sparsity in (0.0, 0.95, 0.5):
        set_sparsity(changed, sparsity)
    assert torch.equal(logits(changed), logits(model))


def test_a_chosen_sparsity_is_saved(wina_tiny, tmp_path):
    changed = load(wina_tiny, sparsity=0.3)
    set_sparsity(changed, 0.35)
    changed.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(changed))
    assert load(tmp_path).config.quantization_config.sparsity == 0.35


@pytest.mark.parametrize("bad", BAD)
def test_a_sparsity_that_cannot_be_used_is_refused(bad, wina_tiny, model):
    with pytest.raises(OptionError, match=r"sparsity is .* between 0 and 0\.95"):
        load(wina_tiny, sparsity=bad)
    with pytest.raises(OptionError, match=r"sparsity is .* between 0 and 0\.95"):
        WinaConfig(sparsity=bad)
    with pytest.raises(OptionError, match=r"sparsity is .* between 0 and 0\.95"):
        set_sparsity(model, bad)
    assert {gate.sparsity for gate in gated_modules(model).values()} == {0.5}


def test_a_sparsity_beyond_the_stored_grid_is_refused(damaged):
    stored = tensors_of(damaged)
    short = {name: tensor[:11] if name.endswith(".thresholds") else tensor for name, tensor in stored.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in short.items()}, damaged / "model.safetensors", {"format": "pt"}
    )
    edit(damaged, grid=[round(0.05 * k, 2) for k in range(11)], allocation="uniform", shares={})
    loaded = load(damaged, sparsity=0.5)
    with pytest.raises(OptionError, match=r"thresholds up to 0\.5"):
        set_sparsity(loaded, 0.6)
    with pytest.raises(OptionError, match=r"thresholds up to 0\.5"):
        load(damaged, sparsity=0.6)


def test_a_prefill_that_does_not_exist_is_refused(wina_tiny):
    with pytest.raises(OptionError, match="prefill is 'sparse'; give one of gated, dense"):
        load(wina_tiny, prefill="sparse")


@pytest.mark.parametrize("by", ["load", "from_pretrained", "config.json"])
def test_dense_prefill_computes_the_prompt_densely_and_gates_what_follows(by, damaged, model, dense):
    if by == "config.json":
        edit(damaged, prefill="dense")
        chosen = load(damaged)
    elif by == "load":
        chosen = load(damaged, prefill="dense")
    else:
        chosen = AutoModelForCausalLM.from_pretrained(damaged, quantization_config=WinaConfig(prefill="dense"))
    assert chosen.config.quantization_config.sparsity == 0.5
    torch.testing.assert_close(logits(chosen), logits(dense), rtol=0, atol=1e-4)
    with torch.no_grad():
        cache = dense(PROMPT, use_cache=True).past_key_values
        step = torch.tensor([[5]])
        expected = model(step, past_key_values=copy.deepcopy(cache)).logits  # gated, after a dense prompt
        found = chosen(step, past_key_values=chosen(PROMPT, use_cache=True).past_key_values).logits
        ungated = dense(step, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (found - ungated).abs().max() > 0.1


def test_gating_is_one_function_in_prefill_and_decode(model):
    with torch.no_grad():
        cache, steps = None, []
        for token in PROMPT[0]:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model), rtol=0, atol=1e-4)


# Refusals


def test_a_plain_model_is_refused(tiny, dense):
    with pytest.raises(CheckpointError, match="convert it first with wina-convert"):
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=WinaConfig(sparsity=0.5))
    for sparsity in (0.5, None):
        with pytest.raises(CheckpointError, match="is not a WINA checkpoint; make one with `wina-convert "):
            load(tiny, sparsity=sparsity)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has no gated projection"):
        set_sparsity(dense, 0.5)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_refused_with_the_remedy(version, damaged):
    edit(damaged, format_version=version)
    for door in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"format version {version!r}.*pip install --upgrade wina-convert"):
            door(damaged)


def test_a_field_of_the_config_that_is_not_known_is_refused(damaged):
    edit(damaged, rotation="hadamard")
    with pytest.raises(CheckpointError, match="unknown fields: rotation"):
        load(damaged)


@pytest.mark.parametrize(
    "grid", [[0.0], [0.1, 0.5], [0.0, 0.5, 0.5], [0.0, 0.5, 1.5], "0, 0.5", [0.0, "a"], [0.0] * 2000], ids=str
)
def test_a_grid_that_does_not_ascend_from_zero_is_refused(grid, damaged):
    edit(damaged, grid=grid)
    with pytest.raises(CheckpointError, match="grid"):
        load(damaged)


@pytest.mark.parametrize(
    ("name", "count"),
    [("model.layers.9.mlp.up_proj", 0), ("model.layers.0.mlp", 0), ("up_proj", 4), ("model.norm", 0)],
)
def test_a_gated_name_that_is_not_one_projection_is_refused(name, count, damaged):
    modules = json.loads((damaged / "config.json").read_text())["quantization_config"]["modules"]
    edit(damaged, modules=[*modules, name])
    with pytest.raises(CheckpointError, match=f"gates '{name}', which matches {count} linear projections"):
        AutoModelForCausalLM.from_pretrained(damaged)
    with pytest.raises(CheckpointError, match=f"gates '{name}', of which the weights have 0 tensors"):
        load(damaged)


@pytest.mark.parametrize("leaf", ["weight_t", "column_norms", "thresholds"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(leaf, damaged):
    stored = tensors_of(damaged)
    del stored[f"model.layers.1.mlp.up_proj.{leaf}"]
    save_file(stored, damaged / "model.safetensors", {"format": "pt"})
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=leaf if leaf != "weight_t" else "up_proj"):
            read(damaged)
