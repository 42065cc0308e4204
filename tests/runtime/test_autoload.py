"""A WINA checkpoint in transformers: it loads by every door, and without the package by none."""

import json
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModel,
)
from transformers.quantizers import auto

import wina_convert
from support.edits import edit_json
from support.processes import in_new_process
from wina_convert import WinaConfig
from wina_convert.runtime import autoload, loader

# Registration


LOAD = """
import json, sys
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
gated = [name for name, module in model.named_modules() if type(module).__name__ == "WinaLinear"]
imported = sorted(name for name in sys.modules if name.startswith("wina_convert"))
print(json.dumps([gated, model.config.quantization_config.sparsity, imported]))
"""


@pytest.mark.slow
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
    ground = {"wina_convert", *(f"wina_convert.{name}" for name in ("errors", "architectures", "defaults"))}
    rooms = {name for name in imported if name.split(".")[1:2] in (["format"], ["runtime"])}
    assert set(imported) == rooms | ground
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


@pytest.mark.slow
def test_without_the_package_nothing_loads_and_the_error_says_what_to_install(model, wina_tiny, half, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    AutoModel.from_pretrained(wina_tiny).save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "bare")
    edit_json("config.json", lambda config: config.pop("transformers_weights"))(
        tmp_path / "bare"
    )  # the empty tensor is left
    converted = [str(wina_tiny), str(half)]
    again = [str(tmp_path / name) for name in ("saved", "shards", "base", "part", "bare")]
    doors = [["AutoModelForCausalLM", *converted, *again], ["AutoModel", *converted, *again]]
    doors += [["AutoModelForSequenceClassification", *converted], ["LlamaForCausalLM", *converted[:1]]]
    found, _ = in_new_process(WITHOUT, json.dumps(doors), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert len(found) == 17
    assert [(door, Path(folder).name) for door, folder, error in found if error is None] == []
    said = {folder for _, folder, error in found if "pip install wina-convert" in error}
    assert said == {*converted, *again} - {str(tmp_path / "bare")}
