"""Which projections of a layer are computed together: those that read the same input, such as q, k and v.

No code of transformers is changed. The projection that a layer calls first computes the products of its siblings too and
leaves each its result; a sibling that is then called with the same tensor returns it, and with any other computes its own.
"""

import os

from torch import nn

from ..architectures import ARCHITECTURES
from .experts import GATE, UP, opened_experts
from .linear import WinaLinear, gated_modules

SWITCH = "WINA_GROUPING"  # environment variable; "0" leaves every projection alone


def group(model: nn.Module) -> None:
    """Make siblings of the gated projections that read the same input, as the model's family says; of an expert, gate and up.

    Args:
        model: a causal LM, or its base model, with gated projections.
    """
    family = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if os.environ.get(SWITCH) == "0":
        return
    for experts in opened_experts(model).values():
        for expert in experts.children():
            members = [
                part for name, part in expert.named_children() if name in (GATE, UP) and isinstance(part, WinaLinear)
            ]
            if members:
                members[0].siblings = tuple(members[1:])
    if family is None:
        return
    modules = gated_modules(model)
    for names in family.shared:
        layers = {name.removesuffix(end): None for name in modules for end in names if f".{name}".endswith(f".{end}")}
        for layer in layers:
            members = [modules[layer + name] for name in names if layer + name in modules]
            members[0].siblings = tuple(members[1:])
