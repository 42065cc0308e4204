"""Convert models with the bundled calibration text, without a basis and with one, and measure each on other text.

    python tests/benchmarks/quality.py MODEL... --text FILE...

Prints a Markdown table. One checkpoint serves all sparsities. Perplexity and achieved sparsity are of 64 sequences spread evenly
over the texts, which neither a basis nor a threshold was fitted on.
"""

import tempfile
from pathlib import Path

import click

import wina_convert
from wina_convert.progress import bars
from wina_convert.verbs.evaluate import evaluate


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, required=True, help="Text to measure on; repeat for more.")
@click.option("--basis", "bases", multiple=True, default=("none", "pca", "fitted"), show_default=True)
@click.option("--sparsity", "sparsities", multiple=True, type=float, default=(0.25, 0.4, 0.5, 0.65), show_default=True)
@click.option("--samples", default=64, show_default=True, help="Sequences to measure on.")
def main(
    models: tuple[str, ...], texts: tuple[str, ...], bases: tuple[str, ...], sparsities: tuple[float, ...], samples: int
) -> None:
    """Print the table."""
    click.echo("| model | basis | sparsity asked | achieved | perplexity dense | gated | rise |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for model in models:
        for basis in bases:
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "checkpoint")
                wina_convert.convert(model, out, basis=basis, progress=bars)
                (found,) = evaluate([out], texts, sparsities, source=model, samples=samples, progress=bars)
                for one in found.measurements:
                    assert one.dense_perplexity is not None
                    click.echo(
                        f"| {Path(model).name} | {basis} | {one.sparsity:.0%} | {one.achieved:.2%} "
                        f"| {one.dense_perplexity:.2f} | {one.perplexity:.2f} "
                        f"| {one.perplexity / one.dense_perplexity - 1:+.2%} |"
                    )


if __name__ == "__main__":
    main()
