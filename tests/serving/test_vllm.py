"""The plug-in for vLLM, against the interface of vLLM: what a layer computes, what is refused."""

import importlib
import shutil
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import ROOT, vllm_interface
from support.edits import edit_tensors
from support.processes import in_new_process
from wina_convert.architectures import ARCHITECTURES
from wina_convert.errors import CheckpointError
from wina_convert.format.config import WinaConfig

GRID = [0.0, 0.5, 0.9]
INPUTS = 24
QKV = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return vllm_interface.install(monkeypatch)


@pytest.fixture
def plugin(vllm: SimpleNamespace) -> ModuleType:
    return importlib.import_module("wina_convert.serving.vllm")


def projection(
    outputs: int, bias: bool = False, biases: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a random gated projection."""
    weight_t = torch.randn(INPUTS, outputs).to(dtype)
    weight_t[3] = 0  # its norm is 0
    tensors = {
        "weight_t": weight_t,
        "column_norms": weight_t.float().norm(dim=1),
        "thresholds": torch.tensor([0.0, 2.0, 4.0]) * torch.rand(()).add(0.5),
    }
    if bias:
        tensors["bias"] = torch.randn(outputs).to(dtype)
    if biases:
        tensors["biases"] = torch.randn(3, outputs) * torch.tensor([0.0, 1.0, 2.0])[:, None]
    return tensors


def expected(x: Tensor, tensors: dict[str, Tensor], sparsity: float) -> np.ndarray:
    """The specification in float64."""
    stored = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    if "weight" in stored:
        return x.double().numpy() @ stored["weight"].T + stored.get("bias", 0)
    threshold = np.interp(sparsity, GRID, stored["thresholds"])
    kept = np.abs(x.double().numpy()) * stored["column_norms"] > threshold
    y = (x.double().numpy() * kept) @ stored["weight_t"] + stored.get("bias", 0)
    shift = stored.get("biases", np.zeros((3, 1)))
    return y + np.array([np.interp(sparsity, GRID, column) for column in shift.T])


def make(plugin: ModuleType, prefix: str, parts: dict[str, dict[str, Tensor]], sparsity: float, **changes: Any) -> Any:
    """The layer of vLLM that computes these projections, loaded as vLLM does it."""
    home = prefix.rpartition(".")[0]
    gated = [f"{home}.{name}" for name, tensors in parts.items() if "weight_t" in tensors]
    first = next(iter(parts.values()))
    stored = {"sparsity": sparsity, "grid": GRID, "modules": gated, "biases": "biases" in first} | changes
    config = plugin.WinaVllmConfig.from_config(WinaConfig(**stored).to_dict())
    config.packed_modules_mapping.update(PACKED)
    sizes = [
        len(tensors["weight"]) if "weight" in tensors else tensors["weight_t"].shape[1] for tensors in parts.values()
    ]
    bias, dtype = "bias" in first, next(iter(first.values())).dtype
    layer = vllm_interface.LinearBase(INPUTS, sizes, False, dtype, config, prefix)
    if bias:
        values = torch.cat([tensors["bias"] for tensors in parts.values()])
        layer.bias = torch.nn.Parameter(values, requires_grad=False)
    for name, tensors in parts.items():
        layer.load({leaf: tensor for leaf, tensor in tensors.items() if leaf != "bias"}, SHARDS.get(name))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize(("bias", "biases"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_each_part_of_a_fused_layer_is_gated_by_itself(plugin, rows, bias, biases, sparsity):
    parts = {name: projection(outputs, bias, biases) for name, outputs in QKV.items()}
    layer = make(plugin, "model.layers.0.self_attn.qkv_proj", parts, sparsity)
    x = torch.randn(rows, INPUTS)
    wanted = np.concatenate([expected(x, tensors, sparsity) for tensors in parts.values()], axis=1)
    np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-4, atol=1e-5)
    kept = [expected(x, tensors, 0.0) for tensors in parts.values()]
    assert np.allclose(wanted, np.concatenate(kept, axis=1)) == (sparsity == 0)


@pytest.mark.parametrize("dense", QKV)
def test_a_part_that_the_checkpoint_leaves_dense_reads_every_input(plugin, dense):
    parts = {name: projection(outputs) for name, outputs in QKV.items()}
    parts[dense] = {"weight": torch.randn(QKV[dense], INPUTS)}
    layer = make(plugin, "model.layers.0.self_attn.qkv_proj", parts, 0.7)
    x = torch.randn(5, INPUTS)
    wanted = np.concatenate([expected(x, tensors, 0.7) for tensors in parts.values()], axis=1)
    np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.qkv_proj"])
def test_a_projection_that_the_checkpoint_stores_as_one_is_gated_as_one(plugin, prefix, dtype):
    tensors = projection(32, bias=True, dtype=dtype)
    layer = make(plugin, prefix, {prefix.rpartition(".")[2]: tensors}, 0.5)
    x = torch.randn(2, INPUTS).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    assert layer(x).dtype == dtype
    np.testing.assert_allclose(layer(x).float().numpy(), expected(x, tensors, 0.5), rtol=tolerance, atol=tolerance)


def test_a_bias_that_the_layer_hands_on_is_not_added_twice(plugin):
    tensors = projection(8, bias=True, biases=True)
    layer = make(plugin, "model.layers.0.mlp.down_proj", {"down_proj": tensors}, 0.5)
    layer.skip_bias_add = True
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, INPUTS)
    without = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    np.testing.assert_allclose(layer(x).numpy(), expected(x, without, 0.5), rtol=1e-4, atol=1e-5)


def test_the_empty_tensor_of_the_first_projection_changes_nothing(plugin):
    tensors = projection(8)
    layer = make(plugin, "model.layers.0.mlp.down_proj", {"down_proj": tensors}, 0.5)
    x = torch.randn(2, INPUTS)
    before = layer(x)
    layer.load({"weight": torch.empty(0)})
    assert torch.equal(layer(x), before)


def test_what_is_not_gated_is_left_to_vllm(plugin):
    config = plugin.WinaVllmConfig(WinaConfig(modules=["model.layers.0.mlp.down_proj"]))
    layer = vllm_interface.LinearBase(INPUTS, [8], False, torch.float32, config, "model.layers.0.mlp.up_proj")
    assert isinstance(layer.quant_method, vllm_interface.UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


# Refusals


def test_the_types_that_are_served_are_those_that_the_readme_says(plugin):
    assert set(plugin.TRIED) == set(ARCHITECTURES) - {"gpt_neox"}


@pytest.mark.parametrize("leaf", ["weight_t", "column_norms", "thresholds", "biases"])
def test_a_tensor_that_is_missing_is_named(plugin, leaf):
    parts = {name: projection(outputs, biases=True) for name, outputs in QKV.items()}
    config = plugin.WinaVllmConfig(WinaConfig(grid=GRID, modules=[f"m.{name}" for name in QKV], biases=True))
    config.packed_modules_mapping.update(PACKED)
    layer = vllm_interface.LinearBase(INPUTS, list(QKV.values()), False, torch.float32, config, "m.qkv_proj")
    for name, tensors in parts.items():
        layer.load(
            {other: tensor for other, tensor in tensors.items() if (name, other) != ("v_proj", leaf)}, SHARDS[name]
        )
    with pytest.raises(CheckpointError, match=rf"has no tensor m\.v_proj\.{leaf}; get it again"):
        layer.quant_method.process_weights_after_loading(layer)
    layer.load({leaf: parts["v_proj"][leaf]}, "v")
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("thresholds", torch.tensor([0.0, 2.0, 1.0])),
        ("thresholds", torch.tensor([0.0, 1.0, torch.inf])),
        ("column_norms", torch.full((INPUTS,), -1.0)),
        ("column_norms", torch.full((INPUTS,), torch.nan)),
        ("biases", torch.ones(3, 8)),
        ("weight_t", torch.ones(INPUTS, 1)),
        ("column_norms", torch.ones(1)),
    ],
)
def test_a_damaged_tensor_is_refused(plugin, leaf, value):
    tensors = projection(8, biases=True)
    make(plugin, "m.down_proj", {"down_proj": tensors}, 0.5)
    with pytest.raises(CheckpointError, match="get the checkpoint again"):
        make(plugin, "m.down_proj", {"down_proj": tensors | {leaf: value}}, 0.5)


def test_a_dense_prefill_is_refused(plugin):
    plugin.WinaVllmConfig(WinaConfig(prefill="gated"))
    with pytest.raises(CheckpointError, match=r'set quantization_config\.prefill of config\.json to "gated"'):
        plugin.WinaVllmConfig(WinaConfig(prefill="dense"))


def test_a_type_that_was_not_tried_is_refused_and_a_damaged_folder_too(plugin, wina_tiny, tmp_path):
    config = plugin.WinaVllmConfig(WinaConfig())
    config.maybe_update_config(str(wina_tiny), hf_config=SimpleNamespace(model_type="llama"), revision=None)
    with pytest.raises(CheckpointError, match="is of type mixtral; use `transformers serve`"):
        config.maybe_update_config("USER/NAME", hf_config=SimpleNamespace(model_type="mixtral"))
    folder = Path(shutil.copytree(wina_tiny, tmp_path / "copy"))
    edit_tensors(lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.thresholds"))(folder)
    with pytest.raises(CheckpointError, match="thresholds"):
        config.maybe_update_config(str(folder), hf_config=SimpleNamespace(model_type="llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_config": SimpleNamespace(world_size=2)}, "tensor and pipeline parallelism are not supported"),
        ({"lora_config": object()}, "leave --enable-lora out"),
    ],
)
def test_a_server_that_splits_the_model_or_adds_adapters_is_refused(plugin, vllm, change, message):
    tensors = {"down_proj": projection(8)}
    make(plugin, "m.down_proj", tensors, 0.5)
    vars(vllm.server).update(change)
    with pytest.raises(CheckpointError, match=message):
        make(plugin, "m.down_proj", tensors, 0.5)


# Registration


def test_vllm_finds_the_plug_in_by_its_entry_point(vllm):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["wina_convert"].partition(":")
    for _ in range(2):  # vLLM calls it in every process, in one perhaps twice
        getattr(importlib.import_module(module), function)()
    assert {name: method.__name__ for name, method in vllm.registered.items()} == {"wina": "WinaVllmConfig"}


@pytest.mark.slow
def test_nothing_else_imports_the_plug_in():
    code = "import json, sys, wina_convert.cli, wina_convert.runtime.loader; print(json.dumps(list(sys.modules)))"
    imported, _ = in_new_process(code)
    assert "wina_convert.runtime.loader" in imported
    assert not [name for name in imported if name.startswith(("vllm", "wina_convert.serving"))]
