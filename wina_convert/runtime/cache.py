"""The growing cache of a gated model: keys and values lie in memory that has room for the tokens to come.

transformers' growing cache makes a new tensor of all keys and values for every token, which shows once the weights are skipped.
Here a token is written behind the others. Only memory that nobody has seen is written: whatever the cache gave away before stays
as it was.

The loader imports this when transformers is complete.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .grouping import SWITCH

ROOM = 256  # tokens for which there is room behind the last one


@dataclass(frozen=True)
class _Filled:
    """Memory [batch, kv_heads, capacity, size] and its part that holds tokens [batch, kv_heads, length, size]."""

    memory: Tensor
    tokens: Tensor


class RoomyLayer(DynamicLayer):
    """transformers' DynamicLayer, whose keys and values are views of longer tensors while no gradient is asked for."""

    filled: tuple[_Filled, _Filled] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values with these [batch, kv_heads, new, size] behind them, each [batch, kv_heads, length, size]."""
        if not self.is_initialized or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.filled = None
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.filled or (None, None)
        self.filled = _appended(self.keys, key_states, keys), _appended(self.values, value_states, values)
        self.keys, self.values = self.filled[0].tokens, self.filled[1].tokens
        return self.keys, self.values


def _appended(tokens: Tensor, new: Tensor, filled: _Filled | None) -> _Filled:
    """The tokens with new ones behind them: in the same memory if they are exactly what was put there last and all fits."""
    length = tokens.shape[-2] + new.shape[-2]
    # Behind another tensor, a cropped one above all, may lie tokens that somebody else still holds.
    mine = filled is not None and tokens is filled.tokens and (tokens.dtype, tokens.device) == (new.dtype, new.device)
    if filled is None or not mine or length > filled.memory.shape[-2] or _closed(filled.memory):
        grown = torch.cat([tokens, new], dim=-2)
        memory = grown.new_empty((*grown.shape[:-2], length + ROOM, grown.shape[-1]))
        memory[..., :length, :] = grown
    else:
        memory = filled.memory
        memory[..., tokens.shape[-2] : length, :] = new
    return _Filled(memory, memory[..., :length, :])


def _closed(memory: Tensor) -> bool:
    """Whether torch lets nobody write to it here: it comes from inference mode, which has been left."""
    return memory.is_inference() and not torch.is_inference_mode_enabled()


def use(model: nn.Module, used: bool = True) -> None:
    """Let a model keep what it is given as `past_key_values` in such layers, or no longer."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _make_room:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    if used and os.environ.get(SWITCH) != "0":
        model.register_forward_pre_hook(_make_room, with_kwargs=True)


def _make_room(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Change the layers of a plain growing cache; any other cache, and layers of any other kind, stay as they are."""
    cache = kwargs.get("past_key_values")
    if torch.compiler.is_compiling() or type(cache) is not DynamicCache or cache.offloading:
        return
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
