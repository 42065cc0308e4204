"""Every family: converted, reloaded and compared with its dense model and with a reference of a few lines.

The reference is the dense model in plain transformers with the inputs of its projections zeroed by a hook, which reads the
thresholds from the checkpoint's files. A score within rounding of its threshold may fall on either side; the comparisons
take the first prompt for which the reference finds none.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import wina_convert
from support.families import FAMILIES, make_model
from support.folders import tensors_of
from support.reference import (
    LENGTH,
    NEW,
    SAMPLES,
    Answer,
    Reference,
    answer,
    assert_close,
    assert_dense_at_0,
    assert_equals_reference,
    convert,
    greedy,
    logits,
    random_prompt,
    reference,
)
from wina_convert import architectures
from wina_convert.models import documents, text
from wina_convert.models.source import open_source
from wina_convert.runtime import attention
from wina_convert.runtime.linear import WinaLinear

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Converted:
    """A family's dense model and checkpoint, and what reference and gated model say at 50%."""

    dense: Path
    gated: Path
    report: dict[str, Any]
    reference: Reference
    answer: Answer
    model: Any


QUICK = ("llama", "phi3", "gpt2")  # what .ci/quick runs: separate matrices, fused ones, and Conv1D


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp(request.param)
    dense, gated = make_model(request.param, folder / "dense"), folder / "gated"
    report = convert(dense, gated)
    expected = reference(dense, gated, 0.5)
    model = AutoModelForCausalLM.from_pretrained(gated)
    return Converted(dense, gated, report, expected, answer(expected), model)


def test_every_architecture_has_a_tiny_model() -> None:
    assert {fields["model_type"] for fields in FAMILIES.values()} == set(architectures.ARCHITECTURES)


def test_every_projection_of_every_layer_is_gated(made: Converted) -> None:
    dense = made.reference.model.named_modules()
    linear = {name for name, module in dense if type(module) in (torch.nn.Linear, Conv1D)}
    gated = {name for name, module in made.model.named_modules() if isinstance(module, WinaLinear)}
    assert gated == linear - {"lm_head"}
    assert set(made.report["projections"]) == gated


def test_at_sparsity_0_the_logits_are_those_of_the_dense_model(made: Converted) -> None:
    assert_dense_at_0(made.dense, made.gated)


def test_at_50_percent_the_logits_are_those_of_the_reference(made: Converted) -> None:
    expected = made.answer
    found = logits(made.model, expected.prompt)
    assert_close(found, expected.logits)
    dense = logits(AutoModelForCausalLM.from_pretrained(made.dense), expected.prompt)
    assert (found - dense).abs().max() > 0.05 * dense.abs().max()  # and not those of the dense model


def test_at_50_percent_the_generated_text_is_that_of_the_reference(made: Converted) -> None:
    assert greedy(made.model, made.answer.prompt) == made.answer.continuation


def test_padding_and_a_neighbour_in_the_batch_change_nothing(made: Converted) -> None:
    prompt = made.answer.prompt
    padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), prompt], 1)
    batch = torch.cat([padded, padded.roll(1, 1)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    found = made.model.generate(batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert found[:1, 5:].tolist() == made.answer.continuation


def test_the_report_tells_the_sparsity_that_the_reference_counts(made: Converted) -> None:
    source = open_source(str(made.dense))
    packed = text.sequences(
        documents.read_documents(), text.load_tokenizer(source), LENGTH, SAMPLES + text.HELD_OUT, documents.BUNDLED
    )
    tokens, held_out = text.split(packed, SAMPLES, 0)
    assert hashlib.sha256(tokens.numpy().tobytes()).hexdigest() == made.report["calibration"]["tokens_sha256"]

    counted = made.reference
    counted.clear()
    logits(counted.model, held_out)
    reported = made.report["verification"]["held_out"]
    assert reported["projections"] == pytest.approx(counted.fractions(), abs=1e-3)
    assert reported["achieved"] == pytest.approx(counted.overall(), abs=1e-3)
    assert reported["achieved"] == pytest.approx(0.5, abs=0.02)


def test_between_the_points_of_the_grid_it_is_the_reference_too(tmp_path: Path) -> None:
    dense = make_model("llama", tmp_path / "dense")
    convert(dense, tmp_path / "gated")
    for sparsity in (0.33, 0.62):
        assert_equals_reference(dense, tmp_path / "gated", sparsity)


@pytest.mark.parametrize(("dtype", "exact", "loose"), [(torch.bfloat16, 0.03, 0.2), (torch.float16, 0.004, 0.1)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "gpt2"])
def test_half_precision(family: str, dtype: torch.dtype, exact: float, loose: float, tmp_path: Path) -> None:
    dense, gated = make_model(family, tmp_path / "dense", dtype), tmp_path / "gated"
    convert(dense, gated, allocation="types")
    plain, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, gated))
    masked, at_0 = reference(dense, gated, 0.5).model, wina_convert.load(str(gated), sparsity=0.0)
    attention.use(masked)  # rounds as the gated model's does
    assert model.dtype == dtype
    for prompt in (random_prompt(1), random_prompt(2)[:, :6]):
        expected = logits(plain, prompt)
        assert (logits(at_0, prompt) - expected).norm() <= exact * expected.norm()
        # Rounding moves some scores over their threshold, so that logits agree on the whole, not one by one.
        gap = (logits(model, prompt) - logits(masked, prompt)).norm()
        assert gap <= loose * expected.norm()
        assert (logits(model, prompt) - expected).norm() > 0.25 * expected.norm()


def rename(folder: Path, renamed: dict[str, str] | None = None, extra: dict[str, Tensor] | None = None) -> None:
    tensors = {(renamed or {}).get(name, name): tensor for name, tensor in tensors_of(folder).items()}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})


def test_gpt2_as_on_the_hub_without_prefix_and_with_stray_buffers(tmp_path: Path) -> None:
    dense = make_model("gpt2", tmp_path / "dense")
    names = {name: name.removeprefix("transformer.") for name in tensors_of(dense)}
    stray = {f"h.{k}.attn.bias": torch.ones(128, 128).tril()[None, None].contiguous() for k in range(2)}
    rename(dense, names, stray)
    convert(dense, tmp_path / "gated")
    assert_dense_at_0(dense, tmp_path / "gated")
    assert_equals_reference(dense, tmp_path / "gated", 0.5)
    written = tensors_of(tmp_path / "gated")
    assert not any(name.startswith("transformer.") for name in written)
    assert not set(stray) & set(written)


def test_gpt_neox_as_pythia_stores_its_head(tmp_path: Path) -> None:
    dense = make_model("gpt_neox", tmp_path / "dense")
    rename(dense, {"lm_head.weight": "embed_out.weight"})
    assert "embed_out.weight" in tensors_of(dense)
    convert(dense, tmp_path / "gated")
    assert_dense_at_0(dense, tmp_path / "gated")
    assert_equals_reference(dense, tmp_path / "gated", 0.5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name]["tie_word_embeddings"]])
def test_a_tied_head_is_stored_once_and_stays_tied(family: str, tmp_path: Path) -> None:
    dense = make_model(family, tmp_path / "dense")
    assert "lm_head.weight" not in tensors_of(dense)
    convert(dense, tmp_path / "gated", samples=2, seq_len=16, basis="none")
    assert "lm_head.weight" not in tensors_of(tmp_path / "gated")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("change", [0.0, 0.1], ids=["equal", "different"])
def test_a_tied_model_that_stores_its_head_all_the_same(change: float, tmp_path: Path) -> None:
    dense = make_model("llama-tied", tmp_path / "dense")
    embedding = tensors_of(dense)["model.embed_tokens.weight"]
    rename(dense, extra={"lm_head.weight": embedding + change * torch.randn(embedding.shape)})
    convert(dense, tmp_path / "gated")
    assert_dense_at_0(dense, tmp_path / "gated")
    written = tensors_of(tmp_path / "gated")
    assert torch.equal(written["lm_head.weight"], tensors_of(dense)["lm_head.weight"])
    assert torch.equal(written["model.embed_tokens.weight"], embedding)


def test_shards_in_and_shards_out_change_nothing(tmp_path: Path) -> None:
    one = make_model("llama", tmp_path / "one")
    many = make_model("llama", tmp_path / "many", max_shard_size="50KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    convert(one, tmp_path / "gated")
    convert(many, tmp_path / "sharded", max_shard_size="30KB")
    files = {file.name: load_file(file) for file in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(files) > 5
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    large = [sum(t.nbytes for t in tensors.values()) for tensors in files.values() if len(tensors) > 1]
    assert max(large) <= 30_000
    whole, parts = tensors_of(tmp_path / "gated"), tensors_of(tmp_path / "sharded")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    prompt = random_prompt(1)
    found = [logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), prompt) for name in ("gated", "sharded")]
    assert torch.equal(*found)


def test_a_new_family_is_a_line_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {name: value for name, value in FAMILIES["llama"].items() if name not in ("rope_parameters", "head_dim")}
    monkeypatch.setitem(FAMILIES, "granite", {**fields, "model_type": "granite", "residual_multiplier": 0.7})
    dense = make_model("granite", tmp_path / "dense")
    monkeypatch.setitem(architectures.ARCHITECTURES, "granite", replace(architectures.SEPARATE))
    convert(dense, tmp_path / "gated")
    assert_dense_at_0(dense, tmp_path / "gated")
    assert_equals_reference(dense, tmp_path / "gated", 0.5)
