"""The same input gives the same bytes: of a whole conversion, of its counts, and of a loaded model's logits."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import wina_convert
from support.folders import files_of
from wina_convert.fitting.calibrate import calibrate_layer
from wina_convert.fitting.histogram import ScoreHistogram
from wina_convert.fitting.schemes import column_norms
from wina_convert.fitting.thresholds import threshold_curve
from wina_convert.format.grid import GRID
from wina_convert.runtime.linear import WinaLinear

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads_as_before")]


CONVERSIONS = {"float32": (2, 100), "bfloat16": (4, 24)}  # dtype -> samples, tokens of a sequence
CONVERT = f"""
import hashlib, sys, torch, wina_convert
tokens = torch.randint(2, 2048, (1, 60), generator=torch.Generator().manual_seed(1))
for dtype, (samples, length) in {CONVERSIONS}.items():
    out = sys.argv[2] + dtype
    wina_convert.convert(sys.argv[1], out, samples=samples, seq_len=length, dtype=dtype, basis="none")
    model = wina_convert.load(out)
    with torch.no_grad():
        logits = torch.cat([model(tokens).logits, model(tokens[:, :5]).logits], 1).float()
    print(dtype, torch.get_num_threads(), tuple(logits.shape), hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in two folders."""
    a, b = files_of(one), files_of(other)
    assert a
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


# Conversions


@dataclass(frozen=True)
class Process:
    """A process that converts and runs what it wrote: where it wrote (a prefix of folders), and what it printed."""

    out: str
    printed: list[str]

    def folder(self, dtype: str) -> Path:
        return Path(self.out + dtype)


@pytest.fixture(scope="module")
def processes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Process]:
    """Three processes with other hash seeds, in other folders, under other names; the third with two threads."""
    running = {}
    for name, threads in (("first", 1), ("second", 1), ("threads", 2)):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-c", CONVERT, str(tiny), f"{name}-"]
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(len(running))}
        variables["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait hold up the neighbours' tests
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
        )
        running[name] = process, str(folder / f"{name}-")
    found = {
        name: Process(out, process.communicate(timeout=400)[0].splitlines()) for name, (process, out) in running.items()
    }
    assert [process.returncode for process, _ in running.values()] == [0, 0, 0]
    return found


def test_another_process_computes_the_same_logits(processes: dict[str, Process]) -> None:
    printed = processes["first"].printed
    assert [line.split(" ")[:2] for line in printed] == [[dtype, "1"] for dtype in CONVERSIONS]
    assert all("(1, 65, 2048)" in line for line in printed)
    assert processes["second"].printed == printed


@pytest.mark.parametrize("dtype", CONVERSIONS)
def test_another_process_writes_the_same_bytes(dtype: str, processes: dict[str, Process]) -> None:
    assert differing(processes["first"].folder(dtype), processes["second"].folder(dtype)) == []


@pytest.mark.parametrize("dtype", CONVERSIONS)
def test_the_number_of_threads_changes_no_byte(dtype: str, processes: dict[str, Process]) -> None:
    assert [line.split(" ")[1] for line in processes["threads"].printed] == ["2"] * len(CONVERSIONS)
    assert differing(processes["first"].folder(dtype), processes["threads"].folder(dtype)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_batch_size_changes_no_byte_on_a_cpu(dtype: str, tiny: Path, tmp_path: Path) -> None:
    """A sequence of 8 tokens alone streams through the compiled kernels; several at a time would not."""
    options: dict[str, Any] = {"samples": 10, "seq_len": 8, "device": "cpu", "dtype": dtype, "basis": "none"}
    sizes = (1, 3, 8)
    for size in sizes:
        wina_convert.convert(str(tiny), tmp_path / f"{size}", batch_size=size, **options)
    for size in sizes[1:]:
        # The report, and with it the card's command and the manifest, names the batch size that was asked for.
        names = set(differing(tmp_path / "1", tmp_path / f"{size}"))
        assert names <= {"README.md", "wina_report.json", "wina_manifest.json"}
    reports = [json.loads((tmp_path / f"{size}" / "wina_report.json").read_text()) for size in sizes]
    assert [report["options"].pop("batch_size") for report in reports] == list(sizes)
    assert reports[0] == reports[1] == reports[2]


# Counts


@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), max_size=30), min_size=1, max_size=8), st.randoms())
@settings(max_examples=60, deadline=None)
def test_scores_can_be_added_in_any_order_and_in_any_chunks(chunks: list[list[float]], shuffled: random.Random) -> None:
    def count(parts: list[list[float]]) -> ScoreHistogram:
        found = ScoreHistogram()
        for part in parts:
            found.add(torch.tensor(part, dtype=torch.float32))
        return found

    values = [value for chunk in chunks for value in chunk]
    expected = count([values])
    assert int(expected.counts.sum()) == len(values)
    permuted = shuffled.sample(chunks, len(chunks))
    mixed = shuffled.sample(values, len(values))
    cut = shuffled.randint(0, len(values))
    for other in (count(chunks), count(permuted), count([mixed]), count([mixed[:cut], mixed[cut:]])):
        assert torch.equal(other.counts, expected.counts)
        assert [other.quantile(sparsity) for sparsity in GRID] == [expected.quantile(sparsity) for sparsity in GRID]


@given(st.integers(0, 2**32 - 1), st.permutations(range(12)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_sequences_behind_the_pilot_changes_no_threshold(seed: int, order: list[int]) -> None:
    """The first eight, which the provisional thresholds come from, may change places among themselves."""
    generator = torch.Generator().manual_seed(seed)
    gate = WinaLinear(16, 16, GRID, bias=False)
    with torch.no_grad():
        gate.weight_t.normal_(generator=generator)
        gate.column_norms.copy_(column_norms(gate.weight_t))
    sequences = torch.randn(12, 1, 9, 16, generator=generator)
    order = [n for n in order if n < 8] + [n for n in order if n >= 8]
    curves, behind = [], []
    for chosen in (list(range(12)), order):
        states = {level: [sequences[n] for n in chosen] for level in (0.25, 0.5)}
        with torch.no_grad():
            found, _ = calibrate_layer(lambda batch, number: gate(batch), {"gate": gate}, states, lambda done: None)
        curves.append(threshold_curve(found["gate"], GRID))
        behind.append({level: dict(zip(chosen, batches, strict=True)) for level, batches in states.items()})
    assert curves[0].max() > 0
    assert torch.equal(*curves)
    for level in behind[0]:
        assert all(torch.equal(behind[0][level][n], behind[1][level][n]) for n in range(12))


# Logits


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1), (1, 7), (8, 1), (3, 5), (1, 90)]  # few rows and many
    return [torch.randint(2, 2048, shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 1)],
    ids=str,
)
def test_logits_are_the_same_bits_from_run_to_run(dtype: torch.dtype, threads: int, wina_tiny: Path) -> None:
    torch.set_num_threads(threads)
    model, again = (wina_convert.load(str(wina_tiny), dtype=dtype) for _ in range(2))

    @torch.no_grad()
    def run(model: Any) -> list[Tensor]:
        found = []
        for prompt in prompts():
            step = model(prompt, use_cache=True)
            found.append(step.logits)
            for _ in range(2):
                token = step.logits[:, -1:].argmax(-1)
                step = model(token, past_key_values=step.past_key_values, use_cache=True)
                found.append(step.logits)
        return found

    first = run(model)
    assert all(logits.isfinite().all() for logits in first)
    for other in (run(model), run(again)):
        assert all(map(torch.equal, first, other))
    wina_convert.set_sparsity(model, 0.0)
    between = run(model)
    assert not any(map(torch.equal, first, between))
    wina_convert.set_sparsity(model, 0.5)
    assert all(map(torch.equal, first, run(model)))
