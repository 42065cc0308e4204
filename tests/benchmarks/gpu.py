"""How long the gated products of Llama-3-8B take on this machine's GPU, beside the dense products of torch.

    python tests/benchmarks/gpu.py

Prints Markdown tables. A time is the median over replays of a CUDA graph in which each product reads another copy of its
weights, so that few come from the cache. Takes half a minute and 2 GB; wants an idle GPU.
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_convert.runtime.kernels import cuda, gated_linear

SHAPES = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
APART = {"q": (4096, (4096,)), "k": (4096, (1024,)), "gate": (4096, (14336,))}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CACHE = 320_000_000  # bytes of copies, several times the cache of any GPU


def seconds(call: Callable[[int], object], copies: int, repeats: int = 9) -> float:
    """Median time of one call; `call` is given the number of a copy."""
    for copy in range(copies):
        call(copy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(4 * copies):
            call(i % copies)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (4 * copies) / 1e3)
    return statistics.median(times)


def inputs(n_in: int, sparsity: float, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, n_in] and tau [n_in]; exactly this fraction of the first row is skipped."""
    x = torch.randn(rows, n_in, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    skipped = round(sparsity * n_in)
    cutoff = float(x[0].float().abs().sort().values[skipped - 1]) if skipped else -1.0
    return x, torch.full((n_in,), cutoff, device="cuda")


def dense(x: Tensor, weights: list[Tensor]) -> float:
    """Seconds of the product of torch; a weight [out, in] each time."""
    return seconds(lambda copy: linear(x, weights[copy]), len(weights))


def measure(
    n_in: int, outs: tuple[int, ...], sparsities: tuple[float, ...], rows: int, dtype: torch.dtype
) -> list[float]:
    """Seconds of the dense product with all matrices side by side, then of the gated ones in one launch."""
    copies = max(2, min(16, CACHE // (n_in * sum(outs) * dtype.itemsize) + 1))
    weights = [[(torch.randn(n_in, out, device="cuda") / 64).to(dtype) for out in outs] for _ in range(copies)]
    x, _ = inputs(n_in, 0, rows, dtype)
    times = [dense(x, [torch.cat(weight, 1).t().contiguous() for weight in weights])]
    for sparsity in sparsities:
        x, tau = inputs(n_in, sparsity, rows, dtype)

        def call(copy: int, x: Tensor = x, tau: Tensor = tau) -> object:
            if len(outs) == 1:
                return gated_linear(x, weights[copy][0], tau, None)
            return cuda.products(x, weights[copy], [tau] * len(outs), [None] * len(outs))

        times.append(seconds(call, copies))
    torch.cuda.empty_cache()
    return times


def host() -> list[str]:
    """What a call costs the processor, eager, when the GPU has nothing to wait for."""
    x, tau = inputs(512, 0.5, 1, torch.bfloat16)
    weight_t = torch.randn(512, 512, device="cuda").bfloat16()
    weight = weight_t.t().contiguous()
    found = []
    for name, call in {
        "gated": lambda: gated_linear(x, weight_t, tau, None),
        "dense": lambda: linear(x, weight),
    }.items():
        times = []
        for _ in range(5):
            call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(200):
                call()
            times.append((time.perf_counter() - begin) / 200)
        found.append(f"{name} {statistics.median(times) * 1e6:.1f} us")
    return found


@click.command()
@click.option("--sparsity", "sparsities", default=(0.0, 0.25, 0.5, 0.65, 0.9), multiple=True, show_default=True)
@click.option(
    "--dtype", "dtypes", default=tuple(DTYPES), multiple=True, type=click.Choice(list(DTYPES)), show_default=True
)
@click.option("--rows", default=1, show_default=True)
def main(sparsities: tuple[float, ...], dtypes: tuple[str, ...], rows: int) -> None:
    """Print the tables."""
    torch.set_grad_enabled(False)
    click.echo(f"{torch.cuda.get_device_name()}; torch {torch.__version__}")
    for name in dtypes:
        click.echo(f"\n{name}, {rows} row(s), us\n")
        click.echo("| product | dense | " + " | ".join(f"{sparsity:.0%}" for sparsity in sparsities) + " |")
        click.echo("| --- " * (2 + len(sparsities)) + "|")
        total = [0.0] * (1 + len(sparsities))
        for label, (n_in, outs) in {**SHAPES, **APART}.items():
            times = measure(n_in, outs, sparsities, rows, DTYPES[name])
            if label in SHAPES:
                total = [a + b for a, b in zip(total, times, strict=True)]
            click.echo(line(label, times))
            if label == list(SHAPES)[-1]:
                click.echo(line("**these four**", total))
    click.echo("\nhost, each call: " + ", ".join(host()))


def line(label: str, times: list[float]) -> str:
    """A row of the table: microseconds, and how often faster than the first."""
    cells = [f"{times[0] * 1e6:.1f}", *(f"{t * 1e6:.1f} ({times[0] / t:.2f}x)" for t in times[1:])]
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
