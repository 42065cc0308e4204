"""How fast a gated model decodes on this machine's CPU, and what it needs in memory, beside the dense model.

    python tests/benchmarks/cpu.py
    OMP_WAIT_POLICY=passive python tests/benchmarks/cpu.py --rows  # products of several rows alone, in processor time
    python tests/benchmarks/cpu.py --memory  # the peak memory of a small model alone
    python tests/benchmarks/cpu.py --conversion  # how fast a conversion computes, and what larger models take
    python tests/benchmarks/cpu.py --avx2  # as on a processor that has AVX2 and nothing newer; with any of the others too

Prints Markdown tables: decoding and prefill of a random Llama shape of 1.2 billion parameters in bfloat16, single products, of
several rows as well, and the peak memory of a process that loads the model and generates a token. Takes ten minutes and 8 GB;
wants a quiet machine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import click
import torch

from wina_convert import convert
from wina_convert.format.config import WinaConfig
from wina_convert.progress import Advance, bars, duration, silent
from wina_convert.runtime.kernels import gated_linear
from wina_convert.runtime.linear import gated_modules
from wina_convert.runtime.loader import WinaQuantizer
from wina_convert.verbs.bench import bench_model, make_dense, random_model
from wina_convert.verbs.bench_models import RANDOM, shape_config
from wina_convert.verbs.bench_products import bench_products
from wina_convert.verbs.benchmark import Benchmark

TOKENIZER = Path(__file__).parents[1] / "models" / "wina-lab-tiny"
WIDE = (2048, 1, 4096, 32, 8, False)  # a shape as in RANDOM: of a basis as larger models have it
PROOF = ("Verifying", "Comparing")  # how the steps begin in which a conversion proves what it made
# to torch, oneDNN, MKL and numba
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
}
RANDOM["small"] = (512, 8, 1536, 8, 4, True)  # 91 million parameters, most of them in the embedding

PEAK = """
import re, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.randint(1000, (1, 512), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model.generate(prompt[:, :16], attention_mask=torch.ones(1, 16), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def decoding(measured: Benchmark) -> list[str]:
    """The rows of a model's benchmark."""
    rows = [
        "| sparsity | skipped | ms/token | decoding | MB/token | of roofline | prefill s | prefill |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured.models:
        asked = "dense" if row.sparsity is None else f"{row.sparsity:.0%}"
        achieved = "" if row.achieved is None else f"{row.achieved:.1%}"
        rows.append(
            f"| {asked} | {achieved} | {row.decode_seconds * 1e3:.1f} | {row.ratio:.2f}x | {row.bytes_per_token / 1e6:.0f} "
            f"| {row.roofline:.0%} | {row.prefill_seconds:.2f} | {row.prefill_ratio:.2f}x |"
        )
    return rows


def products(measured: Benchmark) -> list[str]:
    """The rows of single products: a shape each."""
    rows = ["| in x out | dense | 0% | 50% | 65% |", "| --- | --- | --- | --- | --- |"]
    cells: dict[str, list[str]] = {}
    for row in measured.products:
        cell = f"{row.seconds * 1e3:.2f} ms, {row.bandwidth / 1e9:.0f} GB/s ({row.roofline:.0%})"
        cell += "" if row.sparsity is None else f", {row.ratio:.2f}x"
        cells.setdefault(f"{row.in_features} x {row.out_features}", []).append(cell)
    return rows + [f"| {shape} | {' | '.join(values)} |" for shape, values in cells.items()]


def several_rows(n_in: int = 4096, n_out: int = 14336, turns: int = 21) -> list[str]:
    """The rows of products of several rows of x: milliseconds, and in brackets over that of one row.

    Processor time of a thread, in turns: what else runs on the machine changes it little. Each row of x keeps inputs of its own.
    """
    threads, counts = torch.get_num_threads(), (1, 2, 4, 8)
    rows = ["| dtype, sparsity | " + " | ".join(f"{count} rows" for count in counts) + " |", "| --- " * 5 + "|"]
    for dtype in (torch.bfloat16, torch.float32):
        weights = [(0.02 * torch.randn(n_in, n_out)).to(dtype) for _ in range(4)]  # no cache holds them
        x = torch.randn(max(counts), n_in).to(dtype)
        for sparsity in (0.0, 0.5):
            tau = torch.full((n_in,), x.abs().float().quantile(sparsity).item() if sparsity else -1.0)
            clocks: dict[int, list[float]] = {count: [] for count in counts}
            for turn in range(turns + 1):
                for number, count in enumerate(counts):
                    begin = process_time()
                    gated_linear(x[:count], weights[(turn + number) % 4], tau, None)
                    clocks[count].append((process_time() - begin) / threads)
            took = {count: median(clock[1:]) for count, clock in clocks.items()}  # the first may compile
            cells = [f"{took[count] * 1e3:.2f} ({took[count] / took[1]:.2f}x)" for count in counts]
            rows.append(f"| {str(dtype).removeprefix('torch.')}, {sparsity:.0%} | {' | '.join(cells)} |")
    return rows


def peaks(size: str) -> str:
    """Peak memory of processes that load the dense and the gated model of a size."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        dense, gated = _peaks(Path(folder), size)
    return f"{size}: peak memory: dense {dense / 1e6:.0f} MB, gated {gated / 1e6:.0f} MB ({gated / dense - 1:+.1%})"


def _peaks(folder: Path, size: str) -> tuple[int, int]:
    """In bytes."""
    model = random_model(size, "bfloat16")
    config = WinaConfig(sparsity=0.5, prefill="gated", modules=list(gated_modules(model)))
    model.config.quantization_config = config
    model.hf_quantizer = WinaQuantizer(config, pre_quantized=True)
    model.save_pretrained(folder / "gated")
    del model.config.quantization_config, model.hf_quantizer
    make_dense(model).save_pretrained(folder / "dense")
    del model
    found = []
    for name in ("gated", "dense", "gated"):  # the first may compile
        output = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder / name)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        found.append(1024 * int(output))
    return found[1], found[2]


class Steps:
    """Times the steps of a conversion, and beside each of them how fast torch multiplies in float32."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.rates: list[float] = []
        self.left, self.right = torch.randn(512, WIDE[0]), torch.randn(WIDE[0], WIDE[2])

    @contextmanager
    def __call__(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        """As `wina_convert.progress.Progress`."""
        self.multiply()
        begin = perf_counter()
        yield lambda done: None
        self.seconds[label] = self.seconds.get(label, 0.0) + perf_counter() - begin
        self.multiply()

    def multiply(self) -> None:
        """Measure the rate, operations a second."""
        for _ in range(5):
            begin = perf_counter()
            self.left @ self.right
            self.rates.append(2 * self.left.numel() * self.right.shape[1] / (perf_counter() - begin))


def conversion(dtype: str) -> list[str]:
    """How fast a conversion with defaults computes, in parts of torch's rate in float32; what larger models take at that rate.

    Counted are the products that fit the thresholds: 2 a weight, token and level. All else takes time and counts as nothing.
    """
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        weights = _wide(Path(folder) / "dense", dtype)
        report = convert(str(Path(folder) / "dense"), Path(folder) / "gated", progress=steps)
    fitted = report["calibration"]
    a_weight = 2 * fitted["samples"] * fitted["seq_len"] * len(fitted["levels"])
    rate = median(steps.rates)
    proof = sum(took for label, took in steps.seconds.items() if label.startswith(PROOF))
    whole = sum(steps.seconds.values())
    rows = [
        f"conversion with defaults, hidden {WIDE[0]}, {weights / 1e6:.1f} million gated weights, {dtype}, "
        f"basis {report['basis']['kind']}; torch multiplies in float32 at {rate / 1e9:.0f} GFLOP/s\n",
        "| step | s | of torch's rate |",
        "| --- | --- | --- |",
        *[f"| {label} | {took:.1f} | |" for label, took in steps.seconds.items()],
    ]
    for label, took in (("all but the proof", whole - proof), ("all", whole)):
        rows.append(f"| {label} | {took:.1f} | {a_weight * weights / rate / took:.0%} |")
    for size in ("1b", "8b"):
        larger = _gated(RANDOM[size])
        rows.append(
            f"| all, {size}, {larger / 1e9:.2f} billion gated weights | {duration(whole * larger / weights)} | |"
        )
    return rows


def _wide(folder: Path, dtype: str) -> int:
    """Write a random model of the shape `WIDE`; how many weights of it are gated."""
    from transformers import LlamaForCausalLM

    config = shape_config(WIDE, vocab_size=2048)  # the tokenizer's
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return _gated(WIDE)


def _gated(shape: Sequence[int]) -> int:
    """Weights of the decoder layers, which are gated."""
    hidden, layers, intermediate, heads, kv_heads, _ = shape
    return layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate)


@click.command()
@click.option("--prompt-tokens", default=(32, 512), multiple=True, show_default=True, help="Lengths of the prompt.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rows", is_flag=True, help="Time the products of several rows and nothing else.")
@click.option("--memory", is_flag=True, help="Measure the memory of a small model and nothing else.")
@click.option("--avx2", is_flag=True, help="As on a processor that has AVX2 and nothing newer, torch held to it too.")
@click.option("--conversion", "converts", is_flag=True, help="Time a conversion and nothing else.")
def main(prompt_tokens: tuple[int, ...], dtype: str, rows: bool, memory: bool, avx2: bool, converts: bool) -> None:
    """Print the tables."""
    if avx2 and not AVX2.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)  # libraries look when they are loaded
    if converts:
        click.echo("\n".join(conversion(dtype)))
        return
    if memory:
        click.echo(peaks("small"))
        return
    click.echo("\n".join(several_rows()))
    if rows:
        return
    progress = bars if sys.stderr.isatty() else silent
    for length in prompt_tokens:
        measured = bench_model(random="1b", prompt_tokens=length, tokens=48, dtype=dtype, progress=progress)
        click.echo(f"\n{measured.machine}; {measured.date}; memory read at {measured.bandwidth / 1e9:.1f} GB/s")
        click.echo(f"{measured.model}\n")
        click.echo("\n".join(decoding(measured)))
    measured = bench_products(dtype=dtype, progress=progress)
    click.echo("\n" + "\n".join(products(measured)))
    click.echo("\n" + peaks("1b"))


if __name__ == "__main__":
    main()
