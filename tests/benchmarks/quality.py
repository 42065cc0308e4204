"""Convert models in every way that is offered, and measure each on text that no conversion saw.

    python tests/benchmarks/quality.py MODEL... --text FILE... --results FILE.json --plot FILE.png

Prints a Markdown table: the rise of perplexity over the dense model at equal achieved sparsity, and draws it. One checkpoint
serves all columns; where it skips more or less than a column says, it is asked again for so much less or more. What the results
file holds already is not measured again, so an interrupted run goes on and models may be measured one by one.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

import wina_convert
from wina_convert import pictures
from wina_convert.progress import bars
from wina_convert.verbs.evaluate import evaluate

PLAIN: dict[str, Any] = {"basis": "none", "allocation": "uniform"}
WAYS: dict[str, dict[str, Any]] = {
    "`--scheme teal --allocation uniform --basis none`": PLAIN | {"scheme": "teal"},
    "`--scheme teal --allocation greedy --basis none`": PLAIN | {"scheme": "teal", "allocation": "greedy"},
    "`--scheme wina-paper --allocation uniform --basis none`": PLAIN | {"scheme": "wina-paper"},
    "`--scheme was --allocation uniform --basis none`": PLAIN | {"scheme": "was"},
    "`--allocation uniform --basis none`": PLAIN,
    "`--basis none`": {"basis": "none"},
    "`--basis pca`": {"basis": "pca"},
    "`--basis fitted`": {"basis": "fitted"},
    "`--basis fitted --allocation greedy`": {"basis": "fitted", "allocation": "greedy"},
}
CLOSE = 0.003  # of the achieved sparsity to that of the column
ROUNDS = 3
MARKERS = "osD^vPX*<"


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, required=True, help="Text to measure on; repeat for more.")
@click.option("--calibration", default="bundled", show_default=True, help="Text to convert with.")
@click.option(
    "--sparsity", "columns", multiple=True, type=float, default=(0.25, 0.4, 0.5, 0.65, 0.75), show_default=True
)
@click.option("--samples", default=64, show_default=True, help="Sequences to measure on.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only these.  [default: all]")
@click.option("--dtype", default="float32", show_default=True, help="To convert and measure in.")
@click.option(
    "--results", type=click.Path(path_type=Path), help="Keep what is measured in this file, and go on from it."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table.")
def main(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    calibration: str,
    columns: tuple[float, ...],
    samples: int,
    ways: tuple[str, ...],
    dtype: str,
    results: Path | None,
    plot: Path | None,
) -> None:
    """Print the table."""
    found: dict[str, Any] = json.loads(results.read_text()) if results and results.exists() else {}
    for model in models:
        for way in ways or WAYS:
            if way in found.setdefault(Path(model).name, {}):
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "checkpoint")
                wina_convert.convert(model, out, calibration=calibration, dtype=dtype, progress=bars, **WAYS[way])
                seconds = time.monotonic() - start
                measured = at_achieved(out, model, texts, columns, samples)
            found[Path(model).name][way] = {"seconds": seconds, "columns": measured}
            if results:
                results.write_text(json.dumps(found, indent=1))
    click.echo(table(found, columns))
    if plot:
        draw(found, plot)


def at_achieved(
    folder: str, model: str, texts: tuple[str, ...], columns: tuple[float, ...], samples: int
) -> dict[str, dict[str, float]]:
    """Rise of perplexity and achieved sparsity by column, the second as near to the column as asking again brings it."""
    asked = {column: column for column in columns}
    found: dict[float, dict[str, float]] = {}
    for number in range(ROUNDS):
        far = [c for c in columns if c not in found or abs(found[c]["achieved"] - c) > CLOSE]
        if not far:
            break
        for column in far:
            if column in found:
                asked[column] = round(min(0.95, max(0.0, asked[column] + column - found[column]["achieved"])), 4)
        (one,) = evaluate(
            [folder], texts, [asked[c] for c in far], model if number == 0 else None, samples, progress=bars
        )
        if number == 0:
            dense = one.measurements[0].dense_perplexity or 0.0
        measured = {at.sparsity: at for at in one.measurements}
        found |= {
            c: {"rise": measured[asked[c]].perplexity / dense - 1, "achieved": measured[asked[c]].achieved} for c in far
        }
    return {str(column): one | {"dense": dense} for column, one in found.items()}


def table(found: dict[str, Any], columns: tuple[float, ...]) -> str:
    """A row a way of each model."""
    heads = " | ".join(f"{column:.0%}" for column in columns)
    lines = [f"| model | options | {heads} | seconds |", f"| --- | --- |{' ---: |' * (len(columns) + 1)}"]
    for model, ways in found.items():
        for way, one in ways.items():
            cells = " | ".join(cell(column, one["columns"][str(column)]) for column in columns)
            lines.append(f"| {model} | {way} | {cells} | {one['seconds']:.0f} |")
    return "\n".join(lines)


def cell(column: float, one: dict[str, float]) -> str:
    """The rise, and the sparsity where it is not that of the column."""
    off = f" (at {one['achieved']:.1%})" if abs(one["achieved"] - column) > CLOSE else ""
    return f"{one['rise']:+.1%}{off}" if abs(one["rise"]) >= 0.01 else f"{one['rise']:+.2%}{off}"


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel a model and a line a way: rise of perplexity against achieved sparsity."""
    figure, (panels,) = pictures.figure(4.2 * len(found) + 3, 4.6, 1, len(found))
    lines: dict[str, Any] = {}
    for axes, (model, ways) in zip(panels, found.items(), strict=True):
        for way, one in ways.items():
            points = [(at["achieved"], at["rise"]) for at in one["columns"].values() if at["rise"] > 0]
            number = list(WAYS).index(way)
            style = {"color": f"C{number}", "marker": MARKERS[number], "markersize": 4, "linewidth": 1.2}
            (lines[way],) = axes.plot(*zip(*points, strict=True), label=way.strip("`"), **style)
        axes.set(xlabel="sparsity achieved", title=model, yscale="log")
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
