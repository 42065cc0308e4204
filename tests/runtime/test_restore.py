"""`model.dequantize()` gives the plain model, and what cannot hold a gated one says to take it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.families import make_model
from support.folders import tensors_of, write_biases
from support.loaded import PROMPT, equal, greedy, logits
from wina_convert import convert, load
from wina_convert.errors import CheckpointError, OptionError, WinaError
from wina_convert.runtime.linear import DenseLinear, WinaLinear

pytestmark = pytest.mark.slow


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "phi3"])
def test_a_dequantized_model_is_the_source(family: str, tmp_path: Path):
    source = make_model(family, tmp_path / "source", torch.bfloat16 if family == "phi3" else torch.float32)
    convert(str(source), tmp_path / "wina", basis="none", samples=4, seq_len=16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    model = load(str(tmp_path / "wina"))
    assert model.dequantize() is model
    assert classes(model) == classes(expected)
    assert equal(dict(model.state_dict()), dict(expected.state_dict()))
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(greedy(model), greedy(expected))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "expected")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_parts_of_a_dequantized_model_are_saved_plain(wina_tiny: Path, tmp_path: Path):
    model = load(str(wina_tiny))
    model.dequantize()
    model.model.save_pretrained(tmp_path)
    assert not any(name.endswith((".weight_t", ".thresholds")) for name in tensors_of(tmp_path))
    assert "layers.0.mlp.up_proj.weight" in tensors_of(tmp_path)
    assert not getattr(model, "is_quantized", True)


def test_learned_biases_go_with_the_thresholds(wina_tiny: Path, dense: PreTrainedModel, tmp_path: Path):
    learned = write_biases(Path(shutil.copytree(wina_tiny, tmp_path / "wina")))
    model = load(str(learned))
    model.dequantize()
    assert torch.equal(logits(model), logits(dense))


def test_another_dtype_can_be_asked_for(wina_tiny: Path, tiny: Path):
    model = load(str(wina_tiny))
    model.dequantize(torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    assert equal(dict(model.state_dict()), dict(expected.state_dict()))
    assert torch.equal(logits(model), logits(expected))


def test_an_offloaded_model_is_refused_and_stays(wina_tiny: Path, tmp_path: Path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", **{f"model.layers.{n}": "disk" for n in (1, 2, 3)}}
    model = AutoModelForCausalLM.from_pretrained(wina_tiny, device_map=places, offload_folder=tmp_path)
    before = classes(model)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj is not whole .*wina export"):
        model.dequantize()
    assert classes(model) == before


class Logits(nn.Module):
    """A model as exporters take it: a tensor in, a tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


WAYS = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, PROMPT),
    "torch.jit.trace without gradients": lambda model: torch.no_grad()(torch.jit.trace)(model, PROMPT),
    "torch.jit.script": lambda model: torch.jit.script(model),
    "torch.onnx.export, older": lambda model: torch.onnx.export(model, (PROMPT,), "none.onnx", dynamo=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_graphs_that_cannot_hold_a_gated_model_say_to_take_the_dense_one(way: Any, model: PreTrainedModel):
    with pytest.raises(OptionError, match=r"TorchScript or ONNX.*`wina export DIR --out DENSE`.*model\.dequantize\(\)"):
        way(Logits(model))


def test_so_does_the_onnx_export_that_torch_export_feeds(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    # as the exporter does, which needs packages that the tests do not
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(WinaError, match=r"TorchScript or ONNX"):
        torch.export.export(Logits(model), (PROMPT,), strict=False)
    monkeypatch.undo()
    torch.export.export(Logits(model), (PROMPT,), strict=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_the_dense_model_can_be_traced(wina_tiny: Path):
    model = load(str(wina_tiny))
    assert DenseLinear in classes(model)
    model.dequantize()
    assert not {DenseLinear, WinaLinear} & set(classes(model))
    traced = torch.jit.trace(Logits(model), PROMPT)
    other = PROMPT.flip(1)
    torch.testing.assert_close(traced(other), logits(model, other), rtol=0, atol=1e-4)
