"""A loaded model on devices, in dtypes, and in everything that transformers does with a model."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    StaticCache,
    pipeline,
)

from support.families import make_model
from support.folders import tensors_of
from support.loaded import PROMPT, cutoffs_of, greedy, logits
from support.reference import reference
from wina_convert import convert, load, set_sparsity
from wina_convert.runtime.linear import WinaLinear, gated_modules, observing

pytestmark = pytest.mark.slow

EXACT = ("column_norms", "thresholds", "tau")


# Devices and dtypes


def test_device_map_auto_gives_the_same_logits(wina_tiny, model):
    assert torch.equal(logits(load(wina_tiny, device_map="auto")), logits(model))


def test_layers_offloaded_to_disk_give_the_same_logits(wina_tiny, model, tmp_path):
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    offloaded = load(wina_tiny, device_map=where, offload_folder=tmp_path)
    assert offloaded.model.layers[1].mlp.up_proj.weight_t.is_meta
    assert torch.equal(logits(offloaded), logits(model))
    assert torch.equal(greedy(offloaded), greedy(model))
    set_sparsity(offloaded, 0.2)
    assert torch.equal(logits(offloaded), logits(load(wina_tiny, sparsity=0.2)))


def check_dtype(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Everything in `dtype`, but for the norms, thresholds and cutoffs, which are what is stored."""
    stored = tensors_of(folder)
    assert model.dtype == dtype
    for name, gate in gated_modules(model).items():
        assert torch.equal(gate.weight_t, stored[f"{name}.weight_t"].to(dtype))
        for leaf in ("column_norms", "thresholds"):
            assert getattr(gate, leaf).dtype == torch.float32
            assert torch.equal(getattr(gate, leaf), stored[f"{name}.{leaf}"])
        assert gate.tau.dtype == torch.float32
        np.testing.assert_allclose(gate.tau.numpy(), cutoffs_of(folder, name, 0.5), rtol=1e-5)
    found = logits(model)
    assert found.dtype == dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}], ids=["nothing said", "auto"])
def test_the_dtype_is_the_stored_one(options, wina_tiny, half):
    for folder, dtype in ((wina_tiny, torch.float32), (half, torch.bfloat16)):
        check_dtype(AutoModelForCausalLM.from_pretrained(folder, **options), folder, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_can_be_asked_for_and_norms_and_thresholds_stay_float32(dtype, wina_tiny, half):
    for folder in (wina_tiny, half):
        check_dtype(load(folder, dtype=dtype), folder, dtype)


@pytest.mark.parametrize(
    "cast", [lambda model: model.to(torch.float16), lambda model: model.bfloat16()], ids=["to", "bfloat16"]
)
def test_casting_a_loaded_model_keeps_norms_thresholds_and_cutoffs(cast, wina_tiny, model):
    found = cast(load(wina_tiny))
    for name, gate in gated_modules(found).items():
        assert gate.weight_t.dtype == found.dtype
        for leaf in EXACT:
            assert torch.equal(getattr(gate, leaf), getattr(model.get_submodule(name), leaf))
    assert logits(found).dtype == found.dtype


# Running


def test_a_copy_gives_the_same_logits(model):
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))


def test_a_pipeline_generates_what_generate_does(wina_tiny, model):
    tokenizer = AutoTokenizer.from_pretrained(wina_tiny)
    text = "The river was"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    found = pipeline("text-generation", model=str(wina_tiny))(
        text, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_full_text=False
    )
    assert found[0]["generated_text"] == tokenizer.decode(greedy(model, tokens)[0], skip_special_tokens=True)


def test_the_base_model_loads_gated(wina_tiny, model):
    base = AutoModel.from_pretrained(wina_tiny)
    assert len(gated_modules(base)) == len(gated_modules(model)) == 28
    with torch.no_grad():
        expected = model.model(PROMPT).last_hidden_state
        assert torch.equal(base(PROMPT).last_hidden_state, expected)


def test_a_classifier_loads_gated(wina_tiny, model):
    classifier = AutoModelForSequenceClassification.from_pretrained(wina_tiny, num_labels=3)
    with torch.no_grad():
        expected = model.model(PROMPT).last_hidden_state
        assert torch.equal(classifier.model(PROMPT).last_hidden_state, expected)
        assert classifier(PROMPT).logits.shape == (1, 3)


def test_the_base_model_saved_alone_loads_again(wina_tiny, model, tmp_path):
    AutoModel.from_pretrained(wina_tiny).save_pretrained(tmp_path)
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path)(PROMPT).last_hidden_state
        assert torch.equal(found, model.model(PROMPT).last_hidden_state)


def test_the_config_loads_alone(wina_tiny):
    config = AutoConfig.from_pretrained(wina_tiny)
    assert config.quantization_config["quant_method"] == "wina"


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
def test_generate_gives_the_same_tokens_whatever_the_cache(options, model):
    assert torch.equal(greedy(model, **options), greedy(model))


def test_generate_samples(model):
    found = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=True)
    assert found.shape == (1, PROMPT.shape[1] + 8)


def test_beams_find_what_they_find_in_the_dense_model_with_its_inputs_masked(model, wina_tiny, tiny):
    masked = reference(tiny, wina_tiny, 0.5).model
    assert torch.equal(greedy(model, num_beams=3), greedy(masked, num_beams=3))


def test_either_assists_the_other_in_decoding(model, dense):
    rows: list[int] = []
    for target, assistant in ((model, dense), (dense, model)):
        rows.clear()
        with observing(gated_modules(model), lambda name, gate, x: rows.append(x.shape[-2])):
            assisted = greedy(target, assistant_model=assistant)
        assert torch.equal(assisted, greedy(target))
        assert any(1 < count < PROMPT.shape[1] for count in rows)  # guesses verified together, or caught up with


def test_an_exported_program_computes_what_the_model_does(model):
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, use_cache=False).logits

    program = torch.export.export(Logits(), (PROMPT,), strict=False)
    other = PROMPT.flip(1)
    torch.testing.assert_close(program.module()(other), logits(model, other), rtol=0, atol=1e-4)


def test_a_left_padded_batch_gives_what_single_rows_give(model):
    rows = [PROMPT[:, :4], PROMPT, PROMPT[:, 2:9]]
    width = max(row.shape[1] for row in rows)
    pad = model.config.pad_token_id
    tokens = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.arange(width)[None] >= width - row.shape[1] for row in rows]).long()
    together = greedy(model, tokens, attention_mask=mask)
    assert torch.equal(together, torch.cat([greedy(model, row) for row in rows]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch imports its own past
def test_a_compiled_model_is_one_graph_with_a_static_cache_too_and_equals_the_eager_one(tmp_path):
    convert(
        str(make_model("llama", tmp_path / "source", num_hidden_layers=1)),
        tmp_path / "wina",
        samples=8,
        seq_len=32,
        basis="none",
    )
    small = load(tmp_path / "wina")
    expected = logits(small)
    torch._dynamo.reset()
    backend = "inductor"
    try:
        torch.compile(torch.exp, backend=backend)(torch.ones(2))
    except torch._dynamo.exc.BackendCompilerFailed:  # no C++ compiler here: the graph is captured all the same
        backend = "aot_eager"
    with torch.no_grad():
        found = torch.compile(small, fullgraph=True, backend=backend)(PROMPT).logits
    tolerance = {"rtol": 0, "atol": 1e-4 * expected.abs().max().item()}
    torch.testing.assert_close(found, expected, **tolerance)
    torch._dynamo.reset()
    step, cache = torch.compile(small, fullgraph=True, backend="aot_eager"), StaticCache(small.config, max_cache_len=16)
    with torch.no_grad():
        parts = [
            step(tokens, past_key_values=cache, use_cache=True, cache_position=torch.arange(at, at + tokens.shape[1]))
            for at, tokens in ((0, PROMPT[:, :8]), (8, PROMPT[:, 8:9]), (9, PROMPT[:, 9:]))
        ]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), expected, **tolerance)


def test_weights_of_gated_projections_can_be_looked_at(model, dense):
    for name, gate in gated_modules(model).items():
        assert isinstance(gate, WinaLinear)
        assert torch.equal(gate.weight, dense.get_submodule(name).weight)
