"""`wina eval`: how checkpoints compare with the dense model, and with each other, on text that no conversion saw."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..defaults import torch_defaults
from ..errors import OptionError, SourceError
from ..format.checkpoint import Checkpoint, open_checkpoint
from ..format.config import WinaConfig
from ..format.dtypes import compute_dtype
from ..format.grid import check_sparsity
from ..models.cost import Cost, token_cost
from ..models.documents import read_documents
from ..models.measure import Measurement, measure
from ..models.protocol import Protocol, cut
from ..models.seen import refuse_seen
from ..models.source import checkpoint_folder, open_source
from ..models.stream import StreamedModel, checkpoint_stream, dense_stream
from ..models.text import load_tokenizer
from ..progress import Progress, silent


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint on text.

    Attributes:
        checkpoint: its folder.
        made: how it was made, in a few words.
        protocol: how the text was cut.
        seen_recorded: whether the folder tells which text its conversion saw; where it does, that was not this one.
        dense: what a token costs the dense model.
        measurements: by sparsity, in the order asked.
        costs: what a token costs at each of them.
    """

    checkpoint: str
    made: str
    protocol: Protocol
    seen_recorded: bool
    dense: Cost
    measurements: tuple[Measurement, ...]
    costs: tuple[Cost, ...]

    def rows(self) -> list[dict[str, Any]]:
        """For JSON: a measurement a row, each telling of which checkpoint and text it is."""
        return [
            {
                "checkpoint": self.checkpoint,
                "made": self.made,
                **asdict(one),
                "rise": one.rise,
                "bytes_per_token": {"dense": self.dense.nbytes, "gated": cost.nbytes},
                "macs_per_token": {"dense": self.dense.macs, "gated": cost.macs},
                "protocol": asdict(self.protocol),
                "seen_recorded": self.seen_recorded,
            }
            for one, cost in zip(self.measurements, self.costs, strict=True)
        ]


@torch_defaults()
def evaluate(
    folders: Sequence[str | Path],
    texts: Sequence[str],
    sparsities: Sequence[float] = (),
    source: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    protocol: str | None = None,
    compare: bool = False,
    batch_size: int = 1,
    device: torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = silent,
    tqdm_class: type[Any] | None = None,
) -> list[Evaluation]:
    """Measure WINA checkpoints on the same text.

    Args:
        folders: the checkpoints, local or on the Hub.
        texts: files or dataset names, see `documents.read_documents`.
        sparsities: fractions to skip; none: each checkpoint's default.
        source: the dense model, local or on the Hub, to compare with.
        samples: sequences to use, as many from each text and spread evenly over it; None: 64.
        seq_len: tokens of a sequence; None: 512, or the model's context where that is shorter.
        protocol: how papers cut the text, see `protocol.cut`; it leaves samples and length no choice.
        compare: where there is no source, compare each checkpoint with itself at sparsity 0.
        batch_size: sequences computed at a time.
        device: to compute on; None: the CPU.
        revision: of the source; without one, of the checkpoints that are on the Hub.
        token: Hub access token.
        progress: how to report progress.
        tqdm_class: progress bar for downloads.

    Raises:
        WinaError: a checkpoint, the text or the source cannot be used; a conversion saw the text.
    """
    if (samples is not None and samples < 1) or batch_size < 1:
        raise OptionError(f"samples is {samples} and batch size is {batch_size}; both must be at least 1")
    device = device or torch.device("cpu")
    asked = list(dict.fromkeys(check_sparsity(sparsity) for sparsity in sparsities))
    of_checkpoints = revision if source is None else None
    checkpoints = [
        open_checkpoint(checkpoint_folder(str(folder), of_checkpoints, token, tqdm_class, progress))
        for folder in folders
    ]
    cuts = [_cut(checkpoint, texts, protocol, samples, seq_len) for checkpoint in checkpoints]
    recorded = [
        refuse_seen(checkpoint.folder.path, tokens, texts)
        for checkpoint, (tokens, _) in zip(checkpoints, cuts, strict=True)
    ]
    original = (
        None if source is None else open_source(source, revision, token, tqdm_class=tqdm_class, progress=progress)
    )
    found = []
    for folder, checkpoint, (tokens, how), known in zip(folders, checkpoints, cuts, recorded, strict=True):
        gated = checkpoint_stream(checkpoint, device)
        dense = None if original is None else dense_stream(original, compute_dtype(original), device)
        if dense is not None and _shape(dense) != _shape(gated):
            raise SourceError(f"{source} is not the model that {folder} was made from; give that one as the source")
        wanted = asked or [checkpoint.config.sparsity or 0.0]
        run = list(dict.fromkeys([0.0, *wanted])) if compare and dense is None else wanted
        steps = len(gated.layers) * len(tokens) * (len(run) + (dense is not None))
        with progress(f"Evaluating {folder}", steps, "sequence") as advance:
            measured = measure(gated, tokens, run, dense, batch_size, advance=advance)
        kept = tuple(one for one in measured if one.sparsity in wanted)
        specs = checkpoint.folder.tensors
        found.append(
            Evaluation(
                checkpoint=str(folder),
                made=made(checkpoint.config),
                protocol=how,
                seen_recorded=known,
                dense=token_cost(gated, specs),
                measurements=kept,
                costs=tuple(token_cost(gated, specs, one.projections) for one in kept),
            )
        )
    return found


def made(config: WinaConfig) -> str:
    """How a checkpoint was made, in a few words."""
    basis = config.basis.get("kind", "none")
    parts = [config.scheme, config.allocation, "" if basis == "none" else f"basis {basis}"]
    return ", ".join(part for part in parts if part)


def _cut(
    checkpoint: Checkpoint, texts: Sequence[str], protocol: str | None, samples: int | None, seq_len: int | None
) -> tuple[Tensor, Protocol]:
    documents = {text: read_documents(text) for text in texts}
    return cut(documents, load_tokenizer(checkpoint.folder), checkpoint.folder, protocol, samples, seq_len)


def _shape(model: StreamedModel) -> tuple[int, torch.Size]:
    embedding = next(model.model.get_input_embeddings().parameters())
    return len(model.layers), embedding.shape
