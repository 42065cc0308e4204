"""Turns a plain model into a gated one, in place, and sets what it skips."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, as_checkpoint_error
from ..format.config import WinaConfig
from ..format.curve import ascends, starts_at_zero
from ..format.grid import check_sparsity
from ..format.names import WEIGHT, WEIGHT_T, split_layer
from .experts import open_experts, tell_prefill
from .linear import DenseLinear, WinaLinear, gated_modules
from .parallel import at_hand, local


def install(model: nn.Module, config: WinaConfig) -> None:
    """Replace the modules that `config.modules` names by empty WinaLinears, on the modules' own device.

    Experts are opened. The linear modules that stay dense become DenseLinears. The names match by dotted suffix:
    `model.layers.0...` of a causal LM is `layers.0...` in its base model. Where none does, by what follows the index of the
    layer: the text part of a larger model may be loaded alone.

    Raises:
        CheckpointError: a name matches nothing or something that is not a linear projection.
    """
    with as_checkpoint_error():
        open_experts(model)
    for name in _matched(model, config).values():
        plain: Any = model.get_submodule(name)
        model.set_submodule(name, _gate_like(plain, config, plain.weight.device))
    _finish(model, config)


def gate(model: nn.Module, config: WinaConfig, tables: Callable[[str, Tensor], Mapping[str, Tensor]]) -> None:
    """Replace the modules of a loaded model that `config.modules` names by WinaLinears with their weights, one after another.

    Args:
        model: a plain model with its weights.
        config: what to gate.
        tables: from a name of `config.modules` and the transposed weight [in, out] to the other tensors of the projection by
            their names in a checkpoint: `column_norms`, `thresholds` and, where the config says so, `biases`.

    Raises:
        CheckpointError: a name matches nothing or something that is not a linear projection.
    """
    for gated, name in _matched(model, config).items():
        plain: Any = model.get_submodule(name)
        module = _gate_like(plain, config, torch.device("meta"))
        weight = plain.weight.detach()
        found = {WEIGHT_T: weight if isinstance(plain, Conv1D) else weight.t().contiguous()}
        found |= tables(gated, found[WEIGHT_T])
        if plain.bias is not None:
            found["bias"] = plain.bias.detach()
        for leaf, tensor in found.items():
            setattr(module, leaf, nn.Parameter(tensor.to(weight.device), requires_grad=False))
        module.train(plain.training)
        keep_hook(plain, module)
        model.set_submodule(name, module)
        if _place(gated) is None:  # a head that was tied is no longer
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    _finish(model, config)


def keep_hook(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hook that accelerate gave the one it replaces, which brings inputs to the device of the weight."""
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


def _matched(model: nn.Module, config: WinaConfig) -> dict[str, str]:
    """The linear module of the model that each name of `config.modules` means."""
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    by_end: dict[str, list[str]] = {}  # a mixture has ten thousands of them
    by_place: dict[tuple[int, str] | None, list[str]] = {}
    for name in linears:
        by_end.setdefault(_end(name), []).append(name)
        if place := _place(name):
            by_place.setdefault(place, []).append(name)
    found = {}
    for gated in config.modules:
        matches = [
            name
            for name in (by_end.get(_end(gated), ()) if "." in gated else linears)
            if f".{name}".endswith(f".{gated}") or f".{gated}".endswith(f".{name}")
        ] or by_place.get(_place(gated), [])
        if not matches and _place(gated) is None and _headless(model):
            continue
        if len(matches) != 1:
            raise CheckpointError(
                f"config.json gates {gated!r}, which matches {len(matches)} linear projections of this "
                f"{type(model).__name__}; the checkpoint is damaged or not meant for it"
            )
        found[gated] = matches[0]
    return found


def _headless(model: nn.Module) -> bool:
    """Whether it is a base model, loaded without the head that its checkpoint gates."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is None


def _gate_like(plain: Any, config: WinaConfig, device: torch.device) -> WinaLinear:
    """An empty gated projection in place of a linear module."""
    # nn.Linear stores [out, in], Conv1D [in, out]
    in_features, out_features = plain.weight.shape if isinstance(plain, Conv1D) else plain.weight.shape[::-1]
    return WinaLinear(
        in_features,
        out_features,
        config.grid,
        plain.bias is not None,
        plain.weight.dtype,
        device,
        config.biases,
        Conv1D if isinstance(plain, Conv1D) else nn.Linear,
        config.low_rank,
    )


def _finish(model: nn.Module, config: WinaConfig) -> None:
    """What else a gated model has: quick dense projections, and a sentinel that is no surprise in its checkpoint."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if config.modules:
        suffix = ".".join(config.modules[0].split(".")[-4:])
        kind = set if isinstance(ignored, set) else list  # it was a list in earlier transformers 5
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), rf"{re.escape(suffix)}\.{WEIGHT}$"])  # type: ignore[assignment]


def _place(name: str) -> tuple[int, str] | None:
    """The index of a module's decoder layer, and its name in there."""
    place = split_layer(name)
    return place[1:] if place else None


def _end(name: str) -> str:
    """The last two parts of a dotted name."""
    return ".".join(name.split(".")[-2:])


def configure(model: nn.Module, config: WinaConfig) -> None:
    """Freeze every gated projection, and set its sparsity and prefill from the config; the weights are loaded.

    Raises:
        CheckpointError: norms, thresholds or biases are no such numbers.
    """
    for name, module in gated_modules(model).items():
        norms = local(module.column_norms)
        good = (norms.isfinite() & (norms >= 0)).all() & ascends(local(module.thresholds))
        if module.biases is not None:
            good = good & starts_at_zero(local(module.biases))
        if at_hand(module.weight_t) and not good:
            raise CheckpointError(
                f"{name}: column norms are not finite and positive, thresholds not ascending from 0, or biases not finite from "
                "0; the checkpoint is damaged: get or convert it again"
            )
        for parameter in module.parameters():  # transformers makes what it loads trainable
            parameter.requires_grad_(False)
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
