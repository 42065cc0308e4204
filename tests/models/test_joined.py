"""Parameters that transformers makes of several stored tensors: read joined, converted, saved and loaded again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import WeightRenaming

import wina_convert
from support.families import make_type
from support.folders import tensors_of
from support.reference import assert_close, convert, dense_model, logits, random_prompt
from wina_convert import WinaConfig
from wina_convert.errors import SourceError
from wina_convert.models.source import Source, open_source
from wina_convert.models.tensors import taken
from wina_convert.runtime.classes import auto_class
from wina_convert.runtime.keys import renamed

PARTS = tuple(f"model.layers.0.linear_attn.{one}_conv1d.weight" for one in "qkv")
WHOLE = "model.layers.0.linear_attn.conv1d.weight"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_type("olmo_hybrid", tmp_path_factory.mktemp("hybrid") / "dense", **SMALL)


def edited(dense: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Source:
    """The source with other tensors."""
    folder.mkdir()
    for path in dense.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = tensors_of(dense)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_source(str(folder))


def test_several_tensors_are_read_as_one(dense: Path) -> None:
    stored = tensors_of(dense)
    assert set(PARTS) < set(stored)
    source, unused = taken(open_source(str(dense)))
    assert unused == ()
    assert WHOLE in source.tensors
    assert not set(PARTS) & set(source.tensors)
    expected = torch.cat([stored[name] for name in PARTS])
    assert source.tensors[WHOLE].shape == tuple(expected.shape)
    ((name, found),) = source.read([WHOLE])
    assert name == WHOLE
    assert torch.equal(found, expected)
    assert torch.equal(torch.cat(list(source.rows(WHOLE, 1))), expected)
    assert taken(source)[0].tensors == source.tensors


def test_the_parts_may_lie_in_several_files(dense: Path, tmp_path: Path) -> None:
    tensors, placed = tensors_of(dense), dict.fromkeys(tensors_of(dense), "a.safetensors")
    placed |= {PARTS[0]: "c.safetensors", PARTS[2]: "b.safetensors"}
    for path in dense.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    source, _ = taken(open_source(str(tmp_path)))
    assert {path.name for path in source.files()} == set(placed.values())
    (found,) = dict(source.read([WHOLE])).values()
    assert torch.equal(found, torch.cat([tensors[name] for name in PARTS]))


def test_a_missing_part_is_refused(dense: Path, tmp_path: Path) -> None:
    source = edited(dense, tmp_path / "short", lambda tensors: tensors.pop(PARTS[1]))
    with pytest.raises(SourceError, match="linear_attn"):
        convert(source.path, tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


@pytest.mark.slow
def test_a_checkpoint_is_saved_and_loaded_again(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "gated")
    prompt, plain = random_prompt(2), dense_model(dense)
    model = wina_convert.load(str(tmp_path / "gated"), sparsity=0.0)
    assert_close(logits(model, prompt), logits(plain, prompt))
    assert torch.equal(tensors_of(tmp_path / "gated")[WHOLE], plain.state_dict()[WHOLE])
    wina_convert.set_sparsity(model, 0.5)
    model.save_pretrained(tmp_path / "again")
    again = wina_convert.load(str(tmp_path / "again"), sparsity=0.5)
    assert torch.equal(logits(again, prompt), logits(model, prompt))
    asked = WinaConfig(sparsity=0.5, thresholds=str(tmp_path / "gated"))
    gated = auto_class(plain.config).from_pretrained(dense, quantization_config=asked)
    assert torch.equal(logits(gated, prompt), logits(model, prompt))
    gated.save_pretrained(tmp_path / "third")
    third = wina_convert.load(str(tmp_path / "third"), sparsity=0.5)
    assert torch.equal(logits(third, prompt), logits(model, prompt))


def test_a_name_that_a_rule_would_change_for_nothing_stays() -> None:
    rule = [WeightRenaming(source_patterns=r"\.norm\.", target_patterns=".kv_norm.")]
    state = dict.fromkeys(["model.norm.weight", "model.layers.0.kv_norm.weight"], torch.empty(1, device="meta"))
    found = [renamed(key, rule, [], "model", state)[0] for key in ("model.norm.weight", "model.layers.0.norm.weight")]
    assert found == list(state)
