"""Exact changes of basis, folded into the weights: nothing is added at run time.

Two freedoms leave a transformer's function as it is. The residual stream may be turned by one orthogonal Q, once the gains of
its RMSNorms are multiplied into the weights behind them (SliceGPT, arXiv 2401.15024, section 3): h becomes h Q, a weight that
reads the stream W Q, one that writes it Q'W, the embedding E Q and the head, untied from it, H Q. And the values of a
key-value head may have any invertible basis A, since attention mixes them linearly: v becomes A v, and the columns of the
output projection that read them are multiplied by the inverse of A.

Everything here works on one tensor at a time, by the names of the model's parameters, in float64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..architectures import Architecture, Residual

SLICE = 1 << 20  # elements turned at a time: 8 MiB in float64


@dataclass(frozen=True)
class Geometry:
    """The sizes that a change of basis depends on.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads; each serves `heads / kv_heads` query heads.
        head_dim: width of a value.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def geometry(config: Any) -> Geometry:
    """The sizes in a transformers text config."""
    heads = int(config.num_attention_heads)
    return Geometry(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


@dataclass(frozen=True)
class Basis:
    """A basis for the residual stream and one for the values of every layer.

    Attributes:
        kind: how the residual basis was found: "pca" or "fitted"; "values" where the values alone are turned.
        residual: Q, [hidden, hidden], float64, orthogonal; its columns are the new axes. None: the stream stays.
        values: A, [layers, kv_heads, head_dim, head_dim], float64, invertible; its rows are the new axes.
        inverses: the inverses of `values`, same shape.
    """

    kind: str
    residual: Tensor | None
    values: Tensor
    inverses: Tensor

    def to(self, device: torch.device) -> "Basis":
        """The same on a device."""
        residual = None if self.residual is None else self.residual.to(device)
        return Basis(self.kind, residual, self.values.to(device), self.inverses.to(device))


def basis_tensors(basis: Basis) -> dict[str, Tensor]:
    """A basis as named tensors, to be stored beside an unfinished conversion.

    Layers written in two bases that differ in the last bits would not fit together, so a resumed conversion must not find its
    basis again.
    """
    stream = {} if basis.residual is None else {"residual": basis.residual}
    return stream | {"values": basis.values, "inverses": basis.inverses}


def stored_basis(kind: str, tensors: Mapping[str, Tensor]) -> Basis:
    """The inverse of `basis_tensors`."""
    return Basis(kind, tensors.get("residual"), tensors["values"], tensors["inverses"])


@dataclass(frozen=True)
class Fold:
    """What becomes of one parameter of the model. A matrix is seen as [outputs, inputs], a bias as [outputs].

    Attributes:
        gain: parameter of the norm whose gain is multiplied into the inputs.
        offset: what is added to that parameter to make the gain.
        turned: whether Q turns the "inputs" or the "outputs".
        values: whether values are the outputs ("rows") or the inputs ("columns").
        layer: the decoder layer whose values they are.
        starts: first row of every key-value head's values, or first column of every query head's.
        neutral: what every element becomes: the stored weight of a norm whose gain is 1.
        copy_of: the parameter that a new one starts from: the embedding, for a head that was tied to it.
        transposed: whether the parameter is stored as [inputs, outputs].
    """

    gain: str | None = None
    offset: float = 0.0
    turned: Literal["inputs", "outputs"] | None = None
    values: Literal["rows", "columns"] | None = None
    layer: int = 0
    starts: tuple[int, ...] = ()
    neutral: float | None = None
    copy_of: str | None = None
    transposed: bool = False


def plan_folds(
    family: Architecture,
    sizes: Geometry,
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    transposed: bool = False,
    residual: bool = True,
    values: bool = True,
) -> dict[str, Fold]:
    """Which parameters change and how, before any weight is read.

    Args:
        family: the model's family.
        sizes: the model's sizes.
        shapes: every parameter of the model by name; a tied head need not be named.
        tied: whether the checkpoint has no head of its own, so that the turned model gets one.
        transposed: whether the layers' projections are stored as [inputs, outputs] (GPT-2).
        residual: whether the residual stream is turned, where the family allows it.
        values: whether the values are turned.

    Returns:
        by parameter name; what is not named stays as it is. An entry with `copy_of` is a parameter that is new.
    """
    folds: dict[str, Fold] = {}
    facts = family.residual
    if residual and isinstance(facts, Residual):
        folds |= _stream_folds(family, facts, sizes, tied)
    if values:
        for name, fold in _value_folds(family, sizes, shapes, transposed):
            folds[name] = replace(
                folds.get(name, Fold()), values=fold.values, layer=fold.layer, starts=fold.starts, transposed=transposed
            )
    new = {name for name, fold in folds.items() if fold.copy_of}
    return {name: fold for name, fold in folds.items() if name in shapes or name in new}


def _stream_folds(family: Architecture, facts: Residual, sizes: Geometry, tied: bool) -> dict[str, Fold]:
    """The parameters that read or write the residual stream, and its norms; biases that a model lacks included."""
    neutral, final, embedding = 1.0 - facts.offset, f"{facts.final}.weight", f"{facts.embedding}.weight"
    head = Fold(gain=final, offset=facts.offset, turned="inputs", copy_of=embedding if tied else None)
    folds = {embedding: Fold(turned="inputs"), final: Fold(neutral=neutral), f"{facts.head}.weight": head}
    for index in range(sizes.layers):
        layer = f"{family.layers}.{index}"
        for norm, readers in facts.readers:
            gain = f"{layer}.{norm}.weight"
            folds[gain] = Fold(neutral=neutral)
            for reader in readers:
                folds[f"{layer}.{reader}.weight"] = Fold(gain=gain, offset=facts.offset, turned="inputs")
        for writer in facts.writers:
            folds |= {f"{layer}.{writer}.{leaf}": Fold(turned="outputs") for leaf in ("weight", "bias")}
    return folds


def _value_folds(
    family: Architecture, sizes: Geometry, shapes: Mapping[str, tuple[int, ...]], transposed: bool
) -> Iterator[tuple[str, Fold]]:
    """The parameters that make values or read their mixture."""
    places, dim = family.values, sizes.head_dim
    assert places is not None  # only listed families are turned
    columns = tuple(range(0, sizes.heads * dim, dim))
    for index in range(sizes.layers):
        maker, reader = (f"{family.layers}.{index}.{name}" for name in (places.projection, places.output))
        outputs = shapes[f"{maker}.weight"][1 if transposed else 0]
        if places.rows == "interleaved":
            rows = tuple(range(2 * dim, outputs, 3 * dim))
        else:
            rows = tuple(range(outputs - sizes.kv_heads * dim, outputs, dim))
        for leaf in ("weight", "bias"):
            yield f"{maker}.{leaf}", Fold(values="rows", layer=index, starts=rows)
        yield f"{reader}.weight", Fold(values="columns", layer=index, starts=columns)


def fold_tensor(
    basis: Basis,
    fold: Fold,
    tensor: Tensor,
    gain: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A parameter in the new basis.

    Every slice is computed in float64 and rounded once to `dtype`, so that a half-precision weight needs no copy of itself
    in float64.

    Args:
        basis: the basis; its tensors are moved to the parameter's device.
        fold: what becomes of the parameter, from `plan_folds`.
        tensor: the parameter as the model has it, 1 or 2 dimensions, any floating dtype.
        gain: the norm's parameter, [inputs], where `fold.gain` names one.
        dtype: of the result.

    Returns:
        same shape as `tensor`.

    Raises:
        ValueError: `fold.gain` names a parameter and `gain` is None.
    """
    if fold.neutral is not None:
        return torch.full_like(tensor, fold.neutral, dtype=dtype)
    if fold.gain and gain is None:
        raise ValueError(f"folding needs {fold.gain}")
    matrix = tensor[:, None] if tensor.dim() == 1 else tensor.t() if fold.transposed else tensor  # [outputs, inputs]
    made = torch.empty_like(matrix, dtype=dtype)
    q = None if basis.residual is None or fold.turned is None else basis.residual.to(tensor.device)
    if fold.turned == "outputs" or fold.values == "columns":
        inverses = basis.inverses[fold.layer].to(tensor.device) if fold.values else None
        for start, stop, head in _blocks(matrix.shape[1], matrix.shape[0], fold.starts, basis.values.shape[-1]):
            part = matrix[:, start:stop].double()
            if inverses is not None and head is not None:
                part = part @ inverses[head * len(inverses) // len(fold.starts)]
            made[:, start:stop] = part if q is None else q.t() @ part
    else:
        scale = None if gain is None else gain.to(tensor.device).double() + fold.offset
        forward = basis.values[fold.layer].to(tensor.device) if fold.values else None
        for start, stop, head in _blocks(matrix.shape[0], matrix.shape[1], fold.starts, basis.values.shape[-1]):
            part = matrix[start:stop].double()
            if forward is not None and head is not None:
                part = forward[head] @ part
            if scale is not None:
                part = part * scale
            made[start:stop] = part if q is None else part @ q
    return made[:, 0] if tensor.dim() == 1 else made.t() if fold.transposed else made


def _blocks(length: int, width: int, starts: tuple[int, ...], dim: int) -> Iterator[tuple[int, int, int | None]]:
    """Cut a dimension into (start, stop, head): a block for every head, and between them what bounds the temporaries.

    Args:
        length: of the dimension.
        width: of the other one.
        starts: where the heads start, ascending; `dim` long each.
        dim: width of a value.
    """
    step, position = max(1, SLICE // max(width, 1)), 0
    for head, start in enumerate((*starts, length)):
        for first in range(position, start, step):
            yield first, min(first + step, start), None
        if start < length:
            yield start, start + dim, head
            position = start + dim


def balanced_values(mixed: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Bases in which the mixed values are uncorrelated and the columns that read them orthogonal.

    There, dropping inputs changes the output's energy by exactly the sum of their squared scores, which is what WINA's bound
    assumes (arXiv 2505.19427, theorem 3.1). The basis is that of a balanced realisation (Moore, IEEE Trans. Automatic
    Control 26(1), 1981): with C = L L' and L'GL = V S^2 V', the inverse of A is L V S^-1/2, and A C A' = A^-T G A^-1 = S.
    Both sides share the scale, so that neither leaves the range of a half-precision dtype.

    Args:
        mixed: C, second moments of what attention makes of a key-value head's values, [..., head_dim, head_dim].
        columns: G, Gram matrices of the output projection's columns that read them, same shape.

    Returns:
        A and its inverse, same shape, float64. A head of which nothing is seen or read keeps its basis.
    """
    mixed, columns = mixed.double(), columns.double()
    eye = torch.eye(mixed.shape[-1], dtype=torch.float64, device=mixed.device)
    size = mixed.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    read = columns.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    alive = (size > 0) & (read > 0)
    # A direction that the text never showed has no scale of its own; it gets a small one.
    lower = torch.linalg.cholesky(torch.where(alive, mixed + 1e-8 * size * eye, eye))
    energy, axes = torch.linalg.eigh(lower.mT @ torch.where(alive, columns, eye) @ lower)
    energy, axes = energy.flip(-1), fix_signs(axes.flip(-1))
    scale = energy.clamp_min(1e-12 * energy.amax(-1, keepdim=True).clamp_min(1e-300)).pow(0.25)[..., None, :]
    inverse = lower @ axes / scale
    forward = (axes * scale).mT @ torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return torch.where(alive, forward, eye), torch.where(alive, inverse, eye)


def fix_signs(axes: Tensor) -> Tensor:
    """Give every column [..., n, n] the sign that makes its largest element positive: an eigenvector has none of its own."""
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -axes, axes)
