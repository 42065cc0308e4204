"""Which stored tensor is which parameter of a model, and whether all of them are there.

Imports transformers' loading machinery, so the loader imports this only when a model is loaded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key

from ..errors import SourceError
from ..format.shards import TensorSpec
from .experts import opened_experts


def joins(entry: object) -> bool:
    """Whether a step of transformers' loading makes a parameter of several stored tensors, one after another."""
    return (
        isinstance(entry, WeightConverter)
        and len(entry.source_patterns) > 1
        and all(isinstance(step, Concatenate) and step.dim == 0 for step in entry.operations)
    )


def renamed(
    key: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    prefix: str,
    state: dict[str, Any],
) -> tuple[str, str | None]:
    """What a checkpoint key is called in a model, and the pattern of the step that makes the parameter, if one does.

    As when transformers loads it: a name that the model has stays where the new one is none of its.
    """
    name, pattern = rename_source_key(key, renamings, converters, prefix, state)
    return (key, None) if name not in state and key in state else (name, pattern)


def parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """What each checkpoint key is called in the model, by transformers' own renaming rules; the model need not have it.

    With opened experts, keys are the names of parameters, but for the base model's prefix.
    """
    state = model.state_dict()
    mapping = [] if opened_experts(model) else get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return {key: renamed(key, renamings, converters, model.base_model_prefix, state)[0] for key in keys}


def checkpoint_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Which checkpoint key holds each parameter or buffer of the model."""
    found = {name: key for key, name in parameter_names(model, keys).items()}
    return {name: found[name] for name in model.state_dict() if name in found}


def tied(model: PreTrainedModel, keys: Mapping[str, str]) -> dict[str, str]:
    """Tied parameters of which the checkpoint stores one: the stored name -> the other. Stored both, they stay apart."""
    aliases = {}
    for target, origin in model.all_tied_weights_keys.items():
        if (target in keys) != (origin in keys):
            stored, other = (target, origin) if target in keys else (origin, target)
            aliases[stored] = other
    return aliases


def check_parameters(
    model: PreTrainedModel, keys: Mapping[str, str], specs: Mapping[str, TensorSpec], new: Iterable[str] = ()
) -> None:
    """Hold a model on the meta device against the headers of its checkpoint, before any memory is taken.

    Args:
        model: the model.
        keys: checkpoint key of each parameter.
        specs: the stored tensors by key.
        new: parameters that need not be stored.

    Raises:
        SourceError: a tensor is missing or has another shape.
    """
    known = {*keys, *tied(model, keys).values(), *new}
    state = model.state_dict()
    missing = [name for name in state if name not in known]
    if missing:
        raise SourceError(f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing in all); get it again")
    for name, key in keys.items():
        if specs[key].shape != tuple(state[name].shape):
            raise SourceError(
                f"tensor {key!r} has shape {specs[key].shape} where config.json asks for {tuple(state[name].shape)}; "
                "the two do not belong together"
            )
        if state[name].is_floating_point() and not specs[key].dtype.is_floating_point:
            dtype = str(specs[key].dtype).removeprefix("torch.")
            raise SourceError(
                f"tensor {key!r} is {dtype}, where the model has floating-point numbers; give the checkpoint in float that it "
                "was quantized from"
            )
