"""Models of images and text: the text decoder is gated, the rest copied, and the class that loads them is the source's."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import wina_convert
from support.folders import config_of, tensors_of
from support.reference import (
    assert_close,
    assert_each_product_follows_the_rule,
    assert_equals_reference,
    convert,
    dense_model,
    greedy,
    random_prompt,
)
from support.wrappers import WRAPPERS, make_wrapper, with_image
from wina_convert.models.source import open_source
from wina_convert.runtime.linear import WinaLinear
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

pytestmark = pytest.mark.slow

QUICK = ("gemma3", "qwen3_5")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in WRAPPERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By type, the dense folder and the gated one, made when they are asked for."""

    @cache
    def made(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        dense = make_wrapper(kind, folder / "dense")
        convert(dense, folder / "gated")
        return dense, folder / "gated"

    return made


@torch.no_grad()
def seen(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gives_the_dense_answer_at_sparsity_0(kind: str, folders: Any) -> None:
    dense, gated = folders(kind)
    plain, model, inputs = dense_model(dense), wina_convert.load(str(gated), sparsity=0.0), with_image(kind)
    assert type(model) is type(plain)
    assert_close(seen(model, inputs), seen(plain, inputs))
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert not torch.allclose(seen(model, inputs), seen(model, other), atol=0.1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_text_follows_the_rule(kind: str, folders: Any) -> None:
    dense, gated = folders(kind)
    assert_each_product_follows_the_rule(dense, gated, 0.5)


def test_text_equals_the_reference(folders: Any) -> None:
    assert_equals_reference(*folders("gemma3"), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_text_decoder_is_gated_and_the_rest_is_copied(kind: str, folders: Any) -> None:
    dense, gated = folders(kind)
    modules = config_of(gated)["quantization_config"]["modules"]
    assert all(name.startswith("model.language_model.layers.") for name in modules)
    model = wina_convert.load(str(gated))
    assert {name for name, module in model.named_modules() if isinstance(module, WinaLinear)} == set(modules)
    before, after = tensors_of(dense), tensors_of(gated)
    gone = [key for key in before if key not in after or after[key].shape != before[key].shape]
    assert len(gone) == len(modules)
    assert all(torch.equal(before[key], after[key]) for key in before if key not in gone)
    assert any("vis" in key for key in after)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verbs_work(kind: str, folders: Any, tmp_path: Path) -> None:
    _, gated = folders(kind)
    verify_folder(gated)
    summary = inspect_checkpoint(gated)
    assert len(summary.layers) == WRAPPERS[kind]["text_config"]["num_hidden_layers"]
    model = wina_convert.load(str(gated), sparsity=0.25)
    at_a_quarter = seen(model, {"input_ids": random_prompt(3)})
    wina_convert.set_sparsity(model, 0.5)
    assert not torch.allclose(seen(model, {"input_ids": random_prompt(3)}), at_a_quarter, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = wina_convert.load(str(tmp_path / "again"), sparsity=0.25)
    assert torch.equal(seen(again, {"input_ids": random_prompt(3)}), at_a_quarter)


@pytest.mark.parametrize(
    ("kind", "loader"), [("gemma3", "AutoModelForCausalLM"), ("qwen3_5", "AutoModelForImageTextToText")]
)
def test_the_card_tells_what_loads_it(kind: str, loader: str, folders: Any) -> None:
    card = (folders(kind)[1] / "README.md").read_text("utf-8")
    assert f"model = {loader}.from_pretrained(" in card
    assert f"import AutoTokenizer, {loader}" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_a_default_sparsity_is_changed_in_place(folders: Any, tmp_path: Path) -> None:
    dense, _ = folders("gemma3")
    convert(dense, tmp_path / "gated")
    retarget(tmp_path / "gated", 0.25)
    verify_folder(tmp_path / "gated")
    assert config_of(tmp_path / "gated")["quantization_config"]["sparsity"] == 0.25


def test_a_token_of_text_reads_nothing_of_the_parts_for_images(folders: Any, tmp_path: Path) -> None:
    dense, _ = folders("gemma3")
    plan = convert(dense, tmp_path / "plan", dry_run=True)
    text = {
        name: parameter
        for name, parameter in dense_model(dense).named_parameters()
        if name.startswith("model.language_model.") or name.startswith("lm_head.")
    }
    embedding = text.pop("model.language_model.embed_tokens.weight")
    assert plan["bytes_per_token"]["dense"] == sum(parameter.nbytes for parameter in text.values())
    assert embedding.nbytes < plan["disk_bytes"]


def test_the_text_part_loads_alone_where_transformers_does_so(folders: Any) -> None:
    dense, gated = folders("qwen3_5")
    plain = AutoModelForCausalLM.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(gated)
    assert type(model) is type(plain)
    whole = AutoModelForImageTextToText.from_pretrained(gated)
    assert type(whole) is not type(plain)
    prompt = random_prompt(4)
    assert torch.equal(seen(model, {"input_ids": prompt}), seen(whole, {"input_ids": prompt}))
    wina_convert.set_sparsity(model, 0.0)
    assert_close(seen(model, {"input_ids": prompt}), seen(plain, {"input_ids": prompt}))


def test_names_in_the_files_may_be_older_than_those_of_the_modules(folders: Any, tmp_path: Path) -> None:
    """Gemma 3 is published with the names that its files have here; the newest have those of the modules."""
    dense, gated = folders("gemma3")
    assert any(key.startswith("language_model.model.layers.") for key in tensors_of(gated))
    newer = tmp_path / "newer"
    newer.mkdir()
    for path in dense.iterdir():
        (newer / path.name).write_bytes(path.read_bytes())
    state = {key: tensor.contiguous() for key, tensor in dense_model(dense).state_dict().items()}
    save_file(state, newer / "model.safetensors", {"format": "pt"})
    convert(newer, tmp_path / "gated")
    found, expected = wina_convert.load(str(tmp_path / "gated")), wina_convert.load(str(gated))
    assert greedy(found, random_prompt(5)) == greedy(expected, random_prompt(5))
    assert any(key.startswith("model.language_model.layers.") for key in tensors_of(tmp_path / "gated"))


def test_a_tied_head(tmp_path: Path) -> None:
    dense = make_wrapper("gemma3", tmp_path / "dense", tied=True)
    assert not any("lm_head" in key for key in open_source(str(dense)).tensors)
    convert(dense, tmp_path / "gated")
    plain, model = dense_model(dense), wina_convert.load(str(tmp_path / "gated"), sparsity=0.0)
    assert_close(seen(model, with_image("gemma3")), seen(plain, with_image("gemma3")))
