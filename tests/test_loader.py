"""A WINA checkpoint in transformers: loading by every door, running, saving, and failing closed."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)
from transformers.quantizers import auto

import wina_convert
from wina_convert import WinaConfig, convert, load, set_sparsity
from wina_convert.errors import CheckpointError, OptionError
from wina_convert.runtime import autoload, loader
from wina_convert.runtime.linear import WinaLinear, gated_modules

EXACT = ("column_norms", "thresholds", "tau")
PROMPT = torch.tensor([[0, 310, 7, 1999, 45, 45, 3, 800, 12, 64]])
BAD = [-0.01, 0.951, 1, 40, float("nan"), float("inf"), "0.5", True, [0.5]]


@pytest.fixture(scope="module")
def model(wina_tiny: Path) -> PreTrainedModel:
    """The converted model. Shared: do not change it."""
    return AutoModelForCausalLM.from_pretrained(wina_tiny)


@pytest.fixture(scope="module")
def dense(tiny: Path) -> PreTrainedModel:
    """The source model. Shared: do not change it."""
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint with biases."""
    folder = tmp_path_factory.mktemp("half")
    convert(str(make_model("qwen2", folder / "source", torch.bfloat16)), folder / "wina", samples=8, seq_len=32)
    return folder / "wina"


@pytest.fixture
def damaged(wina_tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(wina_tiny, tmp_path / "copy"))


def logits(model: PreTrainedModel, tokens: Tensor = PROMPT) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def greedy(model: PreTrainedModel, tokens: Tensor = PROMPT, new: int = 12, **options: Any) -> Tensor:
    found = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    return found[:, tokens.shape[1] :]


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the stored quantization_config; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text("utf-8"))
    block = {**content["quantization_config"], **changes}
    content["quantization_config"] = {name: value for name, value in block.items() if value is not None}
    path.write_text(json.dumps(content), "utf-8")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    same = all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a.keys() & b.keys())
    return a.keys() == b.keys() and same


def in_new_process(code: str, *args: Any, **env: str) -> tuple[Any, str]:
    """Run Python code, warnings being errors; what it printed last, as JSON, and its stderr."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


# Registration


READERS = [
    ".architectures",
    ".checkpoint",
    ".config",
    ".dtypes",
    ".errors",
    ".progress",
    ".scoring",
    ".shards",
    ".source",
]
READERS += [".stream", ".trust"]
LOAD = """
import json, sys
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
gated = [name for name, module in model.named_modules() if type(module).__name__ == "WinaLinear"]
imported = sorted(name for name in sys.modules if name.startswith("wina_convert"))
print(json.dumps([gated, model.config.quantization_config.sparsity, imported]))
"""


@pytest.mark.parametrize(
    ("imports", "discovery"),
    [
        ("from transformers import AutoModelForCausalLM", True),
        ("import transformers.quantizers.auto, torch; from transformers import AutoModelForCausalLM", True),
        ("import wina_convert; from transformers import AutoModelForCausalLM", False),
        ("import transformers.quantizers.auto, wina_convert; from transformers import AutoModelForCausalLM", False),
    ],
    ids=["package never imported", "table first", "package first", "package after the table"],
)
def test_a_checkpoint_loads_in_a_new_process_and_brings_in_the_runtime_alone(imports, discovery, wina_tiny):
    (gated, sparsity, imported), stderr = in_new_process(
        imports + LOAD, wina_tiny, **({} if discovery else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    )
    assert gated == json.loads((wina_tiny / "config.json").read_text())["quantization_config"]["modules"]
    assert sparsity == 0.5
    assert stderr == ""
    package = Path(wina_convert.__file__).parent
    runtime = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in (package / "runtime").rglob("*.py")
    }
    assert set(imported) <= runtime | {f"wina_convert{name}" for name in ("", *READERS)}
    assert "wina_convert.runtime.loader" in imported


def test_importing_the_package_imports_nothing_heavy():
    code = "import json, sys, wina_convert; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    imported, _ = in_new_process(code)
    assert not {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "click", "tqdm"} & set(imported)


def test_the_public_names_are_there_and_others_are_not():
    for name in wina_convert.__all__:
        assert getattr(wina_convert, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        wina_convert.lode  # noqa: B018


def test_registering_again_changes_nothing():
    before = dict(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES, list(sys.meta_path)
    loader.register()
    autoload.register()
    autoload.arm()
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), auto.LOADING_ATTRIBUTES_CONFIG_TYPES, list(sys.meta_path)) == before
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(WinaConfig) == 1


def test_a_loader_that_cannot_be_imported_warns_and_does_not_break_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "wina_convert.runtime.loader", None)
    with pytest.warns(UserWarning, match="could not register its loader"):
        autoload.register()


# Without the package


WITHOUT = """
import json, sys, transformers
sys.modules["wina_convert"] = None  # importing it fails from here on
found = []
for door, *folders in json.loads(sys.argv[1]):
    for folder in folders:
        try:
            getattr(transformers, door).from_pretrained(folder)
            found.append([door, folder, None])
        except Exception as error:
            found.append([door, folder, str(error)])
print(json.dumps(found))
"""


def test_without_the_package_nothing_loads_and_the_error_says_what_to_install(model, wina_tiny, half, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    AutoModel.from_pretrained(wina_tiny).save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "part")
    converted = [str(wina_tiny), str(half)]
    again = [str(tmp_path / name) for name in ("saved", "shards", "base", "part")]
    doors = [["AutoModelForCausalLM", *converted, *again], ["AutoModel", *converted, *again]]
    doors += [["AutoModelForSequenceClassification", *converted], ["LlamaForCausalLM", *converted[:1]]]
    found, _ = in_new_process(WITHOUT, json.dumps(doors), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert len(found) == 15
    assert [(door, Path(folder).name) for door, folder, error in found if error is None] == []
    assert all("pip install wina-convert" in error for _, folder, error in found if folder in converted)


# Choosing the sparsity and the prefill


def cutoffs_of(folder: Path, name: str, sparsity: float) -> np.ndarray:
    """tau from the stored tensors, in float64."""
    stored = weights(folder)
    grid = json.loads((folder / "config.json").read_text())["quantization_config"]["grid"]
    threshold = np.interp(sparsity, grid, stored[f"{name}.thresholds"].double().numpy())
    return threshold / stored[f"{name}.column_norms"].double().numpy()


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
    stored = weights(damaged)
    short = {name: tensor[:11] if name.endswith(".thresholds") else tensor for name, tensor in stored.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in short.items()}, damaged / "model.safetensors", {"format": "pt"}
    )
    edit(damaged, grid=[round(0.05 * k, 2) for k in range(11)])
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


@pytest.mark.parametrize("version", [0, 2, "1", None])
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
    stored = weights(damaged)
    del stored[f"model.layers.1.mlp.up_proj.{leaf}"]
    save_file(stored, damaged / "model.safetensors", {"format": "pt"})
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=leaf if leaf != "weight_t" else "up_proj"):
            read(damaged)


# Saving


def test_saving_gives_back_the_converted_weights_byte_for_byte(wina_tiny, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (wina_tiny / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (wina_tiny, tmp_path))
    assert after["quantization_config"] == before["quantization_config"]


@pytest.mark.parametrize("size", ["5GB", "1MB"])
def test_save_load_save_gives_the_same_files_and_logits(size, wina_tiny, model, tmp_path):
    model.save_pretrained(tmp_path / "first", max_shard_size=size)
    assert equal(weights(tmp_path / "first"), weights(wina_tiny))
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", max_shard_size=size)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("first", "second")]
    assert files[0] == files[1]
    assert (len(files[0]) > 4) == (size == "1MB")
    for name in files[0]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert torch.equal(logits(again), logits(model))


def test_a_bfloat16_checkpoint_with_biases_round_trips(half, tmp_path):
    load(half).save_pretrained(tmp_path)
    assert equal(weights(tmp_path), weights(half))
    assert torch.equal(logits(load(tmp_path)), logits(load(half)))


def test_push_to_hub_uploads_what_was_saved(model, tmp_path, monkeypatch):
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> Any:
        return type("RepoUrl", (), {"repo_id": repo_id})

    def create_commit(api: HfApi, repo_id: str, operations: list[Any], **options: Any) -> str:
        assert repo_id == "somebody/model"
        for operation in operations:
            shutil.copyfile(operation.path_or_fileobj, uploaded / operation.path_in_repo)
        return "done"

    def no_card(*args: Any, **options: Any) -> None:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    assert model.push_to_hub("somebody/model") == "done"
    model.save_pretrained(tmp_path / "saved")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (uploaded / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    assert json.loads((uploaded / "config.json").read_text())["quantization_config"]["quant_method"] == "wina"
    assert torch.equal(logits(load(uploaded)), logits(model))


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
    stored = weights(folder)
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
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


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


def test_generate_samples_and_searches_beams(model):
    for options in ({"do_sample": True}, {"num_beams": 3}):
        found = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, **options)
        assert found.shape == (1, PROMPT.shape[1] + 8)


def test_a_left_padded_batch_gives_what_single_rows_give(model):
    rows = [PROMPT[:, :4], PROMPT, PROMPT[:, 2:9]]
    width = max(row.shape[1] for row in rows)
    pad = model.config.pad_token_id
    tokens = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.arange(width)[None] >= width - row.shape[1] for row in rows]).long()
    together = greedy(model, tokens, attention_mask=mask)
    assert torch.equal(together, torch.cat([greedy(model, row) for row in rows]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch imports its own past
def test_a_compiled_model_is_one_graph_and_equals_the_eager_one(tmp_path):
    convert(
        str(make_model("llama", tmp_path / "source", num_hidden_layers=1)), tmp_path / "wina", samples=8, seq_len=32
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
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_weights_of_gated_projections_can_be_looked_at(model, dense):
    for name, gate in gated_modules(model).items():
        assert isinstance(gate, WinaLinear)
        assert torch.equal(gate.weight, dense.get_submodule(name).weight)
