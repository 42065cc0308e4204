"""Parameters that a checkpoint stores in several tensors, one after another: seen as the one tensor that the model has."""

from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from ..format.folder import Folder
from ..format.shards import TensorSpec
from ..runtime.keys import joins, renamed

_AnyFolder = TypeVar("_AnyFolder", bound=Folder)


def joined(source: _AnyFolder, model: PreTrainedModel) -> _AnyFolder:
    """A source whose tensors are joined as transformers does when it loads them; the source itself, if it joins none.

    The convolutions of queries, keys and values in linear attention are such tensors (OLMo Hybrid, Kimi Linear). A parameter
    of which a part is missing is left in parts.

    Args:
        source: the checkpoint.
        model: its skeleton.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    orders = {
        pattern: entry.source_patterns for entry in converters if joins(entry) for pattern in entry.source_patterns
    }
    if not orders:
        return source
    renamings, state = [entry for entry in mapping if isinstance(entry, WeightRenaming)], model.state_dict()
    found: dict[str, TensorSpec] = {}
    parts: dict[str, dict[str, TensorSpec]] = {}  # by the parameter, and by the pattern that their names follow
    for key, spec in source.tensors.items():
        name, pattern = renamed(key, renamings, converters, model.base_model_prefix, state)
        if pattern in orders and name in state and pattern not in parts.get(name, {}):
            found.setdefault(name, spec)  # its place among the others
            parts.setdefault(name, {})[pattern] = spec
        else:
            found[key] = spec
    for name, own in parts.items():
        order = orders[next(iter(own))]
        if len(own) < len(order):
            del found[name]
            found |= {spec.name: spec for spec in own.values()}
            continue
        first, *_ = ordered = tuple(own[pattern] for pattern in order)
        shape = (sum(part.shape[0] for part in ordered), *first.shape[1:])
        found[name] = replace(first, name=name, shape=shape, stored=first.stored or first.name, joined=ordered)
    return replace(source, tensors=found)
