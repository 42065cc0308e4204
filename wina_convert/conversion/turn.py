"""A source in another basis: its headers before any weight is read, its tensors when they are asked for, and the proof.

The turned model is nowhere stored: every tensor is read from the source, folded and handed on, in slices where it is large.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import Residual
from ..errors import OptionError
from ..fitting.basis import (
    Basis,
    Fold,
    Geometry,
    balanced_values,
    basis_tensors,
    fold_tensor,
    geometry,
    plan_folds,
    stored_basis,
)
from ..fitting.fit_basis import STEPS, Effort, effort_of, fit_basis, principal_axes
from ..fitting.moments import Moments, empty_moments, gather_layer, pick_tokens
from ..format.shards import TensorSpec
from ..format.staging import Snapshot
from ..models.source import Source
from ..models.stream import StreamedModel, build_skeleton
from ..models.tensors import untied
from ..progress import Progress, grouped
from ..runtime.keys import checkpoint_keys
from .options import BASES, check_name
from .weights import check_finite

CARRIED = "basis/"  # before the names of its tensors in a snapshot
TOKENS = 1 << 16  # of the dense pass: half as many cost a tenth more of perplexity at 50%
MOST = 8  # times the sequences that thresholds are fitted on: who asks for few is in a hurry
SLICE = 1 << 22  # bytes read at a time of a tensor that is folded row by row


@dataclass(frozen=True)
class Turn:
    """What a change of basis will do to a source, known from its headers.

    Attributes:
        origin: the source as it is.
        source: the source with the headers and the config of the turned model; its folder holds the origin's weights.
        kind: "pca" or "fitted"; "values" where the family allows the values' basis alone.
        sizes: of the model.
        folds: what becomes of each tensor that changes, by checkpoint key; gains and copies are checkpoint keys too.
        effort: of the fit; None: nothing is fitted.
        reason: why the residual stream is not turned; None: it is.
    """

    origin: Source
    source: Source
    kind: str
    sizes: Geometry
    folds: Mapping[str, Fold]
    effort: Effort | None
    reason: str | None

    @property
    def basis_bytes(self) -> int:
        """Bytes of the basis, which each snapshot of an unfinished conversion holds."""
        values = 2 * self.sizes.layers * self.sizes.kv_heads * self.sizes.head_dim**2
        return torch.float64.itemsize * (values + (self.sizes.hidden**2 if self.reason is None else 0))

    def shown(self) -> dict[str, str]:
        """What a plan, a report and config.json say of it."""
        said = {
            "kind": self.kind,
            "stream": f"as it was: {self.reason}" if self.reason else "turned",
            "values": "balanced",
        }
        return said | ({"fit": self.effort.shown()} if self.effort else {})


@dataclass(frozen=True)
class TurnedSource(Source):
    """A source in another basis: its tensors are made when they are read.

    Attributes:
        turn: what is turned.
        basis: the basis.
        dtype: of floating-point tensors; None: as they are stored.
        device: to fold on.
    """

    turn: Turn = field(kw_only=True)
    basis: Basis = field(kw_only=True)
    dtype: torch.dtype | None = field(kw_only=True)
    device: torch.device = field(kw_only=True)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key, in the new basis; what was folded is on the device."""
        return read_turned(self.turn, self.basis, keys, self.device, self.dtype)

    def is_stored(self, key: str) -> bool:
        """Whether the tensor is in the files as it is."""
        return key not in self.turn.folds and super().is_stored(key)


def turned_source(turn: Turn, basis: Basis, dtype: torch.dtype | None, device: torch.device) -> TurnedSource:
    """The source in its basis."""
    placed = basis.to(device)  # once, not for every slice of every tensor
    return TurnedSource(**vars(turn.source), turn=turn, basis=placed, dtype=dtype, device=device)


def carried_basis(basis: Basis) -> dict[str, Tensor]:
    """What a snapshot holds of a basis."""
    return {CARRIED + name: tensor for name, tensor in basis_tensors(basis).items()}


def restored_basis(turn: Turn, snapshot: Snapshot | None) -> Basis | None:
    """The basis that an interrupted conversion found; None where it must be found."""
    if snapshot is None:
        return None
    found = {
        name.removeprefix(CARRIED): tensor for name, tensor in snapshot.tensors.items() if name.startswith(CARRIED)
    }
    return stored_basis(turn.kind, found)


def plan_turn(source: Source, kind: str, device: torch.device) -> Turn | None:
    """Decide what a change of basis does to a source, from its headers alone.

    Args:
        source: the source.
        kind: "none", "pca", "fitted" or "auto": "fitted" where the device allows enough of it, else "pca". All but "none"
            are the values' basis alone where the family allows no other.
        device: what the basis will be found on.

    Returns:
        None for "none", and for "auto" where the family is not listed.

    Raises:
        OptionError: the kind is not known, or is "fitted" and the device allows too little for that.
    """
    check_name("basis", kind, BASES)
    if kind == "none" or (kind == "auto" and not source.listed):
        return None
    if not source.listed:
        raise OptionError(
            f"no test has turned a model of type {source.config['model_type']!r}, as {source.name} is; pass --basis none"
        )
    model = build_skeleton(source, torch.float32)
    keys = checkpoint_keys(model, source.tensors)
    shapes = {name: source.tensors[key].shape for name, key in keys.items()}
    facts, sizes = source.architecture.residual, geometry(model.config.get_text_config())
    reason = facts if isinstance(facts, str) else None
    folds = plan_folds(source.architecture, sizes, shapes, _head_missing(source, keys), _transposed(model))
    if reason is not None:
        kind, effort = "values", None
    else:
        effort = effort_of(sizes, _reading_shapes(source, sizes, shapes), device)
        if kind == "auto":
            kind = "fitted" if effort.enough else "pca"
        elif kind == "fitted" and not effort.enough:
            raise OptionError(
                f"{source.name} is too large to fit a basis on a {device.type} ({effort.shown()} would be left of "
                f"{STEPS} steps); pass --basis pca, or another --device"
            )
    return Turn(
        origin=source,
        source=_turned_headers(source, keys, folds),
        kind=kind,
        sizes=sizes,
        folds=_by_key(folds, keys),
        effort=effort if kind == "fitted" else None,
        reason=reason,
    )


def _head_missing(source: Source, keys: Mapping[str, str]) -> bool:
    facts = source.architecture.residual
    return isinstance(facts, Residual) and f"{facts.head}.weight" not in keys


def _transposed(model: PreTrainedModel) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def _reading_shapes(
    source: Source, sizes: Geometry, shapes: Mapping[str, tuple[int, ...]]
) -> list[list[tuple[int, ...]]]:
    """Shapes of the projections behind every norm of the decoder layers."""
    family, facts = source.architecture, source.architecture.residual
    readers = facts.readers if isinstance(facts, Residual) else ()
    return [
        [shapes[f"{family.layers}.{index}.{name}.weight"] for name in names]
        for index in range(sizes.layers)
        for _, names in readers
    ]


def _by_key(folds: Mapping[str, Fold], keys: Mapping[str, str]) -> dict[str, Fold]:
    """The folds with checkpoint keys for parameter names; a new parameter's key is its name."""
    return {
        keys.get(name, name): replace(
            fold,
            gain=fold.gain and keys[fold.gain],
            copy_of=fold.copy_of and keys[fold.copy_of],
        )
        for name, fold in folds.items()
    }


def _turned_headers(source: Source, keys: Mapping[str, str], folds: Mapping[str, Fold]) -> Source:
    """The source with new tensors in its headers and, where the stream is turned, untied embeddings in its config."""
    if not any(fold.turned for fold in folds.values()):
        return source
    new = {
        name: replace(source.tensors[keys[fold.copy_of]], name=name, file="")
        for name, fold in folds.items()
        if fold.copy_of
    }
    if not new and source.config.get("tie_word_embeddings") is False:
        return source
    return untied(replace(source, tensors=source.tensors | new))


def basis_sequences(samples: int, length: int) -> int:
    """How many sequences of a length a basis is found on, where thresholds are fitted on `samples` of them."""
    return min(max(samples, TOKENS // length), MOST * samples)


def find_basis(
    turn: Turn,
    dtype: torch.dtype,
    tokens: Tensor,
    batch_size: int,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> Basis:
    """Find the basis from one dense pass of the source, a decoder layer at a time.

    Args:
        turn: what will be turned.
        dtype: the pass computes in.
        tokens: [N, S], int64: the calibration text.
        batch_size: sequences at a time.
        device: to compute on.
        seed: of the sample that a fit takes.
        progress: how to report it.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    moments = gather(turn, dtype, tokens, batch_size, device, seed, progress)
    values, inverses = balanced_values(torch.stack(moments.mixed), torch.stack(moments.columns))
    residual = None
    if turn.reason is None:
        residual = principal_axes(moments.stream)
        if turn.effort is not None:
            residual = fit_basis(residual, moments.sites, turn.effort, seed, progress)
        residual = residual.cpu()
    return Basis(turn.kind, residual, values.cpu(), inverses.cpu())


def gather(
    turn: Turn,
    dtype: torch.dtype,
    tokens: Tensor,
    batch_size: int,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> Moments:
    """Run the source densely, the gains of its norms in the weights behind them; arguments as for `find_basis`."""
    source, residual = turn.origin, turn.reason is None
    model = build_skeleton(source, dtype)
    keys = checkpoint_keys(model, source.tensors)
    fused = {
        key: replace(fold, turned=None, values=None)
        for key, fold in turn.folds.items()
        if fold.gain or fold.neutral is not None
    }

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in wanted:
            yield key, _folded(source, fused.get(key), None, key, dtype, device)

    stream = StreamedModel(model, source.architecture, keys, source.tensors, read, device)
    picks = pick_tokens(len(tokens), tokens.shape[1], turn.effort.kept if turn.effort else 0, seed)
    moments = empty_moments(turn.sizes, device)
    states = stream.embed(tokens.split(batch_size))
    with progress(f"Looking at the dense model on {len(tokens)} sequences", len(stream.layers), "layer") as advance:
        by_layer = grouped(advance, len(tokens))
        for index, layer in enumerate(stream.layers):
            with stream.layer(index) as run:
                gather_layer(moments, layer, run, states, source.architecture, turn.sizes, picks, residual, by_layer)
    return moments


def read_turned(
    turn: Turn, basis: Basis, keys: Iterable[str], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the turned model by checkpoint key; what does not change is read as it is, and is on the CPU.

    Args:
        turn: what is turned.
        basis: the basis, best on the device.
        keys: of `turn.source.tensors`.
        device: to fold on, and of what is folded.
        dtype: of floating-point tensors; None: the source's.

    Raises:
        SourceError: a tensor that is to be folded holds NaN or infinity, which would spread over the basis.
    """
    for key in keys:
        yield key, _folded(turn.origin, turn.folds.get(key), basis, key, dtype, device)


def _folded(
    source: Source, fold: Fold | None, basis: Basis | None, key: str, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    """One tensor, folded on the device; without a basis, with the gain alone."""
    spec = source.tensors[fold.copy_of if fold and fold.copy_of else key]
    dtype = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
    if fold is None:
        ((_, tensor),) = source.read([spec.name])
        return tensor.to(dtype)
    made = torch.empty(spec.shape, dtype=dtype, device=device)
    start = 0
    for part in folded_rows(source, fold, basis, spec, dtype, device):
        made[start : start + len(part)] = part
        start += len(part)
    return made


def folded_rows(
    source: Source,
    fold: Fold,
    basis: Basis | None,
    spec: TensorSpec,
    dtype: torch.dtype,
    device: torch.device,
    picked: Tensor | None = None,
) -> Iterator[Tensor]:
    """A folded tensor in slices of rows, on the device; in one where outputs or values are turned.

    Args:
        source: where it is.
        fold: what becomes of it.
        basis: the basis; None: the gain alone.
        spec: the tensor.
        dtype: of the result.
        device: to fold on.
        picked: the rows that are wanted, ascending; None: all.
    """
    gain = None
    if fold.gain:
        ((_, gain),) = source.read([fold.gain])
        check_finite(source, source.tensors[fold.gain], gain)
    whole = fold.turned == "outputs" or fold.values is not None or fold.transposed
    parts = (part for _, part in source.read([spec.name])) if whole else source.rows(spec.name, SLICE)
    for part in parts if whole else chosen(parts, picked):
        part = part.to(device)
        check_finite(source, spec, part)
        made = fold_tensor(basis or _unturned(), fold, part, gain, dtype)
        yield made[picked] if whole and picked is not None else made


def chosen(parts: Iterable[Tensor], picked: Tensor | None) -> Iterator[Tensor]:
    """Those rows of a tensor, ascending, that comes in slices along its rows; None: all."""
    start = 0
    for part in parts:
        if picked is None:
            yield part
        else:
            inside = picked[(picked >= start) & (picked < start + len(part))] - start
            yield part[inside]
            start += len(part)


def _unturned() -> Basis:
    empty = torch.empty(0, 0, 0, 0, dtype=torch.float64)
    return Basis("none", None, empty, empty)
