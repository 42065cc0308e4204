"""The shortest run of `soak.py`, every job twice in each thread; and that it finds what it looks for."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import soak


def test_four_threads_generate_what_one_does_and_keep_no_memory(wina_tiny: Path) -> None:
    said: list[str] = []
    found = soak.soak(wina_tiny, 0.01, said.append)
    assert found.counts["wrong"] == 0, said
    assert found.counts["generations"] >= 2 * len(soak.make_jobs()) * soak.THREADS
    assert found.end <= (1 + soak.GROWTH / 4) * found.start, said  # of a quarter of the generations of a minute
    assert found.passed
    assert str(found).endswith("passed")


def test_the_jobs_ask_for_different_texts(wina_tiny: Path) -> None:
    """A token of another thread's text is a wrong one, and skipping and sampling change what is generated."""
    models = {sparsity: soak.wina_convert.load(wina_tiny, sparsity=sparsity) for sparsity in soak.SPARSITIES}
    job = soak.make_jobs()[3]
    assert torch.equal(job.run(models), job.run(models))
    texts = {
        tuple(soak.Job(sparsity, job.prompt, 24, seed).run(models)[0].tolist())
        for sparsity in soak.SPARSITIES
        for seed in (None, 1, 2)
    }
    assert len(texts) == 3 * len(soak.SPARSITIES)


run = soak.Job.run


def mistaken(job: soak.Job, models: dict[float, Any]) -> Tensor:
    """One token of some texts is another than in the main thread."""
    found = run(job, models)
    if threading.current_thread() is not threading.main_thread() and job.seed is not None:
        found[0, -1] += 1
    return found


def cut_short(job: soak.Job, models: dict[float, Any]) -> Tensor:
    found = run(job, models)
    return found if threading.current_thread() is threading.main_thread() else found[:, 1:]


kept: list[bytes] = []


def leaking(job: soak.Job, models: dict[float, Any]) -> Tensor:
    kept.append(b"x" * (8 << 20))
    return run(job, models)


@pytest.mark.parametrize("fault", [mistaken, cut_short, leaking])
def test_a_fault_is_found(fault: Any, wina_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = soak.make_jobs()[:3]
    monkeypatch.setattr(soak, "make_jobs", lambda: jobs)
    monkeypatch.setattr(soak.Job, "run", fault)
    try:
        found = soak.soak(wina_tiny, 0.01, lambda line: None)
    finally:
        kept.clear()
    assert not found.passed
    assert str(found).endswith("FAILED")
    assert bool(found.counts["wrong"]) == (fault is not leaking)
    if fault is cut_short:
        assert found.counts["wrong"] == found.counts["tokens"]
    if fault is mistaken:
        assert found.counts["wrong"] < found.counts["generations"]


@pytest.mark.parametrize(
    ("counts", "end", "passed"),
    [
        ({"generations": 1}, 1010, True),
        ({"generations": 1}, 900, True),
        ({"generations": 1}, 1011, False),
        ({"generations": 1, "wrong": 1}, 1000, False),
        ({}, 1000, False),
    ],
)
def test_a_run_passes_without_wrong_tokens_and_within_one_percent(
    counts: dict[str, int], end: int, passed: bool
) -> None:
    assert soak.Summary(60.0, Counter(counts), 1000, end).passed == passed
