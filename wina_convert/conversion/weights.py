"""How a tensor of the source becomes tensors of the checkpoint: a list of steps, which know headers before they see data.

A plan asks the steps for headers, so that the files can be laid out before a weight is read; the conversion then sends each
tensor of the source through the same steps. What changes the model and not how it is stored (a basis, say) is no step: it is
a source of its own, whose `read` makes the tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SourceError
from ..fitting.low_rank import low_rank_factors
from ..fitting.schemes import Scheme
from ..format.folder import Folder
from ..format.grid import GRID
from ..format.low_rank import LOW_RANK, LOW_RANK_IN, LOW_RANK_OUT, rank_of
from ..format.names import BIASES, COLUMN_NORMS, THRESHOLDS, WEIGHT, WEIGHT_T
from ..format.shards import TensorSpec
from ..models.structure import Projection


class Step(Protocol):
    """One step from the source to the checkpoint."""

    def headers(self, spec: TensorSpec) -> list[TensorSpec]:
        """The headers of what becomes of a tensor with this header."""
        ...

    def make(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What becomes of a tensor, by name; some of `headers` may come later: thresholds do."""
        ...


@dataclass(frozen=True)
class Cast:
    """Every floating tensor in the dtype that the user chose."""

    dtype: torch.dtype

    def headers(self, spec: TensorSpec) -> list[TensorSpec]:
        """The same in that dtype."""
        return [TensorSpec(spec.name, self.dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)]

    def make(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The same in that dtype.

        Raises:
            SourceError: a number does not fit.
        """
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
            if not finite(tensor):
                raise SourceError(f"tensor {name!r} does not fit {self.dtype}; pass --dtype bfloat16 or float32")
        return {name: tensor}


@dataclass(frozen=True)
class Gate:
    """The weight of a gated projection transposed, with its column weights; its thresholds come from calibration.

    Attributes:
        projections: the gated ones by the key of their weight in the source.
        scheme: how the columns are weighted.
        biases: [K, out] each, float32, by projection: biases along the grid; none where it is empty.
    """

    projections: Mapping[str, Projection]
    scheme: Scheme
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def headers(self, spec: TensorSpec) -> list[TensorSpec]:
        """Weight, column weights, thresholds, low-rank term and biases of a gated projection; anything else as it is."""
        projection = self.projections.get(spec.name)
        if projection is None:
            return [spec]
        shape = (projection.in_features, projection.out_features)
        specs = [
            TensorSpec(f"{projection.key}.{WEIGHT_T}", spec.dtype, shape),
            TensorSpec(f"{projection.key}.{COLUMN_NORMS}", torch.float32, shape[:1]),
            TensorSpec(f"{projection.key}.{THRESHOLDS}", torch.float32, (len(GRID),)),
        ]
        if self.scheme.low_rank:
            rank = rank_of(self.scheme.low_rank, *shape)
            specs.append(TensorSpec(f"{projection.key}.{LOW_RANK_IN}", spec.dtype, (shape[0], rank)))
            specs.append(TensorSpec(f"{projection.key}.{LOW_RANK_OUT}", spec.dtype, (rank, shape[1])))
        if self.biases:
            specs.append(TensorSpec(f"{projection.key}.{BIASES}", torch.float32, (len(GRID), shape[1])))
        return specs

    def make(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Weight, column weights, low-rank term and biases of a gated projection, on its device; anything else as it is."""
        projection = self.projections.get(name)
        if projection is None:
            return {name: tensor}
        weight_t = (tensor if projection.transposed_in_source else tensor.t()).contiguous()
        made = {
            f"{projection.key}.{WEIGHT_T}": weight_t,
            f"{projection.key}.{COLUMN_NORMS}": self.scheme.column_weights(projection.name, weight_t).to(tensor.device),
        }
        if self.scheme.low_rank:
            factors = low_rank_factors(weight_t, rank_of(self.scheme.low_rank, *weight_t.shape))
            made |= {f"{projection.key}.{leaf}": factor for leaf, factor in zip(LOW_RANK, factors, strict=True)}
        if self.biases:
            made[f"{projection.key}.{BIASES}"] = self.biases[projection.name].to(tensor.device)
        return made


def steps_of(
    projections: Iterable[Projection],
    scheme: Scheme,
    cast: torch.dtype | None,
    biases: Mapping[str, Tensor] | None = None,
) -> tuple[Step, ...]:
    """The steps of a conversion that gates these projections and, with `cast`, stores everything in that dtype."""
    gate = Gate({f"{projection.key}.{WEIGHT}": projection for projection in projections}, scheme, biases or {})
    return (gate,) if cast is None else (Cast(cast), gate)


def planned_headers(steps: Sequence[Step], spec: TensorSpec) -> list[TensorSpec]:
    """The headers of what the steps make of a tensor of the source."""
    specs = [TensorSpec(spec.name, spec.dtype, spec.shape)]
    for step in steps:
        specs = [made for one in specs for made in step.headers(one)]
    return specs


def stored_tensors(
    source: Folder, steps: Sequence[Step], keys: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Tensors of the checkpoint made from these of the source, thresholds aside.

    Args:
        source: the checkpoint to convert.
        steps: what is done to each.
        keys: keys of the source.
        device: to make them on; they stay there.

    Raises:
        SourceError: a tensor holds NaN or infinity, or cannot be read.
    """
    made: dict[str, Tensor] = {}
    for key, read in source.read(keys):
        tensor = read.to(device)
        check_finite(source, source.tensors[key], tensor)
        tensors = {key: tensor}
        for step in steps:
            tensors = {name: result for old, one in tensors.items() for name, result in step.make(old, one).items()}
        made |= tensors
    return made


def check_finite(source: Folder, spec: TensorSpec, tensor: Tensor) -> None:
    """Refuse a tensor of the source that no conversion can use.

    Raises:
        SourceError: it holds NaN or infinity.
    """
    if not finite(tensor):
        raise SourceError(f"tensor {spec.name!r} in {source.path / spec.file} holds NaN or infinity")


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    ends = torch.aminmax(tensor)  # which pass NaN on, in one pass without temporaries
    return all(bool(end.isfinite()) for end in ends)
