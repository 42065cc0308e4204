"""Turns a gated model back into the plain one, in place: what `model.dequantize()` does."""

from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from . import decoding
from .experts import opened_experts
from .install import keep_hook
from .linear import DenseLinear, WinaLinear, gated_modules
from .parallel import divided


def restore(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replace the gated projections of a loaded model by plain ones with the same weights: the model at sparsity 0.

    Thresholds, column norms and biases along the sparsity go; the weights become trainable, as those of a plain model are.

    Args:
        model: what `from_pretrained` returned.
        dtype: of the weights that are in the dtype of the model; None: as they are.

    Raises:
        CheckpointError: weights are offloaded, or split among processes.
    """
    gates = gated_modules(model)
    for name, gate in gates.items():
        if gate.weight_t.is_meta or divided(gate.weight_t):
            raise CheckpointError(
                f"the weight of {name} is not whole in this process; load the model without offloading or tensor parallelism, or "
                "run `wina export DIR --out DENSE`"
            )
    for name in list(gates):
        gate = gates.pop(name)  # the last reference, so that one weight at a time is there twice
        model.set_submodule(name, _plain(gate))
    for name, experts in opened_experts(model).items():
        model.set_submodule(name, experts.closed().requires_grad_())
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        if module is not model:
            vars(module).pop("hf_quantizer", None)
    decoding.use(model, False)
    model.config._is_quantized = False
    for parameter in model.parameters() if dtype not in (None, model.config.dtype) else ():
        if parameter.dtype == model.config.dtype:  # others, as buffers, keep their own on purpose
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype or model.config.dtype


def _plain(gate: WinaLinear) -> Any:
    """The module that a gated projection stands for."""
    weight_t, transposed = gate.weight_t.detach(), gate.plain is not nn.Linear
    sizes = (gate.out_features, gate.in_features) if transposed else (gate.in_features, gate.out_features)
    with torch.device("meta"):
        plain: Any = gate.plain(*sizes)
    plain.weight = nn.Parameter(weight_t if transposed else weight_t.t().contiguous())
    plain.bias = None if gate.bias is None else nn.Parameter(gate.bias.detach())
    plain.train(gate.training)
    keep_hook(gate, plain)
    return plain
