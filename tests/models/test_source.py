"""A model that cannot be converted is refused in one line that says what, where and what to do, and leaves nothing."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.commands import SMALL, contents, refused, run, succeeded
from support.families import make_model
from wina_convert.conversion.plan import make_plan
from wina_convert.errors import SourceError, WinaError
from wina_convert.models.source import open_source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATED = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights, in one file. Shared: copy it."""
    return make_model("llama", tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files."""
    return make_model("llama", tmp_path_factory.mktemp("good"), max_shard_size="200KB")


def config(**changes: Any) -> Damage:
    """Set fields of config.json; None takes one away."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def text(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def only(name: str) -> Damage:
    """Weights in another format alone."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(b"weights")

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of the single file."""

    def change(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        edit(stored)
        save_file(stored, folder / SINGLE, {"format": "pt"})

    return change


def without(name: str) -> Damage:
    return tensors(lambda stored: stored.pop(name))


def shaped(name: str, *shape: int) -> Damage:
    return tensors(lambda stored: stored.update({name: torch.ones(shape)}))


def poisoned(name: str, value: float) -> Damage:
    return tensors(lambda stored: stored[name].view(-1)[-1].fill_(value))


def cast(dtype: torch.dtype) -> Damage:
    return tensors(lambda stored: stored.update({name: tensor.to(dtype) for name, tensor in stored.items()}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def as_quantized(method: str) -> Damage:
    return config(quantization_config={"quant_method": method, "bits": 4})


# What config.json and the headers show, so that a dry run sees it as well.
SEEN_EARLY = {
    "pictures": (
        config(model_type="clip", architectures=["CLIPModel"], vision_config={"hidden_size": 8}),
        ("takes more than text", "CLIPModel", "nor as one of images and text"),
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json", "give the folder")),
    "config is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        ("config.json",),
    ),
    "config is empty": (text("config.json", ""), ("config.json", "not JSON", "get the file again")),
    "config is cut off": (text("config.json", '{"model_type": '), ("config.json", "not JSON", "get the file again")),
    "config is binary": (text("config.json", b"\xff\xfe\0{"), ("config.json", "not JSON")),
    "config is a list": (text("config.json", "[1]"), ("config.json", "not a JSON object", "get the file again")),
    "config nests without end": (text("config.json", "[" * 100_000), ("config.json",)),
    "masked LM": (
        config(architectures=["BertForMaskedLM"], model_type="bert"),
        ("not a causal language model", "BertForMaskedLM"),
    ),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        ("not a causal language model", "LlamaForSequenceClassification"),
    ),
    "encoder-decoder": (
        config(architectures=["T5ForConditionalGeneration"], model_type="t5"),
        ("not a causal language model",),
    ),
    "unknown type": (
        config(architectures=["NoForCausalLM"], model_type="nonesuch"),
        ("'nonesuch'", "knows no causal language model", "upgrade transformers"),
    ),
    "recurrent": (config(architectures=["MambaForCausalLM"], model_type="mamba"), ("'mamba'", "recurrent state only")),
    "no type": (config(model_type=None), ("no model_type", "get the file again")),
    "type is a list": (config(model_type=["llama"]), ("no model_type", "get the file again")),
    "gptq": (as_quantized("gptq"), ("quantized (gptq)", "original float checkpoint")),
    "bitsandbytes": (as_quantized("bitsandbytes"), ("quantized (bitsandbytes)", "original float checkpoint")),
    "compressed-tensors": (as_quantized("compressed-tensors"), ("quantized (compressed-tensors)", "original")),
    "quantized somehow": (config(quantization_config="yes"), ("quantized", "original")),
    "no layers": (config(num_hidden_layers=0), ("layer",)),
    "no heads": (config(num_attention_heads=0), ("config.json",)),
    "unknown activation": (config(hidden_act="nosuch"), ("config.json", "nosuch")),
    "size is text": (config(hidden_size="large"), ("config.json",)),
    "pickled": (only("pytorch_model.bin"), ("pickle", "save_pretrained")),
    "pickled .pt": (only("consolidated.00.pth"), ("pickle", "save_pretrained")),
    "gguf": (only("model-q4.gguf"), ("GGUF", "original safetensors")),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), (SINGLE, "safetensors weights")),
    "cut off": (
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1]),
        (SINGLE, "truncated", "download it again"),
    ),
    "header cut off": (
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:100]),
        (SINGLE, "truncated", "download it again"),
    ),
    "garbage": (text(SINGLE, b"\0garbage" * 99), (SINGLE, "not safetensors", "download it again")),
    "empty file": (text(SINGLE, b""), (SINGLE, "not safetensors", "download it again")),
    "a page of HTML": (text(SINGLE, "<html>404</html>"), (SINGLE, "not safetensors", "download it again")),
    "git lfs pointer": (
        text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n"),
        (SINGLE, "pointer of git-lfs", "git lfs pull"),
    ),
    "no gated weight": (without(GATED), ("model.layers.1.mlp.down_proj",)),
    "gated weight of other shape": (shaped(GATED, 48, 95), (GATED, "(48, 95)", "(48, 96)")),
    "more layers than weights": (config(num_hidden_layers=3), ("model.layers.2",)),
    "only integers": (cast(torch.int8), ("floating-point", "float32, bfloat16 or float16")),
    "float8": (cast(torch.float8_e4m3fn), ("float8_e4m3fn", "float32, bfloat16 or float16")),
}
# What needs the weights or the tokenizer.
SEEN_LATE = {
    "no embedding": (without(EMBEDDING), ("model.embed_tokens.weight", "get it again")),
    "no norm": (without(NORM), (NORM, "get it again")),
    "embedding of other shape": (shaped(EMBEDDING, 2048, 47), (EMBEDDING, "(2048, 47)", "(2048, 48)")),
    "norm of other shape": (shaped(NORM, 49), (NORM, "(49,)", "(48,)")),
    **{
        f"{value} in {where}": (poisoned(name, value), (name, SINGLE, "NaN or infinity"))
        for where, name in (("a gated weight", GATED), ("the embedding", EMBEDDING), ("a norm", NORM))
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "no tokenizer": (no_tokenizer, ("no usable tokenizer", "put its tokenizer files into")),
    "broken tokenizer": (text("tokenizer.json", "{}"), ("no usable tokenizer", "put its tokenizer files into")),
    "tokenizer of a larger model": (
        lambda folder: (
            config(vocab_size=64)(folder),
            shaped(EMBEDDING, 64, 48)(folder),
            shaped("lm_head.weight", 64, 48)(folder),
        ),
        ("the tokenizer gives token", "has 64", "own tokenizer"),
    ),
}
# What only an index can be wrong about.
SHARDS = {
    "shard missing": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        ("00002-of-", "missing", "again"),
    ),
    "shard cut off": (
        lambda folder: (shard := sorted(folder.glob("*.safetensors"))[1]).write_bytes(shard.read_bytes()[:-8]),
        ("00002-of-", "truncated", "download it again"),
    ),
    "index is not JSON": (text(INDEX, "{"), (INDEX, "download it again")),
    "index without a map": (text(INDEX, "{}"), (INDEX, "download it again")),
    "index is a list": (text(INDEX, "[]"), (INDEX, "download it again")),
    "index maps to a number": (text(INDEX, '{"weight_map": {"x": 1}}'), (INDEX, "outside", "do not use")),
    "index maps nothing": (text(INDEX, '{"weight_map": {}}'), ("floating-point",)),
    "name too long": (text(INDEX, '{"weight_map": {"x": "%s"}}' % ("a" * 300)), ("aaa", "again")),
    "name with NUL": (text(INDEX, '{"weight_map": {"x": "a\\u0000b"}}'), ("again",)),
}


def copied(source: Path, tmp_path: Path, damage: Damage) -> Path:
    folder = shutil.copytree(source, tmp_path / "work" / "good")
    damage(folder)
    return folder


@pytest.mark.parametrize(("damage", "words"), SEEN_EARLY.values(), ids=SEEN_EARLY)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_a_source_that_cannot_be_converted_is_refused(
    damage: Damage, words: tuple[str, ...], dry: tuple[str, ...], good: Path, tmp_path: Path
):
    folder = copied(good, tmp_path, damage)
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out", *dry), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("damage", "words"), SEEN_LATE.values(), ids=SEEN_LATE)
def test_a_source_with_bad_content_is_refused_and_leaves_nothing(
    damage: Damage, words: tuple[str, ...], good: Path, tmp_path: Path
):
    folder = copied(good, tmp_path, damage)
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out", "--quiet", *SMALL), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("damage", "words"), SHARDS.values(), ids=SHARDS)
def test_a_source_with_bad_shards_is_refused(damage: Damage, words: tuple[str, ...], good_shards: Path, tmp_path: Path):
    folder = copied(good_shards, tmp_path, damage)
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out"), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "way",
    ["../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors", "..\\outside", "..", ""],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(way: str, good: Path, tmp_path: Path):
    folder = copied(good, tmp_path, lambda folder: (folder / "sub").mkdir())
    outside = tmp_path / "work" / "outside.safetensors"
    (folder / SINGLE).rename(outside)  # it would be a good one
    way = way.format(outside.parent)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(outside), way)}))
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out"), INDEX, repr(way), "outside the folder", "do not use")
    assert contents(tmp_path) == before


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(good_shards: Path, tmp_path: Path):
    folder = copied(good_shards, tmp_path, lambda folder: None)
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][EMBEDDING]
    index["weight_map"]["model.extra.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    refused(run(folder, "--out", tmp_path / "work" / "out"), INDEX, "'model.extra.weight'", file)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "../nowhere"])
def test_a_folder_that_is_not_there_is_refused(model: str, dry: tuple[str, ...], tmp_path: Path):
    refused(run(model, "--out", tmp_path / "out", *dry), model, "not a folder", "config.json")
    assert contents(tmp_path) == {}


def test_a_file_instead_of_a_folder_is_refused(good: Path, tmp_path: Path):
    file = good / SINGLE
    refused(run(file, "--out", tmp_path / "out"), str(file), "not a folder", "give the folder that holds config.json")
    assert contents(tmp_path) == {}


def test_an_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty", "--out", tmp_path / "out"), str(tmp_path / "empty"), "no config.json")


def test_a_wina_checkpoint_is_no_source(wina_tiny: Path, tmp_path: Path):
    refused(run(wina_tiny, "--out", tmp_path / "out"), wina_tiny.name, "WINA checkpoint already", "wina retarget")
    assert contents(tmp_path) == {}


def test_float64_weights_need_a_dtype(good: Path, tmp_path: Path):
    folder = copied(good, tmp_path, lambda folder: (cast(torch.float64)(folder), config(dtype="float64")(folder)))
    refused(run(folder, "--out", tmp_path / "work" / "out"), "float64", "--dtype float32, bfloat16 or float16")
    succeeded(run(folder, "--out", tmp_path / "work" / "out", *SMALL, "--dtype", "float32"))
    stored = load_file(tmp_path / "work" / "out" / SINGLE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


@pytest.mark.parametrize("name", [GATED, EMBEDDING])
def test_a_weight_that_does_not_fit_the_dtype_asked_for_is_refused(name: str, good: Path, tmp_path: Path):
    folder = copied(good, tmp_path, poisoned(name, 1e6))  # above the 65504 of float16
    before = contents(tmp_path)
    refused(run(folder, "--out", tmp_path / "work" / "out", *SMALL, "--quiet", "--dtype", "float16"), name, "float16")
    assert contents(tmp_path) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
FIELDS = (
    *("model_type", "architectures", "quantization_config", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "dtype", "torch_dtype", "hidden_act"),
    *("tie_word_embeddings", "rope_parameters", "rope_theta", "num_local_experts", "auto_map", "attention_bias"),
)


@pytest.mark.filterwarnings("ignore")  # of transformers, about such fields
@settings(max_examples=100, deadline=None)
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_any_field_of_a_config_makes_a_plan_or_is_refused(
    field: str, value: Any, good: Path, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / SINGLE).symlink_to(good / SINGLE)
    (folder / "config.json").write_text(json.dumps(json.loads((good / "config.json").read_text()) | {field: value}))
    with contextlib.suppress(WinaError):
        assert make_plan(open_source(str(folder))).projections


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_with_any_byte_of_its_header_changed_makes_a_plan_or_is_refused(
    data: st.DataObject, good: Path, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("fuzzed")
    content = bytearray((good / SINGLE).read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(content)
    (folder / "config.json").symlink_to(good / "config.json")
    with contextlib.suppress(WinaError):
        assert make_plan(open_source(str(folder))).projections


@pytest.mark.parametrize("fields", [{"hidden_size": 1 << 30}, {"num_hidden_layers": 100_000}])
def test_sizes_of_the_parts_of_a_config_are_bounded_too(fields: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": fields}))
    with pytest.raises(SourceError, match=rf"{next(iter(fields))} in config.json is \d+; at most"):
        open_source(str(tmp_path))
