"""`wina bench --device cuda`: decoding with the gated model and with the dense one of the same weights, on this GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..defaults import torch_defaults
from ..progress import Progress, silent
from ..runtime.install import set_sparsity
from ..runtime.linear import gated_modules
from . import card
from .bench import prepare
from .bench_models import make_dense, sharing_copy
from .benchmark import SPARSITIES
from .card import CardBenchmark, CardSpeed

EAGER = 24  # tokens that are generated without compilation, at most: each takes as long as ten others


@dataclass
class _Clock:
    step: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)


@torch_defaults()
def bench_cuda(
    device: torch.device,
    folder: str | None = None,
    *,
    random: str | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    prompt_tokens: int | None = None,
    tokens: int = 32,
    repeats: int = 3,
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> CardBenchmark:
    """Time decoding at batch 1 on a GPU: compiled steps, `generate` that compiles them, and `generate` that does not.

    Args:
        device: the card.
        folder: a WINA checkpoint.
        random: instead of it, a Llama shape with random weights: "0.6b", "1b", "3b" or "8b".
        sparsities: at which to run the gated model.
        prompt_tokens: length of the prompt; None: 512, or what the context leaves where that is less.
        tokens: tokens decoded after it.
        repeats: turns, of which the median counts.
        dtype: "auto" (as stored; bfloat16 if random), "float32", "bfloat16" or "float16".
        seed: of prompt and random weights.
        progress: shows how far it is.

    Raises:
        OptionError: an option cannot be used.
        CheckpointError: the folder is not a WINA checkpoint.
    """
    card.use(device)
    ready = prepare(folder, random, sparsities, prompt_tokens, tokens, repeats, dtype, seed, device)
    read, copy = card.bandwidths(device)
    weights = sum(module.weight_t.nbytes for module in gated_modules(ready.gated).values())
    interleaved = weights < 0.8 * card.free_bytes(device)
    clocks: dict[float | None, _Clock] = {sparsity: _Clock() for sparsity in (None, *ready.asked)}
    with progress("Timing", len(clocks) * (1 + repeats), "turn") as advance:

        def measure(models: dict[float | None, Any]) -> None:
            steps = {id(model): Steps(model) for model in models.values()}
            for turn in range(1 + repeats):
                for sparsity, model in models.items():
                    clock = _turn(model, sparsity, steps[id(model)], ready.prompt, tokens)
                    if turn:  # the first one compiles
                        clocks[sparsity].step += clock.step
                        clocks[sparsity].generate += clock.generate
                        clocks[sparsity].eager += clock.eager
                    advance(1)

        if interleaved:
            measure({None: make_dense(sharing_copy(ready.gated)), **dict.fromkeys(ready.asked, ready.gated)})
        else:  # the card's memory does not hold both
            measure(dict.fromkeys(ready.asked, ready.gated))
            measure({None: make_dense(ready.gated)})
    dense = clocks[None]
    rows = []
    for sparsity, clock in clocks.items():
        nbytes, achieved = ready.loads[sparsity]
        step, generate, eager = median(clock.step), median(clock.generate), median(clock.eager)
        rows.append(
            CardSpeed(
                sparsity=sparsity,
                achieved=achieved,
                step_seconds=step,
                step_ratio=median(dense.step) / step,
                generate_seconds=generate,
                generate_ratio=median(dense.generate) / generate,
                eager_seconds=eager,
                eager_ratio=median(dense.eager) / eager,
                bytes_per_token=nbytes,
                roofline=nbytes / read / step,
            )
        )
    name, today = card.card_name(device), date.today().isoformat()
    return CardBenchmark(name, today, ready.described, read, copy, interleaved, models=tuple(rows))


class Steps:
    """The steps that `generate` compiles for a model, with the arguments it gave the last one."""

    def __init__(self, model: Any) -> None:
        self.call: Callable[..., object] = model
        self.arguments: dict[str, Any] = {}
        compiled_call = model.get_compiled_call

        def kept(config: Any) -> Callable[..., object]:
            self.call = compiled_call(config)
            return self.with_arguments

        model.get_compiled_call = kept

    def with_arguments(self, **arguments: Any) -> object:
        """A step of `generate`."""
        self.arguments = arguments
        return self.call(**arguments)

    @torch.no_grad()  # as `generate` calls it: it would be compiled anew in inference mode
    def seconds(self, tokens: int) -> float:
        """Time of a step, over this many, from the beginning of the cache on; the card need not wait for a token."""
        self.arguments["past_key_values"].reset()

        def run() -> None:
            for _ in range(tokens):
                self.call(**self.arguments)

        return card.seconds(run) / tokens


def _turn(model: Any, sparsity: float | None, steps: Steps, prompt: Tensor, tokens: int) -> _Clock:
    """Each way of decoding once; `tokens` of `generate`, as many steps."""
    if sparsity is not None:
        set_sparsity(model, sparsity)
    static = _generate(model, prompt, tokens + 1, cache_implementation="static")
    step = steps.seconds(tokens)
    return _Clock([step], static[tokens // 2 :], _generate(model, prompt, min(tokens, EAGER) + 1, disable_compile=True))


class _Ticks(BaseStreamer):
    """An event for each token."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.events.append(card.event())

    def end(self) -> None:
        """Nothing is left to show."""


def _generate(model: Any, prompt: Tensor, tokens: int, **options: Any) -> list[float]:
    """Seconds of each token after the first: that one comes with the prompt.

    Args:
        model: a causal LM on the card.
        prompt: [1, length], int64.
        tokens: how many to generate, at least 2; the most likely ones, without an end.
        options: of `generate`.
    """
    # All that a checkpoint says about generation aside: sampling would be another benchmark.
    model.generation_config = GenerationConfig(pad_token_id=0)
    ticks = _Ticks()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=ticks,
        **options,
    )
    events = ticks.events[1:]  # the first is that of the prompt
    return [card.elapsed(begin, end) for begin, end in pairwise(events)]
