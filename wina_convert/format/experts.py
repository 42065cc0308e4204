"""Mixtures of experts in a checkpoint: the name of an expert's part, and the share of the tokens that reaches it.

Every expert is stored by itself, as `...experts.E.gate_proj`, `up_proj` and `down_proj`, E being its number.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(.+)")
# How config.json says how many experts there are, and how many of them a token is given.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GIVEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def split_expert(name: str) -> tuple[str, int, str] | None:
    """A name as the path of the experts, the expert's number and the name within it; None: it is of no expert.

    `model.layers.0.mlp.experts.3.up_proj` is ("model.layers.0.mlp.experts", 3, "up_proj").
    """
    match = _EXPERT.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def of_any_expert(name: str) -> str:
    """A name with a star for the number of the expert: the same for the same part of every expert."""
    place = split_expert(name)
    return f"{place[0]}.*.{place[2]}" if place else name


def experts_given(config: Mapping[str, Any]) -> int | None:
    """How many experts a token is given, by config.json; None: it does not say."""
    fields = {**config, **(config.get("text_config") or {})}
    found = (fields.get(name) for name in GIVEN)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def shares(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Which part of the tokens meets each module or parameter: k of E for one of E experts, else 1.

    Args:
        config: config.json; where it does not say how many experts a token is given, all count.
        names: of modules or parameters of the whole model.
    """
    places = {name: split_expert(name) for name in names}
    last: dict[str, int] = {}
    for place in places.values():
        if place:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    given = experts_given(config)
    return {name: min(1.0, given / (last[place[0]] + 1)) if place and given else 1.0 for name, place in places.items()}
