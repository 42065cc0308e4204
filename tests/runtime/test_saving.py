"""A loaded model saved again: the same files, whatever their number. Uploads are in tests/models/test_upload.py."""

import copy
import json
import pickle

import pytest
import torch

from support.folders import tensors_of
from support.loaded import equal, logits
from wina_convert import load


def test_saving_gives_back_the_converted_weights_byte_for_byte(wina_tiny, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (wina_tiny / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (wina_tiny, tmp_path))
    for name in ("quantization_config", "transformers_weights"):
        assert after[name] == before[name]


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


def test_a_copy_of_a_model_pushes_itself_to_the_hub(model):
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.push_to_hub.args == (copied,)
        assert copied.hf_quantizer.folder == model.hf_quantizer.folder
