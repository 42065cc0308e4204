"""Which stored tensors a model takes, and whether it is still the same model without the others."""

import json
import re
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..errors import SourceError
from ..format.dtypes import FLOATS
from ..format.names import WEIGHT, split_layer
from ..format.shards import TensorSpec
from ..runtime.keys import check_parameters, checkpoint_keys, parameter_names
from .discovery import architecture_of
from .experts import opened
from .source import Source
from .stream import build_skeleton
from .structure import head_of

ADAPTER = re.compile(r"(^|[._])(lora|dora|loha|lokr|ia3|vera|boft|oft|adapter)s?[._]", re.IGNORECASE)


def taken(source: Source, allow_unused: bool = False) -> tuple[Source, tuple[str, ...]]:
    """Keep the tensors that the model takes, and name the others: masks and frequencies of old checkpoints, say.

    Experts are opened (see `models.experts`). A tied matrix that is stored under the head's name alone gets the embedding's.

    Args:
        source: the checkpoint.
        allow_unused: leave out also what was part of the model.

    Raises:
        SourceError: without the others it is another model: an adapter that is not merged, a bias or a layer that config.json
            does not know.
    """
    model = build_skeleton(source, torch.float32)
    source = opened(source, model)
    keys = checkpoint_keys(model, source.tensors)
    layers = architecture_of(source, model).layers
    used = set(keys.values())
    unused = tuple(key for key in source.tensors if key not in used)
    names = parameter_names(model, unused)
    lost = [key for key in unused if _was_part(source.tensors[key], names[key], model, layers)]
    if copies := [key for key in lost if names[key] in keys]:
        lost = copies
    if lost and not allow_unused:
        if copies:
            raise SourceError(
                f"{source.name} holds {copies[0]!r} and {keys[names[copies[0]]]!r}, which are one parameter of the model "
                f"({len(copies)} such pairs); take one of them out, or pass --allow-unused to leave out the first"
            )
        remedy = "merge the adapter into the weights" if ADAPTER.search(lost[0]) else "mend config.json"
        raise SourceError(
            f"{source.name} holds {lost[0]!r} ({len(lost)} such tensors), for which the model of its config.json has no place; "
            f"without it this is another model: {remedy}, or pass --allow-unused to leave it out"
        )
    renamed = {
        keys[head]: embedding
        for head, embedding in model.all_tied_weights_keys.items()
        if head in keys and embedding not in keys
    }
    specs = (spec for key, spec in source.tensors.items() if key not in unused)
    named = (
        replace(spec, name=renamed[spec.name], stored=spec.name) if spec.name in renamed else spec for spec in specs
    )
    return replace(source, tensors={spec.name: spec for spec in named}), unused


def with_own_head(source: Source) -> Source:
    """The source with a head of its own under the name that it has in the model; where it is tied, a copy of the embedding."""
    model = build_skeleton(source, torch.float32)
    name, _ = head_of(model)
    keys, head = checkpoint_keys(model, source.tensors), f"{name}.{WEIGHT}"
    tied_to = keys.get(model.all_tied_weights_keys.get(head, ""))
    if head in keys and keys[head] != head:
        tensors = {head if key == keys[head] else key: spec for key, spec in source.tensors.items()}
        return replace(source, tensors=tensors | {head: _named(source.tensors[keys[head]], head)})
    if head in keys or tied_to is None:
        return source
    return untied(replace(source, tensors=source.tensors | {head: _named(source.tensors[tied_to], head)}))


def _named(spec: TensorSpec, name: str) -> TensorSpec:
    """A stored tensor under another name."""
    return replace(spec, name=name, stored=spec.stored or spec.name)


def untied(source: Source) -> Source:
    """The source with a config that says that head and embedding are two tensors."""
    config = source.config | {"tie_word_embeddings": False}
    return replace(source, config=config, config_text=json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_stored(source: Source, model: PreTrainedModel, keys: dict[str, str], cast: bool) -> None:
    """Hold the headers of a source against its model, before a weight is read.

    Args:
        source: the checkpoint.
        model: its skeleton.
        keys: checkpoint key of each parameter.
        cast: whether everything is stored in a dtype that the user chose.

    Raises:
        SourceError: a tensor is missing, or has another shape or a dtype that cannot be converted.
    """
    check_parameters(model, keys, source.tensors)
    for spec in source.tensors.values():
        dtype = str(spec.dtype).removeprefix("torch.")
        if spec.dtype == torch.float64 and not cast:
            raise SourceError(
                f"tensor {spec.name!r} of {source.name} is {dtype}; pass --dtype float32, bfloat16 or float16"
            )
        if spec.dtype.is_floating_point and spec.dtype not in (*FLOATS.values(), torch.float64):
            raise SourceError(
                f"tensor {spec.name!r} of {source.name} is {dtype}; convert a checkpoint in float32, bfloat16 or float16"
            )


def _was_part(spec: TensorSpec, name: str, model: PreTrainedModel, layers: str) -> bool:
    """Whether a tensor that the model does not take, and would call so, had a part in what its checkpoint computed."""
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, spec.name) for pattern in known):
        return False
    if ADAPTER.search(spec.name):
        return True
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" and (leaf != "bias" or len(spec.shape) != 1):  # a mask has more dimensions
        return False
    base = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    place = split_layer(name)
    in_layer = place is not None and place[0] in (layers, layers.removeprefix(base))
    return in_layer or (leaf == "bias" and (module in modules or base + module in modules))
