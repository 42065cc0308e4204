"""Convert models in every way that is offered, and measure each on text that no conversion saw.

    python tests/benchmarks/quality.py MODEL... --text FILE... --results FILE.json --plot FILE.png
    python tests/benchmarks/quality.py MODEL --text FILE... --way tuned --device cuda --results FILE.json
    python tests/benchmarks/quality.py --results FILE.json --add OTHER.json --plot FILE.png

Prints a Markdown table: the rise of perplexity over the dense model where a token reads equally few of the gated weights, and
draws it. A low-rank term counts as weights read. One checkpoint serves all columns; where a token reads more or less than a
column says, it is asked again for so much less or more. What the results file holds already is not measured again, so an
interrupted run goes on, and models and ways may be measured one by one; without a model, what was measured is printed.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import wina_convert
from wina_convert import pictures
from wina_convert.format.checkpoint import open_checkpoint
from wina_convert.format.names import WEIGHT_T
from wina_convert.models.device import choose_device
from wina_convert.progress import bars
from wina_convert.verbs.evaluate import evaluate

# options of a conversion, by a short name; every option that matters is said, so that results outlive a change of a default
WAYS: dict[str, dict[str, Any]] = {
    "teal": {"scheme": "teal", "allocation": "uniform", "basis": "none"},
    "teal-greedy": {"scheme": "teal", "allocation": "greedy", "basis": "none"},
    "wina-paper": {"scheme": "wina-paper", "allocation": "uniform", "basis": "none"},
    "was": {"scheme": "was", "allocation": "uniform", "basis": "none"},
    "uniform": {"allocation": "uniform", "basis": "none"},
    "types": {"allocation": "types", "basis": "none"},
    "pca": {"allocation": "types", "basis": "pca"},
    "measured": {"allocation": "measured", "basis": "none"},
    "fitted": {"allocation": "types", "basis": "fitted"},
    "fitted-measured": {"allocation": "measured", "basis": "fitted"},
    "fitted-greedy": {"allocation": "greedy", "basis": "fitted"},
    "r-sparse": {"scheme": "r-sparse", "allocation": "measured", "basis": "none"},
    "r-sparse-fitted": {"scheme": "r-sparse", "allocation": "measured", "basis": "fitted"},
    "tuned": {"allocation": "measured", "basis": "fitted", "tune": True},
}
CLOSE = 0.003  # of the weights that are not read to those of the column
ROUNDS = 4
MARKERS = "osD^vPX*<>hdp8"


@click.command()
@click.argument("models", nargs=-1)
@click.option("--text", "texts", multiple=True, help="Text to measure on; repeat for more.")
@click.option("--calibration", default="bundled", show_default=True, help="Text to convert with.")
@click.option(
    "--sparsity", "columns", multiple=True, type=float, default=(0.25, 0.4, 0.5, 0.65, 0.75), show_default=True
)
@click.option("--samples", default=64, show_default=True, help="Sequences to measure on.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only these.  [default: all]")
@click.option("--dtype", default="float32", show_default=True, help="To convert and measure in.")
@click.option("--device", default="cpu", show_default=True, help="To convert and measure on.")
@click.option("--batch-size", default=1, show_default=True, help="Sequences computed at a time.")
@click.option(
    "--results", type=click.Path(path_type=Path), help="Keep what is measured in this file, and go on from it."
)
@click.option("--add", "others", multiple=True, type=click.Path(exists=True, path_type=Path), help="More results.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table.")
def main(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    calibration: str,
    columns: tuple[float, ...],
    samples: int,
    ways: tuple[str, ...],
    dtype: str,
    device: str,
    batch_size: int,
    results: Path | None,
    others: tuple[Path, ...],
    plot: Path | None,
) -> None:
    """Print the table."""
    if models and not texts:
        raise click.UsageError("give --text to measure on")
    found = merged([*others, *([results] if results and results.exists() else [])])
    for model in models:
        for way in ways or WAYS:
            if way in found.setdefault(Path(model).name, {}):
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "checkpoint")
                options = {"calibration": calibration, "dtype": dtype, "device": device, "batch_size": batch_size}
                wina_convert.convert(model, out, progress=bars, **options, **WAYS[way])
                seconds = time.monotonic() - start
                measured = at_columns(out, model, texts, columns, samples, device, batch_size)
            found[Path(model).name][way] = {"seconds": seconds, "columns": measured}
            if results:
                results.write_text(json.dumps(found, indent=1))
    click.echo(table(found, columns))
    if plot:
        draw(found, plot)


def merged(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results of several files: by model and way, the ways in the order of WAYS; of the same measured twice, the last."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for model, ways in json.loads(file.read_text()).items():
            found.setdefault(model, {}).update(ways)
    return {model: {way: ways[way] for way in WAYS if way in ways} for model, ways in found.items()}


def at_columns(
    folder: str,
    model: str,
    texts: tuple[str, ...],
    columns: tuple[float, ...],
    samples: int,
    device: str,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Rise of perplexity and weights saved by column, the second as near to the column as asking again brings it."""
    tensors = open_checkpoint(Path(folder)).folder.tensors
    gated = sum(spec.numel for name, spec in tensors.items() if name.endswith(f".{WEIGHT_T}"))
    asked = {column: column for column in columns}
    found: dict[float, dict[str, float]] = {}
    dense = 0.0
    for number in range(ROUNDS):
        far = [c for c in columns if c not in found or abs(found[c]["saved"] - c) > CLOSE]
        if not far:
            break
        for column in far:
            if column in found:
                asked[column] = round(min(0.95, max(0.0, asked[column] + column - found[column]["saved"])), 4)
        (one,) = evaluate(
            [folder],
            texts,
            [asked[c] for c in far],
            model if number == 0 else None,
            samples,
            batch_size=batch_size,
            device=choose_device(device),
            progress=bars,
        )
        dense = one.measurements[0].dense_perplexity or dense
        by_asked = {at.sparsity: (at, cost) for at, cost in zip(one.measurements, one.costs, strict=True)}
        for column in far:
            at, cost = by_asked[asked[column]]
            saved = (one.dense.macs - cost.macs) / gated  # with a low-rank term, less than what is skipped
            found[column] = {"rise": at.perplexity / dense - 1, "saved": saved, "asked": asked[column]}
    return {str(column): one | {"dense": dense} for column, one in found.items()}


def shown(way: str) -> str:
    """The options of a way, as the command line takes them."""
    words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in WAYS[way].items()]
    return f"`{' '.join(words)}`"


def table(found: dict[str, Any], columns: tuple[float, ...]) -> str:
    """A row a way of each model."""
    heads = " | ".join(f"{column:.0%}" for column in columns)
    lines = [f"| model | options | {heads} | seconds |", f"| --- | --- |{' ---: |' * (len(columns) + 1)}"]
    for model, ways in found.items():
        for way, one in ways.items():
            cells = " | ".join(cell(column, one["columns"][str(column)]) for column in columns)
            lines.append(f"| {model} | {shown(way)} | {cells} | {one['seconds']:.0f} |")
    return "\n".join(lines)


def cell(column: float, one: dict[str, float]) -> str:
    """The rise, and the weights saved where they are not those of the column."""
    off = f" (at {one['saved']:.1%})" if abs(one["saved"] - column) > CLOSE else ""
    return f"{one['rise']:+.1%}{off}" if abs(one["rise"]) >= 0.01 else f"{one['rise']:+.2%}{off}"


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a model and a line a way: rise of perplexity against weights saved."""
    figure, (panels,) = pictures.figure(4.2 * len(found) + 3, 4.6, 1, len(found))
    lines: dict[str, Any] = {}
    for axes, (model, ways) in zip(panels, found.items(), strict=True):
        for way, one in ways.items():
            points = [(at["saved"], at["rise"]) for at in one["columns"].values() if at["rise"] > 0]
            number = list(WAYS).index(way)
            style = {"color": f"C{number}", "marker": MARKERS[number], "markersize": 4, "linewidth": 1.2}
            (lines[way],) = axes.plot(*zip(*points, strict=True), label=shown(way).strip("`"), **style)
        axes.set(xlabel="part of the gated weights not read", title=model, yscale="log")
        axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
        axes.yaxis.set_minor_formatter(lambda value, position: "")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, position: f"{100 * value:.3g}%")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("rise of perplexity over dense")
    handles = [lines[way] for way in WAYS if way in lines]
    panels[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
