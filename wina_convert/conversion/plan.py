"""What a conversion will do, from config.json and the safetensors headers alone: no weight is read."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..format.config import GRID
from ..format.dtypes import compute_dtype
from ..errors import OptionError, SourceError
from ..format.shards import TensorSpec
from ..models.source import Source
from ..models.stream import build_skeleton, checkpoint_keys

PRESETS = ("all", "attention", "mlp")


@dataclass(frozen=True)
class Projection:
    """One gated matrix.

    Attributes:
        name: its module in the model, for example `model.layers.0.mlp.down_proj`.
        key: its name in the checkpoint (the same, but where a checkpoint leaves out the base model's prefix).
        layer: index of its decoder layer.
        in_features: inputs, the columns of W.
        out_features: outputs, the rows of W.
        transposed_in_source: whether the source stores [in, out] already (GPT-2).
        bias: whether it has a bias.
        dtype: of the stored weight.
    """

    name: str
    key: str
    layer: int
    in_features: int
    out_features: int
    transposed_in_source: bool
    bias: bool
    dtype: torch.dtype

    @property
    def weights(self) -> int:
        """Number of weights; every budget and every mean over projections is weighted by it."""
        return self.in_features * self.out_features

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weights * self.dtype.itemsize

    def bytes_per_token(self, sparsity: float) -> int:
        """Bytes of weight and cutoffs that a token reads when this fraction of the inputs is skipped."""
        return round(self.nbytes * (1 - sparsity)) + 4 * self.in_features


@dataclass(frozen=True)
class ConversionPlan:
    """Which matrices are gated and what the checkpoint will hold.

    Attributes:
        projections: the gated matrices, in the order of the model.
        tensors: every tensor of the checkpoint, in the order of the source.
        dtype: the dtype the model computes in.
        cast: whether every floating tensor is stored in `dtype` (the user chose one).
        layers: dotted path of the decoder layers.
        n_layers: how many there are.
        layer_bytes: the largest decoder layer of the source.
        embedding_bytes: everything outside the decoder layers.
        dense_bytes_per_token: bytes of weights the source reads for a token, embedding lookups aside.
        hidden_size: features of the hidden states between the layers.
    """

    projections: tuple[Projection, ...]
    tensors: tuple[TensorSpec, ...]
    dtype: torch.dtype
    cast: bool
    layers: str
    n_layers: int
    layer_bytes: int
    embedding_bytes: int
    dense_bytes_per_token: int
    hidden_size: int

    @property
    def sentinel(self) -> str:
        """Name of the empty tensor that stops a transformers without this package."""
        return self.tensors[-1].name

    @property
    def disk_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def gated_bytes(self) -> int:
        """Bytes of the gated weights."""
        return sum(projection.nbytes for projection in self.projections)

    def bytes_per_token(self, sparsity: float) -> int:
        """Bytes of weights and cutoffs that a token reads at this sparsity."""
        gated = sum(projection.bytes_per_token(sparsity) for projection in self.projections)
        return self.dense_bytes_per_token - self.gated_bytes + gated


def make_plan(
    source: Source, targets: Sequence[str] = ("all",), ignore: Sequence[str] = (), dtype: str = "auto"
) -> ConversionPlan:
    """Choose the projections to gate.

    Args:
        source: the checkpoint.
        targets: "all", "attention", "mlp", or glob patterns of module names such as `*.down_proj`.
        ignore: glob patterns of module names to leave dense, such as `model.layers.0.*`.
        dtype: "auto" (as the source is), "float32", "bfloat16" or "float16".

    Raises:
        OptionError: a pattern matches nothing, nothing is left to gate, or the dtype is unknown.
        SourceError: the checkpoint does not hold the model that its config describes.
    """
    compute = compute_dtype(source, dtype)
    model = build_skeleton(source, compute)
    keys = checkpoint_keys(model, source.tensors)
    projections = _projections(source, model, keys, compute if dtype != "auto" else None)
    if not projections:
        raise SourceError(f"{source.name} has no decoder layer; check its config.json")
    chosen = _choose(projections, source, targets, ignore)
    gated = {f"{projection.key}.weight": projection for projection in chosen}
    tensors: list[TensorSpec] = []
    for spec in source.tensors.values():
        stored = compute if dtype != "auto" and spec.dtype.is_floating_point else spec.dtype
        if spec.name in gated:
            tensors += _gated_specs(gated[spec.name])
        else:
            tensors.append(TensorSpec(spec.name, stored, spec.shape))
    tensors.append(TensorSpec(f"{chosen[0].key}.weight", torch.float32, (0,)))  # see runtime.loader.sentinel
    path = source.architecture.layers
    stored_bytes = {
        spec.name: spec.numel * (compute if dtype != "auto" else spec.dtype).itemsize
        for spec in source.tensors.values()
    }
    layers: dict[int, int] = {}
    for name, key in keys.items():
        if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
            layers[int(match[1])] = layers.get(int(match[1]), 0) + stored_bytes[key]
    outside = sum(stored_bytes[key] for name, key in keys.items() if not name.startswith(f"{path}."))
    return ConversionPlan(
        projections=chosen,
        tensors=tuple(tensors),
        dtype=compute,
        cast=dtype != "auto",
        layers=path,
        n_layers=len(layers),
        layer_bytes=max(layers.values()),
        embedding_bytes=outside,
        dense_bytes_per_token=sum(layers.values()) + outside - _lookup_bytes(model, keys, stored_bytes),
        hidden_size=model.config.get_text_config().hidden_size,
    )


def _projections(
    source: Source, model: PreTrainedModel, keys: dict[str, str], dtype: torch.dtype | None
) -> list[Projection]:
    family = source.architecture
    found = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for short in (*family.attention, *family.mlp):
            name = f"{family.layers}.{index}.{short}"
            module = layer.get_submodule(short)
            key = keys.get(f"{name}.weight", "").removesuffix(".weight")
            if type(module) not in (nn.Linear, Conv1D) or not key:
                raise SourceError(f"{source.name} has no plain weight for {name}; this variant is not supported")
            spec = source.tensors[f"{key}.weight"]
            expected = tuple(model.get_parameter(f"{name}.weight").shape)
            if spec.shape != expected:
                raise SourceError(
                    f"tensor {spec.name!r} has shape {spec.shape} where config.json asks for "
                    f"{expected}; the two do not belong together"
                )
            transposed = isinstance(module, Conv1D)
            rows, columns = spec.shape
            found.append(
                Projection(
                    name=name,
                    key=key,
                    layer=index,
                    in_features=rows if transposed else columns,
                    out_features=columns if transposed else rows,
                    transposed_in_source=transposed,
                    bias=module.bias is not None,
                    dtype=dtype or spec.dtype,
                )
            )
    return found


def _choose(
    projections: list[Projection], source: Source, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[Projection, ...]:
    family = source.architecture
    blocks = {"all": (*family.attention, *family.mlp), "attention": family.attention, "mlp": family.mlp}
    patterns = [f"*.{short}" for target in targets for short in blocks.get(target, ())]
    patterns += [target for target in targets if target not in blocks]
    for pattern in (*patterns, *ignore):
        if not any(fnmatch.fnmatchcase(projection.name, pattern) for projection in projections):
            raise OptionError(
                f"{pattern!r} matches no projection; give {', '.join(PRESETS)} or a pattern like '*.{family.mlp[-1]}', "
                f"which is matched against names like {projections[0].name!r}"
            )

    def matches(projection: Projection, choice: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(projection.name, pattern) for pattern in choice)

    chosen = tuple(p for p in projections if matches(p, patterns) and not matches(p, ignore))
    if not chosen:
        raise OptionError("nothing is left to gate: --ignore takes away everything that --targets names")
    return chosen


def _gated_specs(projection: Projection) -> list[TensorSpec]:
    return [
        TensorSpec(f"{projection.key}.weight_t", projection.dtype, (projection.in_features, projection.out_features)),
        TensorSpec(f"{projection.key}.column_norms", torch.float32, (projection.in_features,)),
        TensorSpec(f"{projection.key}.thresholds", torch.float32, (len(GRID),)),
    ]


def _lookup_bytes(model: PreTrainedModel, keys: dict[str, str], stored_bytes: dict[str, int]) -> int:
    """Bytes of the embeddings that a token only looks up: not the tied input embedding, which is the head as well."""
    head = model.get_output_embeddings()
    own_head = any(keys.get(f"{name}.weight") for name, module in model.named_modules() if module is head)
    looked_up = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (own_head or module is not model.get_input_embeddings())
    }
    return sum(stored_bytes[keys[name]] for name in looked_up if name in keys)
