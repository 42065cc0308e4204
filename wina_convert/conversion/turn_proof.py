"""The proof of a change of basis: the turned model against its source, before anything is rounded.

The logits are compared, which everything goes into. Neither an embedding nor a head is in memory as a whole: of the one only
the rows of the tokens that are looked up, of the other a slice at a time.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..errors import VerificationError
from ..fitting.basis import Basis
from ..models.source import Source
from ..models.stream import StreamedModel, build_skeleton
from ..progress import Advance, Progress
from ..runtime.keys import checkpoint_keys
from .turn import SLICE, Turn, chosen, folded_rows, read_turned

CHECKED = 2  # sequences on which the logits are compared
TOLERANCE = 1e-5  # of the largest logit
PRECISIONS = (torch.float32, torch.float64)

# From a checkpoint key to slices of the tensor along its first dimension; of the rows that are picked, ascending, or of all.
Rows = Callable[[str, Tensor | None], Iterable[Tensor]]


def check_turned(turn: Turn, basis: Basis, tokens: Tensor, device: torch.device, progress: Progress) -> float:
    """Hold the turned model against its source.

    In float32 first. What float32 itself rounds grows with depth and width, so where that hides the answer, float64 decides.

    Args:
        turn: what is turned.
        basis: the basis.
        tokens: [N, S], int64; the first `CHECKED` sequences are used.
        device: to compute on.
        progress: how to report it.

    Returns:
        the largest difference between logits, as a part of the largest logit.

    Raises:
        VerificationError: it is more than `TOLERANCE`.
    """
    basis = basis.to(device)
    for dtype in PRECISIONS:
        error = _difference(turn, basis, tokens[:CHECKED], dtype, device, progress)
        if error <= TOLERANCE:
            return error
    raise VerificationError(
        f"in the new basis the logits differ by {error:.2g} of their scale, where {TOLERANCE:.0e} is rounding; "
        "pass --basis none"
    )


def _difference(
    turn: Turn, basis: Basis, tokens: Tensor, dtype: torch.dtype, device: torch.device, progress: Progress
) -> float:
    """The largest difference between logits, as a part of the largest logit, with both models in `dtype`; or NaN."""

    def source_rows(key: str, picked: Tensor | None) -> Iterator[Tensor]:
        for rows in chosen(turn.origin.rows(key, SLICE), picked):
            yield rows.to(dtype)

    def turned_rows(key: str, picked: Tensor | None) -> Iterator[Tensor]:
        fold = turn.folds.get(key)
        if fold is None:
            return source_rows(key, picked)
        spec = turn.origin.tensors[fold.copy_of or key]
        return folded_rows(turn.origin, fold, basis, spec, dtype, device, picked)

    def read_found(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return read_turned(turn, basis, keys, device, dtype)

    def read_expected(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return turn.origin.read(keys)

    sides = (
        _Side(turn.origin, read_expected, source_rows, tokens, dtype, device),
        _Side(turn.source, read_found, turned_rows, tokens, dtype, device),
    )
    with progress("Comparing with the source", 2 * turn.sizes.layers, "layer") as advance:
        for side in sides:
            side.run(advance)
        difference = scale = torch.zeros((), dtype=dtype)
        for expected, found in zip(*(side.logits() for side in sides), strict=True):
            difference = torch.maximum(difference, (expected - found).abs().max())  # which passes NaN on
            scale = torch.maximum(scale, expected.abs().max())
    return float(difference / scale) if scale else float(difference)


class _Side:
    """One of the two models."""

    def __init__(
        self,
        source: Source,
        read: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]],
        rows: Rows,
        tokens: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        model = build_skeleton(source, dtype)
        keys = checkpoint_keys(model, source.tensors)
        embedding = model.get_input_embeddings()
        embedding.padding_idx = None  # type: ignore[assignment] # matters to gradients alone, and need not be among the rows looked up
        names = {module: name for name, module in model.named_modules()}
        self.rows = rows
        self.embedding = keys[f"{names[embedding]}.weight"]
        self.head_key = keys.get(f"{names[model.get_output_embeddings()]}.weight", self.embedding)
        self.used, self.ids = tokens.unique(return_inverse=True)
        self.replaced: dict[str, Tensor] = {}

        def read_some(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
            wanted = list(wanted)
            yield from ((key, self.replaced[key]) for key in wanted if key in self.replaced)
            yield from read([key for key in wanted if key not in self.replaced])

        self.stream = StreamedModel(model, source.architecture, keys, source.tensors, read_some, device)
        self.states: list[Tensor] = []

    def run(self, advance: Advance) -> None:
        """From the tokens to the hidden states behind the last layer."""
        self.replaced = {self.embedding: torch.cat(list(self.rows(self.embedding, self.used)))}
        self.states = self.stream.embed(self.ids.split(1))
        for index in range(len(self.stream.layers)):
            with self.stream.layer(index) as layer:
                self.states = [layer(hidden, number) for number, hidden in enumerate(self.states)]
            advance(1)

    def logits(self) -> Iterator[Tensor]:
        """Slices of the logits along the vocabulary, on the CPU."""
        for part in self.rows(self.head_key, None):
            self.replaced = {self.head_key: part}
            with self.stream.head() as head:
                yield torch.cat([head(hidden[0]).cpu() for hidden in self.states])
