"""A loaded model saved again: the same files, whatever their number, and an upload of them."""

import json
import shutil
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from support.folders import tensors_of
from support.loaded import equal, logits
from wina_convert import load


def test_saving_gives_back_the_converted_weights_byte_for_byte(wina_tiny, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (wina_tiny / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (wina_tiny, tmp_path))
    assert after["quantization_config"] == before["quantization_config"]


@pytest.mark.parametrize("size", ["5GB", "1MB"])
def test_save_load_save_gives_the_same_files_and_logits(size, wina_tiny, model, tmp_path):
    model.save_pretrained(tmp_path / "first", max_shard_size=size)
    assert equal(tensors_of(tmp_path / "first"), tensors_of(wina_tiny))
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
    assert equal(tensors_of(tmp_path), tensors_of(half))
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
