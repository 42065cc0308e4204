"""The tensors of a mixture of experts, one for each matrix of an expert, however the source stores them.

Most families store an expert by itself, under names of their own; some store all experts of a layer as one tensor of three
dimensions. transformers makes the latter of the former when it loads them. What is read here is the former, called as in
`runtime.experts`; all other tensors are called as the parameters of the model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ..errors import SourceError
from ..format.experts import split_expert
from ..format.folder import Folder
from ..format.shards import Piece, TensorSpec
from ..runtime.experts import OpenedExperts, opened_experts
from ..runtime.keys import renamed
from .joined import joined

_AnyFolder = TypeVar("_AnyFolder", bound=Folder)


def opened(source: _AnyFolder, model: PreTrainedModel) -> _AnyFolder:
    """A source whose tensors are those of a model with opened experts, and joined where the model has one for several.

    Args:
        source: the checkpoint, as it lies on the disk or opened already.
        model: its skeleton, opened.

    Raises:
        SourceError: the tensors of its experts are in no form that is known.
    """
    source, experts = joined(source, model), opened_experts(model)
    if not experts or all(spec.stored for spec in source.tensors.values()):  # none, or opened already
        return source
    leaves = {f"{name}.{leaf}": (name, leaf) for name, module in experts.items() for leaf in module.leaves}
    state = dict.fromkeys([*model.state_dict(), *leaves], True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, TensorSpec] = {}
    for key, spec in source.tensors.items():
        name, pattern = renamed(key, renamings, converters, model.base_model_prefix, state)
        if name not in leaves:
            # What would be joined has no place in this model, and what comes twice has one only once: both keep their names.
            kept = key if pattern is not None or name in found else name
            found[kept] = replace(spec, name=kept, stored=key)
            continue
        path, leaf = leaves[name]
        try:
            if pattern is None:
                made = list(_pieces(experts[path], path, leaf, spec))
            else:
                made = [_part(experts[path], path, leaf, spec, by_pattern[pattern], pattern)]
        except ValueError as error:
            raise SourceError(
                f"{source.name} stores {key!r} in a form that is not known for experts ({error}); the type is not supported"
            ) from error
        found |= {one.name: one for one in made}
    return replace(source, tensors=found)


def _pieces(experts: OpenedExperts, path: str, leaf: str, spec: TensorSpec) -> Iterator[TensorSpec]:
    """The matrices or biases in a tensor that holds a parameter of all experts."""
    matrix = not leaf.endswith("_bias")
    if len(spec.shape) != 2 + matrix or spec.shape[0] != experts.count:
        raise ValueError(f"its shape is {spec.shape}")
    transposed = matrix and experts.transposed
    sizes = spec.shape[:0:-1] if transposed else spec.shape[1:]
    for number in range(experts.count):
        for part, rows in experts.rows(leaf, sizes[0]).items():
            shape = (len(range(*rows.indices(sizes[0]))), *sizes[1:])
            piece = Piece(number, transposed, (rows.start, rows.stop, rows.step))
            yield replace(
                spec, name=f"{path}.{number}.{part}", shape=shape, stored=spec.stored or spec.name, piece=piece
            )


def _part(
    experts: OpenedExperts, path: str, leaf: str, spec: TensorSpec, converter: WeightConverter, pattern: str
) -> TensorSpec:
    """The one matrix or bias of an expert that a tensor is, by the place of its name among those that transformers joins."""
    place = split_expert(spec.name)
    parts = list(experts.rows(leaf, 2))
    known = all(isinstance(step, (MergeModulelist, Concatenate)) for step in converter.operations)
    if place is None or not known or len(parts) != len(converter.source_patterns):
        raise ValueError("transformers makes it by other steps than joining")
    part = parts[converter.source_patterns.index(pattern)]
    return replace(spec, name=f"{path}.{place[1]}.{part}", stored=spec.stored or spec.name)
