"""`wina eval`: how a checkpoint compares with the dense model on text."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from ..defaults import torch_defaults
from ..errors import OptionError, SourceError
from ..format.checkpoint import open_checkpoint
from ..format.dtypes import compute_dtype
from ..format.grid import check_sparsity
from ..models.documents import read_documents
from ..models.measure import Measurement, measure
from ..models.source import open_source
from ..models.stream import StreamedModel, checkpoint_stream, dense_stream
from ..models.text import load_tokenizer, sequence_length, sequences
from ..progress import Progress, silent


@torch_defaults()
def evaluate(
    folder: str | Path,
    texts: Sequence[str],
    sparsities: Sequence[float] = (),
    source: str | None = None,
    samples: int = 64,
    seq_len: int | None = None,
    batch_size: int = 1,
    device: torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure a WINA checkpoint on text.

    Args:
        folder: the checkpoint.
        texts: files or dataset names, see `text.read_documents`.
        sparsities: fractions to skip; none: the checkpoint's default.
        source: the dense model, local or on the Hub, to compare with.
        samples: sequences to use, spread evenly over the text.
        seq_len: tokens of a sequence; None: 512, or the model's context where that is shorter.
        batch_size: sequences computed at a time.
        device: to compute on; None: the CPU.
        revision: of the source.
        token: Hub access token.
        progress: how to report progress.

    Raises:
        WinaError: the checkpoint, the text or the source cannot be used.
    """
    if samples < 1 or batch_size < 1:
        raise OptionError(f"samples is {samples} and batch size is {batch_size}; both must be at least 1")
    device = device or torch.device("cpu")
    checkpoint = open_checkpoint(folder)
    asked = [check_sparsity(sparsity) for sparsity in sparsities] or [checkpoint.config.sparsity or 0.0]
    length = sequence_length(checkpoint.folder, seq_len)
    documents = chain.from_iterable(read_documents(text) for text in texts)
    packed = sequences(documents, load_tokenizer(checkpoint.folder), length, samples, ", ".join(texts))
    tokens = packed[torch.linspace(0, len(packed) - 1, min(samples, len(packed)), dtype=torch.float32).long()]
    dense = None
    if source is not None:
        original = open_source(source, revision, token)
        dense = dense_stream(original, compute_dtype(original), device)
    gated = checkpoint_stream(checkpoint, device)
    if dense is not None and _shape(dense) != _shape(gated):
        raise SourceError(f"{source} is not the model that {folder} was made from; give that one as the source")
    steps = len(gated.layers) * len(tokens) * (len(asked) + (dense is not None))
    with progress("Evaluating", steps, "sequence") as advance:
        return measure(gated, tokens, asked, dense, batch_size, advance=advance)


def _shape(model: StreamedModel) -> tuple[int, torch.Size]:
    embedding = next(model.model.get_input_embeddings().parameters())
    return len(model.layers), embedding.shape
