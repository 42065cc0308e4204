"""Tensors that the model does not take, names and dtypes: what is left out, what is refused, before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.commands import SMALLEST, contents, refused, run, succeeded
from support.edits import edit_config, edit_tensors
from support.folders import tensors_of
from wina_convert.architectures import ARCHITECTURES
from wina_convert.format.trust import SIZES
from wina_convert.models.source import open_source
from wina_convert.models.tensors import taken

MODEL = "kilobytes"
LAYER = "model.layers.0"
Tensors = dict[str, Tensor]

HARMLESS: dict[str, Tensors] = {
    "a mask value that is infinite in float16": {f"{LAYER}.self_attn.masked_bias": torch.tensor(-1e9).half()},
    "a causal mask": {f"{LAYER}.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
    "rotary frequencies": {f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.rand(8)},
    "NaN": {"model.steps": torch.tensor(torch.nan)},
    "8 bits": {"model.scale": torch.ones(4).to(torch.float8_e4m3fn), "model.zeros": torch.ones(4, dtype=torch.uint16)},
    "complex numbers": {"model.rotations": torch.ones(4, dtype=torch.complex64)},
    "another head": {"score.weight": torch.ones(2, 16)},
}
PART: dict[str, Tensors] = {
    "an adapter": {f"{LAYER}.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 16)},
    "a magnitude": {f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": torch.ones(16)},
    "a bias": {f"{LAYER}.self_attn.q_proj.bias": torch.ones(16)},
    "the head's bias": {"lm_head.bias": torch.ones(2048)},
    "a layer": {"model.layers.2.mlp.up_proj.weight": torch.ones(32, 16)},
    "a norm": {f"{LAYER}.self_attn.q_norm.weight": torch.ones(4)},
}


@pytest.fixture
def changed(source: Path, tmp_path: Path) -> Callable[[Tensors], Path]:
    """The model with more tensors."""

    def change(extra: Tensors) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "model"))
        edit_tensors(lambda stored: stored.update(extra))(folder)
        return folder

    return change


@pytest.mark.parametrize("extra", HARMLESS.values(), ids=HARMLESS)
def test_what_no_parameter_takes_is_left_out(extra: Tensors, changed, source: Path):
    found, unused = taken(open_source(str(changed(extra))))
    assert set(unused) == set(extra)
    assert set(found.tensors) == set(tensors_of(source))


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["whole", "saved without its head's prefix"])
@pytest.mark.parametrize("extra", PART.values(), ids=PART)
def test_what_was_part_of_the_model_is_refused_unless_it_is_to_be_left_out(extra: Tensors, prefix, changed, tmp_path):
    folder = changed(extra)
    if not prefix:
        stored = {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()}
        save_file(stored, folder / "model.safetensors")
        extra = {name.removeprefix("model."): tensor for name, tensor in extra.items()}
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "out", "--dry-run"), *extra, "--allow-unused", "another model")
    assert contents(tmp_path) == before
    assert taken(open_source(str(folder)), allow_unused=True)[1] == tuple(extra)


def test_two_tensors_for_one_parameter_are_told_as_such(changed, tmp_path: Path):
    norm = torch.ones(16)
    folder = changed({"layers.0.input_layernorm.weight": norm})
    line = refused(run(folder, "--out", tmp_path / "out", "--dry-run"), "one parameter", "--allow-unused")
    assert "'layers.0.input_layernorm.weight'" in line
    assert "'model.layers.0.input_layernorm.weight'" in line


def test_an_adapter_is_to_be_merged(changed, tmp_path: Path):
    refused(run(changed(PART["an adapter"]), "--out", tmp_path / "out"), "merge the adapter")


def test_plan_report_and_terminal_name_what_is_left_out(changed, source: Path, tmp_path: Path):
    extra = HARMLESS["a mask value that is infinite in float16"] | HARMLESS["8 bits"]
    folder = changed(extra)
    plan = run(folder, "--out", tmp_path / "out", "--dry-run", "--basis", "none")
    assert all(name in plan.stdout for name in extra)
    done = run(folder, "--out", tmp_path / "out", *(option for option in SMALLEST if option != "--quiet"))
    succeeded(done)
    assert all(name in done.stdout for name in extra)
    assert set(json.loads((tmp_path / "out" / "wina_report.json").read_text())["unused"]) == set(extra)
    assert not set(extra) & set(tensors_of(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["none", "pca"])
def test_a_tied_matrix_may_be_stored_as_the_head(basis: str, source: Path, tmp_path: Path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    edit_config(tie_word_embeddings=True)(folder)
    edit_tensors(lambda stored: stored.pop("lm_head.weight"))(folder)
    shutil.copytree(folder, tmp_path / "head")
    edit_tensors(lambda stored: stored.update({"lm_head.weight": stored.pop("model.embed_tokens.weight")}))(
        tmp_path / "head"
    )
    for name in ("model", "head"):
        succeeded(run(tmp_path / name, "--out", tmp_path / f"{name}-wina", *SMALLEST, "--basis", basis))
    expected, found = (tensors_of(tmp_path / f"{name}-wina") for name in ("model", "head"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    tokens = torch.arange(12)[None] + 5
    dense = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "head-wina", quantization_config=_at_zero())(tokens).logits
    torch.testing.assert_close(gated, dense, rtol=1e-4, atol=1e-4)


def _at_zero():
    from wina_convert import WinaConfig

    return WinaConfig(sparsity=0.0)


@pytest.mark.parametrize("name", [f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.input_layernorm.weight"])
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float64, ("float64", "--dtype float32, bfloat16 or float16")),
        (torch.int8, ("int8", "floating-point")),
        (torch.float8_e4m3fn, ("float8_e4m3fn", "convert a checkpoint in float32")),
    ],
)
@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry", "run"])
def test_one_tensor_in_another_dtype_is_refused_before_anything_is_spent(
    dry, dtype, words, name, changed, source, tmp_path
):
    stored = load_file(source / "model.safetensors")[name]
    folder = changed({name: stored.to(dtype)})
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out", *dry), name, *words)
    assert contents(tmp_path) == before


def test_float64_is_converted_to_the_dtype_asked_for(changed, source: Path, tmp_path: Path):
    name = f"{LAYER}.mlp.down_proj.weight"
    folder = changed({name: load_file(source / "model.safetensors")[name].double()})
    succeeded(run(folder, "--out", tmp_path / "out", *SMALLEST, "--dtype", "float32"))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}


def test_a_dry_run_misses_a_tensor(source: Path, tmp_path: Path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    edit_tensors(lambda stored: stored.pop("model.norm.weight"))(folder)
    refused(run(folder, "--out", tmp_path / "out", "--dry-run"), "model.norm.weight")


@pytest.mark.parametrize(
    "fields",
    [{"num_experts": 8}, {"num_local_experts": 4, "n_routed_experts": 2}, {"num_chunks": -7, "block_size": 1 << 40}],
)
def test_a_field_that_transformers_does_not_read_is_no_reason_to_refuse(fields, source: Path, tmp_path: Path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    edit_config(**fields)(folder)
    succeeded(run(folder, "--out", tmp_path / "out", "--dry-run", "--basis", "none"))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_sizes_that_are_bounded_are_those_of_the_families(model_type: str):
    config = CONFIG_MAPPING[model_type]()
    fields = {*config.to_dict(), *config.attribute_map}
    endings = ("_size", "_dim", "_layers", "_heads", "_positions", "_embeddings")
    sizes = {name for name in fields if name.endswith(endings) or name.startswith(("num_", "n_"))}
    assert sizes - {"tie_word_embeddings"} <= SIZES
