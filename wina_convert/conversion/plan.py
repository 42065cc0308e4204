"""What a conversion will do, from config.json and the safetensors headers alone: no weight is read."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..architectures import Architecture
from ..errors import OptionError, SourceError
from ..fitting.budget import ALLOCATIONS, SEARCHED, Budget
from ..fitting.schemes import SCHEMES, Scheme
from ..format.dtypes import compute_dtype
from ..format.experts import shares
from ..format.low_rank import low_rank_bytes
from ..format.names import WEIGHT, split_layer
from ..format.shards import TensorSpec, sentinel
from ..models.discovery import architecture_of
from ..models.handed import features
from ..models.source import Source
from ..models.stream import build_skeleton
from ..models.structure import Projection, find_head, find_projections, not_read
from ..models.tensors import check_stored
from ..runtime.keys import checkpoint_keys
from .weights import Step, planned_headers, steps_of

PRESETS = ("all", "attention", "mlp", "head")
HEAD = "head"  # the preset; no pattern means it


@dataclass(frozen=True)
class ConversionPlan:
    """Which matrices are gated and what the checkpoint will hold.

    Attributes:
        projections: the gated matrices, in the order of the model.
        scheme: how their inputs are scored.
        budget: how the sparsity is divided among them.
        steps: from a tensor of the source to those of the checkpoint.
        tensors: every tensor of the checkpoint, in the order of the source.
        origin: the key in the source that each was made from, but for the sentinel.
        dtype: the dtype the model computes in.
        cast: whether every floating tensor is stored in `dtype` (the user chose one).
        n_layers: how many there are.
        layer_bytes: the largest decoder layer of the source.
        embedding_bytes: everything outside the decoder layers.
        dense_bytes_per_token: bytes of weights the source reads for a token of text, embedding lookups aside; of experts, those
            that it is given.
        hidden_size: features of the hidden states between the layers.
        features: the most numbers of a token that a layer hands on to the next.
        family: what is known of the model's structure.
    """

    projections: tuple[Projection, ...]
    scheme: Scheme
    budget: Budget
    steps: tuple[Step, ...]
    tensors: tuple[TensorSpec, ...]
    origin: Mapping[str, str]
    dtype: torch.dtype
    cast: bool
    n_layers: int
    layer_bytes: int
    embedding_bytes: int
    dense_bytes_per_token: int
    hidden_size: int
    features: int
    family: Architecture

    @property
    def sentinel(self) -> str:
        """Name of the empty tensor that stops a transformers without this package."""
        return self.tensors[-1].name

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(spec.nbytes for spec in self.tensors)

    def bytes_per_token(self, sparsity: float) -> int:
        """Bytes of weights, cutoffs and low-rank terms that a token reads at this sparsity."""
        gated = sum(one.bytes_per_token(self.budget.asked(one.name, sparsity)) for one in self.projections)
        if sparsity > 0:
            specs = {spec.name: spec for spec in self.tensors}
            gated += sum(one.share * low_rank_bytes(specs, one.key) for one in self.projections)
        return round(self.dense_bytes_per_token - sum(one.share * one.nbytes for one in self.projections) + gated)


def make_plan(
    source: Source,
    targets: Sequence[str] = ("all",),
    ignore: Sequence[str] = (),
    dtype: str = "auto",
    scheme: str = "wina",
    allocation: str = "types",
) -> ConversionPlan:
    """Choose the projections to gate.

    Args:
        source: the checkpoint.
        targets: "all", "attention", "mlp", or glob patterns of module names such as `*.down_proj`; "head" besides or alone,
            where the source has a head of its own (`models.tensors.with_own_head`).
        ignore: glob patterns of module names to leave dense, such as `model.layers.0.*`.
        dtype: "auto" (as the source is), "float32", "bfloat16" or "float16".
        scheme: how inputs are scored, a name of SCHEMES.
        allocation: how the sparsity is divided among the projections, a name of ALLOCATIONS; "auto": "measured", or "types" where
            experts are gated.

    Raises:
        OptionError: a pattern matches nothing, nothing is left to gate, or the dtype is unknown.
        SourceError: the checkpoint does not hold the model that its config describes.
    """
    compute = compute_dtype(source, dtype)
    model = build_skeleton(source, compute)
    keys = checkpoint_keys(model, source.tensors)
    cast = compute if dtype != "auto" else None
    check_stored(source, model, keys, cast is not None)
    family = architecture_of(source, model)
    projections = find_projections(source, family, model, keys, cast)
    if not projections:
        raise SourceError(f"{source.name} has no decoder layer; check its config.json")
    head = [find_head(source, model, keys, cast)] if HEAD in targets else []
    chosen = _choose([*projections, *head], family, targets, ignore)
    experts = any(one.share < 1 for one in chosen)
    if allocation == "auto":
        allocation = "types" if experts else "measured"
    if allocation in SEARCHED and experts:
        raise OptionError(
            f"allocation {allocation!r} tries every matrix of {source.name} by itself, and it has {len(chosen)}; "
            "pass --allocation types or uniform, or leave the experts dense: --ignore '*.experts.*'"
        )
    steps = steps_of(chosen, SCHEMES[scheme], cast)
    tensors, origin = lay_out(source, steps, chosen)
    path = family.layers
    stored_bytes = {spec.name: spec.numel * (cast or spec.dtype).itemsize for spec in source.tensors.values()}
    met, layers = shares(source.config, keys), dict[int, int]()
    for name, key in keys.items():
        place = split_layer(name)
        if place and place[0] == path:
            layers[place[1]] = layers.get(place[1], 0) + stored_bytes[key]
    outside = sum(stored_bytes[key] for name, key in keys.items() if not name.startswith(f"{path}."))
    unread = not_read(model, keys, family.beside)
    return ConversionPlan(
        projections=chosen,
        scheme=SCHEMES[scheme],
        budget=ALLOCATIONS[allocation](
            {one.name: one.weights for one in chosen}, {one.name: 0.5 for one in head} | family.prior
        ),
        steps=steps,
        tensors=tensors,
        origin=origin,
        dtype=compute,
        cast=cast is not None,
        n_layers=len(layers),
        layer_bytes=max(layers.values()),
        embedding_bytes=outside,
        dense_bytes_per_token=round(
            sum(met[name] * stored_bytes[key] for name, key in keys.items() if name not in unread)
        ),
        hidden_size=model.config.get_text_config().hidden_size,
        features=features(model, list(model.get_submodule(path).children())),
        family=family,
    )


def lay_out(
    source: Source, steps: Sequence[Step], projections: Sequence[Projection]
) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """What the checkpoint will hold, the sentinel last, and the key in the source that each was made from."""
    headers = {key: planned_headers(steps, spec) for key, spec in source.tensors.items()}
    empty = sentinel()
    last = TensorSpec(f"{projections[0].key}.{WEIGHT}", empty.dtype, tuple(empty.shape))
    origin = {spec.name: key for key, specs in headers.items() for spec in specs}
    return (*(spec for specs in headers.values() for spec in specs), last), origin


def _choose(
    projections: list[Projection], family: Architecture, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Projection, ...]:
    blocks = {"all": (*family.attention, *family.mlp), "attention": family.attention, "mlp": family.mlp}
    patterns = [f"*.{short}" for target in targets for short in blocks.get(target, ())]
    patterns += [target for target in targets if target not in PRESETS]
    patterns += [one.name for one in projections if one.layer is None]
    example = (*family.attention, *family.mlp)[-1]
    for pattern in (*patterns, *ignore):
        if not any(fnmatch.fnmatchcase(projection.name, pattern) for projection in projections):
            raise OptionError(
                f"{pattern!r} matches no projection; give {', '.join(PRESETS)} or a pattern like '*.{example}', "
                f"which is matched against names like {projections[0].name!r}"
            )

    def matching(choice: Sequence[str]) -> re.Pattern[str]:
        return re.compile("|".join(map(fnmatch.translate, choice)) or r"(?!)")  # of no pattern: what nothing matches

    wanted, left = matching(patterns), matching(ignore)
    chosen = tuple(p for p in projections if wanted.match(p.name) and not left.match(p.name))
    if not chosen:
        raise OptionError("nothing is left to gate: --ignore takes away everything that --targets names")
    return chosen
