"""How fast a gated model decodes on this machine's CPU, and what it needs in memory, beside the dense model.

    python tests/benchmarks/cpu.py
    OMP_WAIT_POLICY=passive python tests/benchmarks/cpu.py --rows  # products of several rows alone, in processor time
    python tests/benchmarks/cpu.py --memory  # the peak memory of a small model alone

Prints Markdown tables: decoding and prefill of a random Llama shape of 1.2 billion parameters in bfloat16, single products, of
several rows as well, and the peak memory of a process that loads the model and generates a token. Takes ten minutes and 8 GB;
wants a quiet machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import process_time

import click
import torch

from wina_convert.format.config import WinaConfig
from wina_convert.progress import bars, silent
from wina_convert.runtime.kernels import gated_linear
from wina_convert.runtime.linear import gated_modules
from wina_convert.runtime.loader import WinaQuantizer
from wina_convert.verbs.bench import bench_model, make_dense, random_model
from wina_convert.verbs.bench_models import RANDOM
from wina_convert.verbs.bench_products import bench_products
from wina_convert.verbs.benchmark import Benchmark

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


@click.command()
@click.option("--prompt-tokens", default=(32, 512), multiple=True, show_default=True, help="Lengths of the prompt.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rows", is_flag=True, help="Time the products of several rows and nothing else.")
@click.option("--memory", is_flag=True, help="Measure the memory of a small model and nothing else.")
def main(prompt_tokens: tuple[int, ...], dtype: str, rows: bool, memory: bool) -> None:
    """Print the tables."""
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
