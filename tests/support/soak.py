"""Generates text from four Python threads at once, as long as asked: no token may be wrong, and no memory may be kept.

    python tests/support/soak.py --minutes 30

The threads share one loaded model for each sparsity and generate with prompts, lengths and batches of several sizes,
greedy and sampled. Every result is compared with what a single thread generated beforehand. Resident memory at the end
may be 1% above that after the warm-up; both are read while the threads rest. The exit code is 1 where either fails.
"""

import gc
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

import wina_convert

TINY = Path(__file__).parents[1] / "models" / "wina-lab-tiny"
SPARSITIES = (0.0, 0.5, 0.8)
SHAPES = [
    (1, 1, 24),
    (1, 5, 8),
    (1, 40, 16),
    (1, 120, 32),
    (2, 3, 12),
    (3, 30, 8),
    (9, 6, 6),
]  # rows, prompt, new tokens
THREADS = 4
GROWTH = 0.01  # of the resident memory
WARM_UP = 60.0  # seconds; a third of a run that is shorter than three minutes


class GumbelNoise(LogitsProcessor):
    """Turns the greedy choice into a sample, from a generator of its own: that of torch is shared by all threads."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator).clamp(min=1e-20)
        return scores - (-uniform.log()).log()


@dataclass(frozen=True)
class Job:
    """One call of `generate`."""

    sparsity: float
    prompt: Tensor  # [rows, length]
    new: int
    seed: int | None  # None: greedy

    def run(self, models: dict[float, Any]) -> Tensor:
        """The generated tokens, [rows, new]."""
        found: Tensor = models[self.sparsity].generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            do_sample=False,
            logits_processor=LogitsProcessorList([] if self.seed is None else [GumbelNoise(self.seed)]),
        )
        return found[:, self.prompt.shape[1] :]


def make_jobs() -> list[Job]:
    """Every shape at every sparsity, greedy and sampled."""
    generator = torch.Generator().manual_seed(0)
    return [
        Job(sparsity, torch.randint(2, 2048, (rows, length), generator=generator), new, seed)
        for sparsity in SPARSITIES
        for number, (rows, length, new) in enumerate(SHAPES)
        for seed in (None, number)
    ]


@dataclass(frozen=True)
class Summary:
    """What a run did and found."""

    seconds: float
    counts: Counter[str]  # generations, tokens, wrong
    start: int  # bytes resident after the warm-up
    end: int

    @property
    def passed(self) -> bool:
        return self.counts["generations"] > 0 and not self.counts["wrong"] and self.end <= (1 + GROWTH) * self.start

    def __str__(self) -> str:
        counts = self.counts
        return (
            f"{self.seconds / 60:.1f} minutes: {counts['generations']} generations, {counts['tokens']} tokens, "
            f"{counts['wrong']} wrong; RSS {self.start / 1e6:.1f} MB after the warm-up, {self.end / 1e6:.1f} MB "
            f"at the end ({self.end / self.start - 1:+.2%}): {'passed' if self.passed else 'FAILED'}"
        )


def soak(folder: str | Path, minutes: float, say: Callable[[str], object] = print) -> Summary:
    """Generate for so many minutes, the warm-up included, and each thread every job at least once in it and after it.

    Args:
        folder: a WINA checkpoint with the vocabulary of wina-lab-tiny.
        minutes: how long.
        say: told a line a minute.
    """
    models = {sparsity: wina_convert.load(folder, sparsity=sparsity) for sparsity in SPARSITIES}
    jobs = make_jobs()
    expected = [job.run(models) for job in jobs]
    total: Counter[str] = Counter()
    began = time.monotonic()

    def shuffled(me: int) -> Iterator[int]:
        choose = random.Random(me)
        while True:
            yield from choose.sample(range(len(jobs)), len(jobs))

    def work(numbers: Iterator[int], until: float, at_least: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        while time.monotonic() < until or counts["generations"] < at_least:
            number = next(numbers)
            found, right = jobs[number].run(models), expected[number]
            counts["generations"] += 1
            counts["tokens"] += right.numel()
            counts["wrong"] += int((found != right).sum()) if found.shape == right.shape else right.numel()
        return counts

    def resident(until: float, at_least: int, remark: str = "") -> int:
        """Let the threads work; the memory that is resident afterwards."""
        for counts in threads.map(work, orders, [until] * THREADS, [at_least] * THREADS):
            total.update(counts)
        gc.collect()
        rss: int = psutil.Process().memory_info().rss
        say(
            f"{(time.monotonic() - began) / 60:5.1f} min: {total['generations']} generations, "
            f"{total['tokens']} tokens, {total['wrong']} wrong, RSS {rss / 1e6:.1f} MB{remark}"
        )
        return rss

    end = began + 60 * minutes
    orders = [shuffled(me) for me in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:  # the same four to the end: each has memory of its own
        start = resident(began + min(WARM_UP, 20 * minutes), len(jobs), " (warm-up)")
        while True:
            last = resident(min(time.monotonic() + 60, end), len(jobs))
            if time.monotonic() >= end:
                return Summary(time.monotonic() - began, total, start, last)


@click.command()
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True)
def main(minutes: float) -> None:
    """Convert wina-lab-tiny, generate from it for so many minutes, and print a summary."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        wina_convert.convert(str(TINY), Path(folder) / "wina", samples=8, seq_len=64, basis="none")
        summary = soak(Path(folder) / "wina", minutes, lambda line: print(line, flush=True))
    print(summary)
    sys.exit(not summary.passed)


if __name__ == "__main__":
    main()
