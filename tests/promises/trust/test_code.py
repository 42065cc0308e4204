"""A checkpoint from a stranger: none of its code runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.breaking import failing
from support.commands import refused, succeeded
from support.edits import edit_config, edit_fields
from support.strangers import COMMANDS, READERS, all_refuse, command, logits_of, plain
from wina_convert import load
from wina_convert.errors import CheckpointError, WinaError
from wina_convert.format.manifest import write_manifest
from wina_convert.verbs.inspect import inspect_checkpoint
from wina_convert.verbs.verify import verify_folder


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "ran"))


def pickle_only(folder: Path, marker: Path, name: str) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    torch.save({"model.norm.weight": torch.ones(16), "payload": Payload(marker)}, folder / name)


@pytest.mark.parametrize("weights", ["pip install wina-convert", None])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_refused_and_not_read(name: str, weights: str | None, single: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    pickle_only(single, marker, name)
    if "-of-" in name:
        (single / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}})
        )
    edit_config(transformers_weights=name if name == "adapter_model.bin" else weights)(single)
    write_manifest(single)
    all_refuse(single)
    with pytest.raises((CheckpointError, OSError)):
        plain(single)
    assert not marker.exists()
    torch.load(single / name, weights_only=False)
    assert marker.exists()  # it would have run


@pytest.fixture
def own_code(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint with Python files that write a file when they run, and that file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    marker = tmp_path / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
    classes = (  # not transformers' own: it would remember for good that they are code of a folder
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig): pass\n"
        "class Own(LlamaForCausalLM): config_class = OwnConfig\n"
    )
    for name in ("own.py", "modeling_llama.py", "tokenization_own.py", "custom_generate/generate.py"):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text(code + classes + "def generate(*args, **kwargs): pass\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit_config(auto_map=auto_map)(single)
    edit_fields("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})(single)
    return single, marker


def test_code_in_the_folder_does_not_run(own_code: tuple[Path, Path], logits: Tensor):
    folder, marker = own_code
    write_manifest(folder)
    assert torch.equal(logits_of(load(str(folder))), logits)
    assert torch.equal(logits_of(plain(folder)), logits)
    verify_folder(folder)
    inspect_checkpoint(folder)
    for name in COMMANDS:
        succeeded(command(name, folder))
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_that_the_model_or_tokenizer_needs_is_refused(model_type: str, own_code: tuple[Path, Path]):
    folder, marker = own_code
    edit_config(model_type=model_type)(folder)
    edit_fields("tokenizer_config.json", tokenizer_class="Own")(folder)
    write_manifest(folder)
    refused(command("wina generate", folder))
    if model_type == "own":  # what builds no model reads headers alone
        for name in ("load", "verify"):
            with pytest.raises(WinaError, match="cannot"):
                READERS[name](folder)
    assert not marker.exists()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) if model_type == "llama" else None
    # where the user allows it, it is theirs to run: the code is live
    assert marker.exists() == (model_type == "llama")


ATTENTION = ["kernels-community/flash-attn", "lab/evil:forward", "https://example.org/kernel", {"": "lab/evil"}]


@pytest.mark.parametrize("value", ATTENTION, ids=str)
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_that_would_be_downloaded_is_refused(
    field: str, value: Any, single: Path, logits: Tensor, monkeypatch: pytest.MonkeyPatch
):
    edit_config(**{field: value})(single)
    write_manifest(single)
    if field.endswith("_internal"):  # transformers takes no notice of it
        assert torch.equal(logits_of(load(str(single))), logits)
        return
    with monkeypatch.context() as context:  # transformers, which would download it, is not asked
        context.setattr(AutoModelForCausalLM, "from_pretrained", failing(AssertionError("transformers was asked")))
        all_refuse(single, field, "code to download")
