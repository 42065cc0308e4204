"""What one decoder layer hands on to the next, as one tensor of features for every token.

Most hand on hidden states and nothing else. In Gemma 3n and Gemma 4 later layers take the keys and values of earlier ones: they
travel behind the hidden states from the layer that makes them. In Gemma 3n a token has several hidden states.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SHARED = (
    "shared_kv_states"  # the argument of a layer that holds what it takes from earlier ones and leaves for later ones
)

Pair = tuple[Tensor, Tensor]  # keys and values, [B, heads, S, head_dim] each


class Stored(NamedTuple):
    """Keys that a layer stores for later ones; its values have the same shape."""

    width: int  # features of a token, over all heads
    head_dim: int


def stored_before(layers: Sequence[nn.Module]) -> list[dict[str, Stored]]:
    """Before each decoder layer, and behind the last: which keys and values were stored, by the type of layer that takes them."""
    found: list[dict[str, Stored]] = [{}]
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        own: dict[str, Stored] = {}
        if getattr(attention, "store_full_length_kv", False):
            own = {attention.layer_type: Stored(attention.k_proj.out_features, attention.head_dim)}
        found.append({**found[-1], **own})
    return found


def features(model: PreTrainedModel, layers: Sequence[nn.Module]) -> int:
    """The most features that a layer of a model hands on for a token."""
    config = model.config.get_text_config()
    kept = sum(2 * stored.width for stored in stored_before(layers)[-1].values())
    return int(config.hidden_size * getattr(config, "altup_num_inputs", 1)) + kept


def packed(hidden: Tensor, copies: int, shared: Mapping[str, Pair]) -> Tensor:
    """One tensor of what a layer hands on.

    Args:
        hidden: [B, S, hidden]; with several hidden states a token, [copies, B, S, hidden].
        copies: how many a token has; 0: one, without a dimension for them.
        shared: keys and values that later layers take.

    Returns:
        [B, S, features]; the hidden states themselves, where there is one a token and nothing else.
    """
    parts = [*hidden] if copies else [hidden]
    parts += [one.transpose(1, 2).flatten(2) for kind in sorted(shared) for one in shared[kind]]
    return torch.cat(parts, -1) if len(parts) > 1 else hidden


def unpacked(state: Tensor, hidden: int, copies: int, stored: Mapping[str, Stored]) -> tuple[Tensor, dict[str, Pair]]:
    """The inverse of `packed`.

    Args:
        state: [B, S, features].
        hidden: features of a hidden state.
        copies: as there.
        stored: what was stored before.
    """
    if not copies and not stored:
        return state, {}
    taken = (copies or 1) * hidden
    states = state[..., :taken]
    if copies:
        states = states.unflatten(-1, (copies, hidden)).movedim(-2, 0)
    shared: dict[str, Pair] = {}
    for kind in sorted(stored):
        width, head_dim = stored[kind]
        keys, values = state[..., taken : taken + 2 * width].unflatten(-1, (2, -1, head_dim)).unbind(-3)
        shared[kind] = keys.transpose(1, 2), values.transpose(1, 2)
        taken += 2 * width
    return states, shared
