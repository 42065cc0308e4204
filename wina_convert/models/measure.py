"""A gated model on text, beside the dense one: perplexity, KL, agreement, achieved sparsity; layer by layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format.names import split_layer
from ..progress import Advance
from ..runtime.experts import opened_experts
from ..runtime.linear import WinaLinear, gated_modules, observing
from ..runtime.rule import dropped, overall
from .stream import StreamedModel

# Of the tokens of a mixture, how many count for `logit_error`: where two experts are chosen between by less than rounding, two
# computations of the same model choose unlike, and their logits differ by more than rounding.
MOST = 0.9
POSITIONS = 64  # logits at a time: [64, vocabulary] in float32, a few times over, is what the head needs in memory


@dataclass(frozen=True)
class Measurement:
    """A gated model at one sparsity, on some text.

    Attributes:
        sparsity: fraction of inputs asked to skip.
        achieved: fraction skipped, over all gated projections, each counted by its weights and the tokens that met it.
        projections: fraction skipped, by projection; without the experts that no token was given.
        tokens: number of predicted tokens.
        perplexity: exp of the mean negative log likelihood (nats).
        dense_perplexity: of the dense model; None where nothing was compared, as for the rest.
        kl: mean KL(dense || gated) per token, in nats.
        agreement: fraction of tokens at which both models' most likely next token is the same.
        logit_error: largest difference of a logit, relative to the largest dense logit; with experts, of nine tokens in ten.
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

    @property
    def rise(self) -> float | None:
        """By how much the perplexity is above the dense model's, as a part of that; None where nothing was compared."""
        return None if self.dense_perplexity is None else self.perplexity / self.dense_perplexity - 1


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
        dense: the source; None: compare with the checkpoint at sparsity 0, where that is among the sparsities.
        batch_size: sequences at a time.
        same_head: what follows the layers is the same in both, so that one copy in memory will do, unless the head is gated.
        advance: told the number of sequences that a layer has done.
    """
    batches = list(tokens.split(batch_size))
    embedded = gated.embed(batches)
    states = {
        sparsity: list(embedded) for sparsity in sorted(sparsities)
    }  # 0 first: the others may be compared with it
    reference = dense.embed(batches) if dense else []
    del embedded
    names = list(gated_modules(gated.model))
    skipped = {sparsity: dict.fromkeys(names, 0) for sparsity in sparsities}
    inputs = {sparsity: dict.fromkeys(names, 0) for sparsity in sparsities}
    for index in range(len(gated.layers)):
        if dense:
            with dense.layer(index) as run:
                _advance_states(run, reference, advance)
        with gated.layer(index) as run:
            gates = {name: module for name, module in gated_modules(gated.model).items() if not module.weight_t.is_meta}
            for sparsity, hidden in states.items():
                for gate in gates.values():
                    gate.set_sparsity(sparsity)
                with observing(gates, _counter(skipped[sparsity], inputs[sparsity])):
                    _advance_states(run, hidden, advance)
            for gate in gates.values():
                gate.forget_threshold()
    in_head = {name: module for name, module in gated_modules(gated.model).items() if split_layer(name) is None}
    own = dense if dense and not (same_head and not in_head) else None
    with gated.head() as head, own.head() if own else nullcontext(head) as dense_head:
        sums = {sparsity: _Sums() for sparsity in sparsities}
        for number, batch in enumerate(batches):
            for row, ids in enumerate(batch):
                for start in range(0, len(ids) - 1, POSITIONS):
                    positions = slice(start, min(start + POSITIONS, len(ids) - 1))
                    target = ids[positions.start + 1 : positions.stop + 1]
                    expected = dense_head(reference[number][row, positions]).float().cpu() if dense else None
                    for sparsity, hidden in states.items():
                        for gate in in_head.values():
                            gate.set_sparsity(sparsity)
                        with observing(in_head, _counter(skipped[sparsity], inputs[sparsity])):
                            logits = head(hidden[number][row, positions]).float().cpu()
                        if sparsity == 0 and dense is None:
                            expected = logits
                        sums[sparsity].add(logits, target, expected)
        for gate in in_head.values():
            gate.forget_threshold()
    outputs = {name: module.out_features for name, module in gated_modules(gated.model).items()}
    counted = MOST if opened_experts(gated.model) else 1.0
    return [_measurement(one, sums[one], skipped[one], inputs[one], outputs, counted) for one in sparsities]


def _advance_states(run: Callable[[Tensor, int], Tensor], states: list[Tensor], advance: Advance) -> None:
    for number, hidden in enumerate(states):
        states[number] = run(hidden, number)
        advance(len(hidden))


def _counter(skipped: dict[str, int], inputs: dict[str, int]) -> Callable[[str, WinaLinear, Tensor], None]:
    def count(name: str, gate: WinaLinear, x: Tensor) -> None:
        assert gate.tau is not None
        skipped[name] += int(dropped(x, gate.tau).sum())
        inputs[name] += x.numel()

    return count


class _Sums:
    """Running sums over tokens, in float64."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.dense_nll, self.kl, self.agreed = 0, 0.0, 0.0, 0.0, 0
        self.errors: list[Tensor] = []
        self.scale, self.compared = 0.0, False

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
            self.errors.append((logits - expected).abs().amax(-1))
            self.scale = max(self.scale, float(expected.abs().max()))

    def error(self, part: float) -> float:
        """The largest difference of a logit among this part of the tokens, those with the smallest."""
        ranked = torch.cat(self.errors).sort().values
        return float(ranked[math.ceil(part * len(ranked)) - 1])


def _measurement(
    sparsity: float,
    sums: _Sums,
    skipped: Mapping[str, int],
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    counted: float,
) -> Measurement:
    compared = sums.compared
    fractions = {name: skipped[name] / seen for name, seen in inputs.items() if seen}
    weights = {name: seen * outputs[name] for name, seen in inputs.items()}
    return Measurement(
        sparsity=sparsity,
        achieved=overall(fractions, weights),
        projections=fractions,
        tokens=sums.tokens,
        perplexity=_exp(sums.nll / sums.tokens),
        dense_perplexity=_exp(sums.dense_nll / sums.tokens) if compared else None,
        kl=sums.kl / sums.tokens if compared else None,
        agreement=sums.agreed / sums.tokens if compared else None,
        logit_error=sums.error(counted) / sums.scale if compared and sums.scale else (0.0 if compared else None),
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
