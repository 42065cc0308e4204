"""Turns a plain model into a gated one, in place, and sets what it skips."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, as_checkpoint_error
from ..format.config import WinaConfig
from ..format.curve import ascends, starts_at_zero
from ..format.grid import check_sparsity
from ..format.names import WEIGHT
from .experts import open_experts, tell_prefill
from .linear import DenseLinear, WinaLinear, gated_modules


def install(model: nn.Module, config: WinaConfig) -> None:
    """Replace the modules that `config.modules` names by empty WinaLinears, on the modules' own device.

    Experts are opened. The linear modules that stay dense become DenseLinears. The names match by dotted suffix:
    `model.layers.0...` of a causal LM is `layers.0...` in its base model.

    Raises:
        CheckpointError: a name matches nothing or something that is not a linear projection.
    """
    with as_checkpoint_error():
        open_experts(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    by_end: dict[str, list[str]] = {}  # a mixture has ten thousands of them
    for name in linears:
        by_end.setdefault(_end(name), []).append(name)
    for gated in config.modules:
        matches = [
            name
            for name in (by_end.get(_end(gated), ()) if "." in gated else linears)
            if f".{name}".endswith(f".{gated}") or f".{gated}".endswith(f".{name}")
        ]
        if len(matches) != 1:
            raise CheckpointError(
                f"config.json gates {gated!r}, which matches {len(matches)} linear projections of this "
                f"{type(model).__name__}; the checkpoint is damaged or not meant for it"
            )
        plain = linears[matches[0]]
        # nn.Linear stores [out, in], Conv1D [in, out]
        in_features, out_features = plain.weight.shape if isinstance(plain, Conv1D) else plain.weight.shape[::-1]
        replacement = WinaLinear(
            in_features,
            out_features,
            config.grid,
            plain.bias is not None,
            plain.weight.dtype,
            plain.weight.device,
            config.biases,
        )
        model.set_submodule(matches[0], replacement)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if config.modules:
        suffix = ".".join(config.modules[0].split(".")[-4:])
        kind = set if isinstance(ignored, set) else list  # it was a list in earlier transformers 5
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), rf"{re.escape(suffix)}\.{WEIGHT}$"])  # type: ignore[assignment]


def _end(name: str) -> str:
    """The last two parts of a dotted name."""
    return ".".join(name.split(".")[-2:])


def configure(model: nn.Module, config: WinaConfig) -> None:
    """Set sparsity and prefill of every gated projection from the config; the weights are loaded.

    Raises:
        CheckpointError: norms, thresholds or biases are no such numbers.
    """
    for name, module in gated_modules(model).items():
        norms = module.column_norms
        good = (norms.isfinite() & (norms >= 0)).all() & ascends(module.thresholds)
        if module.biases is not None:
            good = good & starts_at_zero(module.biases)
        if not good.is_meta and not good:
            raise CheckpointError(
                f"{name}: column norms are not finite and positive, thresholds not ascending from 0, or biases not finite from "
                "0; the checkpoint is damaged: get or convert it again"
            )
        module.dense_prefill = config.prefill == "dense"
        module.set_sparsity(config.sparsity or 0.0)
    if config.prefill == "dense":
        tell_prefill(model)


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Change the sparsity of a loaded model in place; no file is touched.

    Args:
        model: what `load` or `from_pretrained` returned.
        sparsity: fraction of inputs to skip, within [0, 0.95].

    Raises:
        OptionError: the sparsity is outside that range.
        CheckpointError: the model has no gated projection.
    """
    modules = gated_modules(model)
    if not modules:
        raise CheckpointError(f"{type(model).__name__} has no gated projection; load a WINA checkpoint")
    sparsity = check_sparsity(sparsity)
    for module in modules.values():
        module.set_sparsity(sparsity)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, WinaConfig):
        config.sparsity = sparsity
