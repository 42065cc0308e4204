"""What the plug-in for vLLM uses of it, with the signatures and the order of calls of vLLM 0.32.0.

vLLM itself asks for other versions than this package is tested with: tests/serving/test_vllm_serves.py runs it where it is.
"""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class QuantizationConfig:
    """vllm/model_executor/layers/quantization/base_config.py"""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}  # a model of vLLM fills it in before its layers are made


class LinearMethodBase:
    """vllm/model_executor/layers/linear.py"""


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """LinearBase and its children: a method is asked for, then for the weights; tensors come by name and shard."""

    def __init__(
        self, inputs: int, outputs: list[int], bias: bool, dtype: torch.dtype, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.skip_bias_add = False
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        if isinstance(self.quant_method, UnquantizedLinearMethod):
            return
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=outputs,
            input_size=inputs,
            output_size=sum(outputs),
            params_dtype=dtype,
            weight_loader=None,
        )
        own = nn.Parameter(torch.zeros(sum(outputs), dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", own)

    def load(self, tensors: Mapping[str, Tensor], shard: Any = None) -> None:
        """As `load_weights` of the fused layers does for each tensor of a projection."""
        for name, tensor in tensors.items():
            parameter = getattr(self, name)
            if shard is None:
                parameter.weight_loader(parameter, tensor)  # as `AutoWeightsLoader` does
            else:
                parameter.weight_loader(parameter, tensor, shard)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)


def install(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the stand-ins where vLLM's modules would be.

    Returns:
        `server`, what `get_current_vllm_config` gives, to be changed; and `registered`, the quantization methods by name.
    """
    server = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1), lora_config=None)
    registered: dict[str, type] = {}

    def register_quantization_config(name: str) -> Any:
        return lambda method: registered.setdefault(name, method)

    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: server},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {"register_quantization_config": register_quantization_config},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, "wina_convert.serving.vllm", raising=False)
    return SimpleNamespace(server=server, registered=registered)
