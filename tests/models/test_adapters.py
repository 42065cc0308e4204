"""A LoRA adapter as MODEL is merged onto its base as PEFT merges it, and what cannot be merged says what it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.commands import SMALL, contents, refused, run, succeeded
from support.edits import edit_fields
from support.families import make_model
from support.folders import config_of, tensors_of
from support.hub import Hub
from wina_convert import convert
from wina_convert.models.source import open_source
from wina_convert.verbs.export import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning"),
]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def make_adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Save an adapter of random numbers, none of them 0."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """What PEFT makes of it."""
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        folder
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / file, folder / file)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    source = open_source(str(folder))
    return dict(source.read(source.tensors))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}),
    "every linear": ("llama-tied", {"target_modules": "all-linear", "r": 3}),
    "rank-stabilised": ("qwen2", {"target_modules": ["v_proj"], "use_rslora": True, "r": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 5, "up_proj": 3},
        },
    ),
    "[in, out]": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "whole modules": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "some layers": (
        "llama",
        {"target_modules": ["k_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ),
}


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_an_adapter_is_merged_as_peft_does(family: str, options: dict[str, Any], tmp_path: Path):
    base = make_model(family, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    expected, found = tensors_of(merged(base, adapter, tmp_path / "merged")), read(adapter)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))
    changed = [name for name, tensor in tensors_of(base).items() if not torch.equal(tensor, found[name])]
    assert len(changed) == len(open_source(str(adapter)).adapter.pairs | open_source(str(adapter)).adapter.replaced)  # type: ignore[union-attr]


def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path: Path):
    base = make_model("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["up_proj"], r=4, lora_alpha=6)
    stored, found, before = load_file(adapter / WEIGHTS), read(adapter), tensors_of(base)
    for n in (0, 1):
        name = f"model.layers.{n}.mlp.up_proj"
        up, down = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
        exact = before[f"{name}.weight"].double() + 1.5 * up @ down
        assert found[f"{name}.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(found[f"{name}.weight"].double(), exact, rtol=2**-8, atol=1e-5)
        assert (found[f"{name}.weight"] == exact.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("basis", ["none", "pca"])
def test_an_adapter_converts_to_what_the_merged_model_converts_to(basis: str, tmp_path: Path):
    base = make_model("llama", tmp_path / "base")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    options: dict[str, Any] = {"samples": 4, "seq_len": 32, "basis": basis}
    report = convert(str(adapter), tmp_path / "wina", **options)
    if basis == "none":
        convert(str(merged(base, adapter, tmp_path / "merged")), tmp_path / "expected", **options)
        expected = tensors_of(tmp_path / "expected")
        for name, tensor in tensors_of(tmp_path / "wina").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
        export(tmp_path / "wina", tmp_path / "dense")
        found = read(adapter)
        assert all(torch.equal(tensor, found[name]) for name, tensor in tensors_of(tmp_path / "dense").items())
    told = {"name": "adapter", "revision": None, "base": {"name": "base", "revision": None}}
    assert report["source"] == told
    assert config_of(tmp_path / "wina")["quantization_config"]["source"] == told
    assert "a LoRA adapter, merged onto its base base" in (tmp_path / "wina" / "README.md").read_text()
    assert not (tmp_path / "wina" / CONFIG).exists()


def test_an_adapter_on_the_hub_is_found_with_its_base(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = make_model("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_fields(CONFIG, base_model_name_or_path="lab/base")(adapter)
    commits = {name: hub.add(f"lab/{name}", tmp_path / name) for name in ("base", "adapter")}
    expected = read(adapter)
    for dry in (("--dry-run",), ()):
        result = run("lab/adapter", "--out", tmp_path / "out", *SMALL, "--json", "--quiet", *dry)
        succeeded(result)
        assert json.loads(result.stdout)["source"] == {
            "name": "lab/adapter",
            "revision": commits["adapter"],
            "base": {"name": "lab/base", "revision": commits["base"]},
        }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- lab/adapter\n- lab/base\n" in card
    export(tmp_path / "out", tmp_path / "dense")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "dense").items())


# Refusals


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama-tied", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"], r=2)


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


FIELDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another kind": ({"peft_type": "PREFIX_TUNING"}, ("'PREFIX_TUNING'", "only LoRA", "merge_and_unload")),
    "no base": ({"base_model_name_or_path": None}, ("names no base model",)),
    "a base that is nowhere": ({"base_model_name_or_path": "./nowhere"}, ("the base of the adapter", "./nowhere")),
    "DoRA": ({"use_dora": True}, ("is DoRA", "merge_and_unload")),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4'", "changes the base model's weights")),
    "a field of tomorrow": ({"use_better_lora": True}, ("use_better_lora", "nothing is known")),
    "no number": ({"lora_alpha": "much"}, ("lora_alpha or alpha_pattern",)),
    "no finite number": ({"lora_alpha": 1e999}, ("lora_alpha or alpha_pattern",)),
    "no pattern": ({"alpha_pattern": {"q_proj(": 4}}, ("lora_alpha or alpha_pattern",)),
    "no patterns": ({"alpha_pattern": ["q_proj"]}, ("lora_alpha or alpha_pattern",)),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication",)),
}


@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_what_is_more_than_a_plain_lora_is_refused(
    fields: dict[str, Any], words: tuple[str, ...], adapter: Path, tmp_path: Path
):
    edit_fields(CONFIG, **fields)(adapter)
    before = contents(tmp_path)
    refused(run(adapter, "--out", tmp_path / "out", "--quiet"), *words)
    assert contents(tmp_path) == before


def change(adapter: Path, edit: Any) -> None:
    stored = load_file(adapter / WEIGHTS)
    edit(stored)
    save_file(stored, adapter / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "half a pair": (lambda stored: stored.pop(f"{Q0}.lora_B.weight"), ("half of a pair", "layers.0.self_attn.q_proj")),
    "a magnitude": (
        lambda stored: stored.update({f"{Q0}.lora_magnitude_vector": torch.ones(64)}),
        ("no part of a plain",),
    ),
    "no such module": (
        lambda stored: stored.update({f"{Q0.replace('0', '9')}.lora_A.weight": torch.ones(2, 48)}),
        ("layers.9.self_attn.q_proj.weight", "0 tensors"),
    ),
    "another width": (
        lambda stored: stored.update({f"{Q0}.lora_A.weight": torch.ones(2, 32)}),
        ("does not fit its base", "[64, 48]", "[64, 32]"),
    ),
    "another vocabulary": (
        lambda stored: stored.update({"base_model.model.model.embed_tokens.weight": torch.ones(2050, 48)}),
        ("does not fit its base", "[2048, 48]", "[2050, 48]"),
    ),
    "a tied embedding": (
        lambda stored: stored.update({"base_model.model.model.embed_tokens.weight": torch.ones(2048, 48)}),
        ("as embedding and as head",),
    ),
}


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(edit: Any, words: tuple[str, ...], adapter: Path, tmp_path: Path):
    change(adapter, edit)
    refused(run(adapter, "--out", tmp_path / "out", "--quiet"), *words)


def test_pickled_or_damaged_adapters_are_refused(adapter: Path, tmp_path: Path):
    (adapter / WEIGHTS).write_bytes(b"12345678 no safetensors")
    refused(run(adapter, "--out", tmp_path / "out", "--quiet"), "not safetensors")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(run(adapter, "--out", tmp_path / "out", "--quiet"), "pickled weights")
    (adapter / CONFIG).write_text("[]")
    refused(run(adapter, "--out", tmp_path / "out", "--quiet"), CONFIG)


def test_what_a_resumed_conversion_watches_are_the_files_of_base_and_adapter(adapter: Path):
    source = open_source(str(adapter))
    assert {path.name for path in source.files()} == {"model.safetensors", WEIGHTS, CONFIG}


KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "dataset": (("dataset_info.json", "data-00000-of-00001.arrow", "state.json"), "is a dataset, not a model"),
    "dataset in files": (("train.parquet", "README.md"), "is a dataset, not a model"),
    "GGUF": (("model-Q4_K_M.gguf", "README.md"), "in GGUF"),
    "tokenizer": (("tokenizer.json", "tokenizer_config.json"), "is a tokenizer without a model"),
    "diffusers": (("model_index.json", "model.safetensors"), "is a diffusers pipeline"),
    "weights alone": (("model.safetensors", "model.gguf", "tokenizer.json"), "has no config.json"),
    "ONNX": (("model.onnx", "tokenizer.json"), "is an ONNX model"),
}


@pytest.mark.parametrize(("files", "words"), KINDS.values(), ids=KINDS)
def test_what_is_no_model_says_what_it_is(files: tuple[str, ...], words: str, hub: Hub, tmp_path: Path):
    folder = tmp_path / "thing"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    refused(run(folder, "--out", tmp_path / "out", "--quiet"), str(folder), words)
    hub.add("lab/thing", folder)
    refused(run("lab/thing", "--out", tmp_path / "out", "--quiet"), "lab/thing", words)
