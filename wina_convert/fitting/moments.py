"""Gathers from a dense pass what bases are found from: sums, and a bounded sample of what enters the projections.

The model that passes has the gains of its norms multiplied into the weights behind them, so that what enters those weights
is what an orthogonal matrix will turn. One decoder layer is looked at while it is in memory; what is kept of it does not
grow with the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..architectures import Architecture, Residual
from ..errors import CalibrationError
from .basis import Geometry

BLOCK = 256  # features whose products with those behind them are computed at a time
TOGETHER = 8  # sequences whose products are summed in float32


@dataclass(frozen=True)
class Reader:
    """A projection behind a norm, as far as its scores and errors depend on it.

    Attributes:
        factor: F with F'F = W'W, [at most hidden, hidden], in the model's dtype: norms of columns and of outputs are those of
            W. In the host's memory, as what enters a norm: together they are as large as the model.
        weights: number of elements of W.
    """

    factor: Tensor
    weights: int


@dataclass(frozen=True)
class Site:
    """A norm with what was kept of it.

    Attributes:
        inputs: what leaves the norm, [tokens, hidden], in the dtype the model computes in; in the host's memory.
        readers: the projections that read it.
    """

    inputs: Tensor
    readers: tuple[Reader, ...]


@dataclass
class Moments:
    """What a dense pass leaves behind; filled layer by layer.

    Attributes:
        stream: sum over norms of E xx' times the weights that read x, [hidden, hidden], float64; zeros where the stream is
            not looked at.
        mixed: E zz' of what attention makes of each key-value head's values, summed over the query heads that it serves:
            [kv_heads, head_dim, head_dim], float64, a layer each.
        columns: Gram matrices of the output projection's columns that read them, the same way.
        sites: what was kept of each norm, where a sample was asked for.
    """

    stream: Tensor
    mixed: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)


class Squares:
    """The sum of xx' over all rows x that are added: half of it is computed, as it is symmetric.

    Products are summed in float32 for a few sequences, and those sums in float64.
    """

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.sum = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.part = torch.zeros(hidden, hidden, dtype=torch.float32, device=device)
        self.waiting = 0

    def add(self, x: Tensor) -> None:
        """Add a sequence, [S, hidden]."""
        x = x.float()
        for first in range(0, x.shape[1], BLOCK):
            self.part[first : first + BLOCK, first:].addmm_(x[:, first : first + BLOCK].t(), x[:, first:])
        self.waiting += 1
        if self.waiting == TOGETHER:
            self._move()

    def total(self) -> Tensor:
        """The sum, [hidden, hidden], float64."""
        self._move()
        upper = self.sum.triu()
        return upper + upper.triu(1).t()

    def _move(self) -> None:
        self.sum += self.part
        self.part.zero_()
        self.waiting = 0


def empty_moments(sizes: Geometry, device: torch.device) -> Moments:
    """Moments before the first layer."""
    return Moments(torch.zeros(sizes.hidden, sizes.hidden, dtype=torch.float64, device=device))


def pick_tokens(sequences: int, length: int, tokens: int, seed: int) -> list[Tensor]:
    """Which positions of every sequence are kept: as many of each, at random.

    Args:
        sequences: number of them.
        length: tokens of one.
        tokens: how many are kept in all, at most; 0: none.
        seed: of the choice.

    Returns:
        ascending positions, [kept], int64, a sequence each.
    """
    generator = torch.Generator().manual_seed(seed)
    quota = min(length, tokens // max(sequences, 1))
    return [torch.randperm(length, generator=generator)[:quota].sort().values for _ in range(sequences)]


def gather_layer(
    moments: Moments,
    layer: nn.Module,
    run: Callable[[Tensor, int], Tensor],
    states: list[Tensor],
    family: Architecture,
    sizes: Geometry,
    picks: Sequence[Tensor],
    residual: bool,
    advance: Callable[[int], object],
) -> None:
    """Move the hidden states through a layer, in place, and add what is seen to the moments.

    Products are in float32 and summed in float64; those of values, of which a Cholesky factor is taken, in float64.

    Args:
        moments: what to add to.
        layer: the decoder layer, with its weights and neutral norms.
        run: the layer as a function, [B, S, hidden] and the number of the batch -> [B, S, hidden].
        states: hidden states before the layer, a batch each; afterwards, those behind it.
        family: the model's family.
        sizes: its sizes.
        picks: positions to keep, a sequence each, from `pick_tokens`.
        residual: whether to look at the residual stream.
        advance: told the number of sequences done.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    facts = family.residual
    norms = facts.readers if residual and isinstance(facts, Residual) else ()
    squares = [Squares(sizes.hidden, moments.stream.device) for _ in norms]
    kept: list[list[Tensor]] = [[] for _ in norms]
    group = sizes.heads // sizes.kv_heads
    mixed = torch.zeros(
        sizes.kv_heads, sizes.head_dim, sizes.head_dim, dtype=torch.float64, device=moments.stream.device
    )
    done = tokens = 0

    def watch(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for row, x in enumerate(inputs[0]):  # [S, hidden]
                squares[number].add(x)
                if picks and len(picks[done + row]):
                    kept[number].append(x[picks[done + row].to(x.device)])

        return hook

    def watch_values(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for row in inputs[0]:
            z = row.double().view(len(row), sizes.kv_heads, group, sizes.head_dim).permute(1, 0, 2, 3).flatten(1, 2)
            mixed.add_(z.mT @ z)

    handles = [
        layer.get_submodule(readers[0]).register_forward_pre_hook(watch(number))
        for number, (_, readers) in enumerate(norms)
    ]
    assert family.values is not None  # only listed families are turned
    output = layer.get_submodule(family.values.output)
    handles.append(output.register_forward_pre_hook(watch_values))
    try:
        for number, batch in enumerate(states):
            states[number] = run(batch, number)
            done += len(batch)
            tokens += batch.shape[0] * batch.shape[1]
            advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    sums = [one.total() for one in squares]
    if not all(bool(torch.isfinite(found).all()) for found in (mixed, *sums)):
        raise CalibrationError(
            "activations are NaN or infinite: the model overflows in this dtype; try --dtype float32"
        )
    for (_, readers), total, sample in zip(norms, sums, kept, strict=True):
        weights = [_matrix(layer.get_submodule(name)) for name in readers]
        moments.stream += total * (sum(weight.numel() for weight in weights) / tokens)
        if sample:
            behind = tuple(Reader(_resting(_factor(weight)), weight.numel()) for weight in weights)
            moments.sites.append(Site(_resting(torch.cat(sample)), behind))
    moments.mixed.append(mixed / tokens)
    w = _matrix(output).double().view(-1, sizes.kv_heads, group, sizes.head_dim).permute(1, 0, 2, 3).flatten(1, 2)
    moments.columns.append(w.mT @ w)


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a projection, detached, as [outputs, inputs]."""
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def _factor(weight: Tensor) -> Tensor:
    """The smaller of W and the triangle R of W = QR, in W's dtype: R'R = W'W."""
    if len(weight) <= weight.shape[1]:
        return weight.clone()
    triangle: Tensor = torch.linalg.qr(weight.float(), mode="r").R
    return triangle.to(weight.dtype)


def _resting(tensor: Tensor) -> Tensor:
    """A tensor in the host's memory, from where a GPU reads it at the full speed of the bus."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor
