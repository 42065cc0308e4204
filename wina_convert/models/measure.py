"""How a gated model compares with the dense one on text: perplexity, KL, agreement, achieved sparsity; layer by layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ..format.checkpoint import dense_stream, open_checkpoint
from ..format.config import check_sparsity
from ..format.dtypes import compute_dtype
from ..errors import OptionError, SourceError
from ..progress import Advance, Progress, silent
from ..runtime.linear import WinaLinear, gated_modules
from ..runtime.rule import dropped
from .source import open_source
from .stream import StreamedModel
from .text import load_tokenizer, read_documents, sequence_length, sequences

POSITIONS = 64  # logits at a time: [64, vocabulary] in float32, a few times over, is what the head needs in memory


@dataclass(frozen=True)
class Measurement:
    """A gated model at one sparsity, on some text.

    Attributes:
        sparsity: fraction of inputs asked to skip.
        achieved: fraction skipped, over all gated projections, each counted by its weights.
        projections: fraction skipped, by projection.
        tokens: number of predicted tokens.
        perplexity: exp of the mean negative log likelihood (nats).
        dense_perplexity: of the dense model; None where none was given, as for the rest.
        kl: mean KL(dense || gated) per token, in nats.
        agreement: fraction of tokens at which both models' most likely next token is the same.
        logit_error: largest difference of a logit, relative to the largest dense logit.
    """

    sparsity: float
    achieved: float
    projections: dict[str, float]
    tokens: int
    perplexity: float
    dense_perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    logit_error: float | None = None


def measure(
    gated: StreamedModel,
    tokens: Tensor,
    sparsities: Sequence[float],
    dense: StreamedModel | None = None,
    batch_size: int = 1,
    same_head: bool = False,
    advance: Advance = lambda done: None,
) -> list[Measurement]:
    """Run a gated model at several sparsities, and the dense one beside it, one decoder layer of each in memory.

    Args:
        gated: a WINA checkpoint.
        tokens: [N, S], int64: the text.
        sparsities: fractions to skip.
        dense: the source; None: no comparison.
        batch_size: sequences at a time.
        same_head: what follows the layers is the same in both, so that one copy in memory will do.
        advance: told the number of sequences that a layer has done.
    """
    batches = list(tokens.split(batch_size))
    embedded = gated.embed(batches)
    states = {sparsity: list(embedded) for sparsity in sparsities}
    reference = dense.embed(batches) if dense else []
    del embedded
    names = list(gated_modules(gated.model))
    skipped = {sparsity: dict.fromkeys(names, 0) for sparsity in sparsities}
    for index in range(len(gated.layers)):
        if dense:
            with dense.layer(index) as run:
                _advance_states(run, reference, advance)
        with gated.layer(index) as run:
            gates = {name: module for name, module in gated_modules(gated.model).items() if not module.weight_t.is_meta}
            for sparsity, hidden in states.items():
                for gate in gates.values():
                    gate.set_sparsity(sparsity)
                with _counting_skipped(gates, skipped[sparsity]):
                    _advance_states(run, hidden, advance)
            for gate in gates.values():
                gate.tau = None
    with gated.head() as head, dense.head() if dense and not same_head else nullcontext(head) as dense_head:
        sums = {sparsity: _Sums() for sparsity in sparsities}
        for number, batch in enumerate(batches):
            for row, ids in enumerate(batch):
                for start in range(0, len(ids) - 1, POSITIONS):
                    positions = slice(start, min(start + POSITIONS, len(ids) - 1))
                    target = ids[positions.start + 1 : positions.stop + 1]
                    expected = dense_head(reference[number][row, positions]).float().cpu() if dense else None
                    for sparsity, hidden in states.items():
                        sums[sparsity].add(head(hidden[number][row, positions]).float().cpu(), target, expected)
    weights = {name: module.in_features * module.out_features for name, module in gated_modules(gated.model).items()}
    inputs = {name: module.in_features * tokens.numel() for name, module in gated_modules(gated.model).items()}
    return [
        _measurement(
            sparsity, sums[sparsity], {name: skipped[sparsity][name] / inputs[name] for name in names}, weights
        )
        for sparsity in sparsities
    ]


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
    length = sequence_length(checkpoint.source, seq_len)
    documents = chain.from_iterable(read_documents(text) for text in texts)
    packed = sequences(documents, load_tokenizer(checkpoint.source), length, samples, ", ".join(texts))
    tokens = packed[torch.linspace(0, len(packed) - 1, min(samples, len(packed))).long()]
    dense = None
    if source is not None:
        original = open_source(source, revision, token)
        dense = dense_stream(original, compute_dtype(original), device)
    gated = checkpoint.stream(device)
    if dense is not None and _shape(dense) != _shape(gated):
        raise SourceError(f"{source} is not the model that {folder} was made from; give that one as the source")
    steps = len(gated.layers) * len(tokens) * (len(asked) + (dense is not None))
    with progress("Evaluating", steps, "sequence") as advance:
        return measure(gated, tokens, asked, dense, batch_size, advance=advance)


def _shape(model: StreamedModel) -> tuple[int, torch.Size]:
    embedding = next(model.model.get_input_embeddings().parameters())
    return len(model.layers), embedding.shape


def overall(fractions: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """Mean of a fraction over projections, each counted by its weights."""
    return sum(fractions[name] * weights[name] for name in fractions) / sum(weights[name] for name in fractions)


def _advance_states(run: Callable[[Tensor], Tensor], states: list[Tensor], advance: Advance) -> None:
    for number, hidden in enumerate(states):
        states[number] = run(hidden)
        advance(len(hidden))


@contextmanager
def _counting_skipped(gates: Mapping[str, WinaLinear], skipped: dict[str, int]) -> Iterator[None]:
    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, WinaLinear)
            assert module.tau is not None
            skipped[name] += int(dropped(inputs[0], module.tau).sum())

        return hook

    handles = [gate.register_forward_pre_hook(observe(name)) for name, gate in gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Running sums over tokens, in float64."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.dense_nll, self.kl, self.agreed = 0, 0.0, 0.0, 0.0, 0
        self.error, self.scale = 0.0, 0.0
        self.compared = False

    def add(self, logits: Tensor, target: Tensor, expected: Tensor | None) -> None:
        """Add logits [P, vocabulary] float32, next tokens [P], and the dense model's logits."""
        log_p = logits.log_softmax(-1)
        self.tokens += len(target)
        self.nll -= float(log_p.gather(1, target[:, None]).double().sum())
        if expected is not None:
            self.compared = True
            log_q = expected.log_softmax(-1)
            self.dense_nll -= float(log_q.gather(1, target[:, None]).double().sum())
            kl = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none")
            self.kl += float(kl.sum(-1).double().sum())  # a float32 sum over all would depend on the number of threads
            self.agreed += int((logits.argmax(-1) == expected.argmax(-1)).sum())
            self.error = max(self.error, float((logits - expected).abs().max()))
            self.scale = max(self.scale, float(expected.abs().max()))


def _measurement(sparsity: float, sums: _Sums, fractions: dict[str, float], weights: Mapping[str, int]) -> Measurement:
    compared = sums.compared
    return Measurement(
        sparsity=sparsity,
        achieved=overall(fractions, weights),
        projections=fractions,
        tokens=sums.tokens,
        perplexity=_exp(sums.nll / sums.tokens),
        dense_perplexity=_exp(sums.dense_nll / sums.tokens) if compared else None,
        kl=sums.kl / sums.tokens if compared else None,
        agreement=sums.agreed / sums.tokens if compared else None,
        logit_error=sums.error / sums.scale if compared and sums.scale else (0.0 if compared else None),
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
