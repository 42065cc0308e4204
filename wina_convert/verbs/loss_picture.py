"""The picture of an evaluation: what the sparsity costs, a line a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from .. import pictures
from ..errors import OptionError
from .evaluate import Evaluation

MARKERS = "osD^vPX*"


def check_file(path: Path) -> None:
    """Refuse, before anything is measured, a file that no picture can be written to.

    Raises:
        OptionError: it is no .png, or in no folder.
    """
    pictures.check_available()
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise OptionError(f"--plot is {path}; give a .png file in a folder that exists")


def draw_loss(path: Path, found: Sequence[Evaluation]) -> None:
    """Write a PNG: rise of perplexity over the dense model against the sparsity achieved, both in percent.

    The rise is on a logarithmic axis; a measurement that is no worse than the dense model is not on it.

    Raises:
        OptionError: the file cannot be written.
    """
    figure, ((axes,),) = pictures.figure(9, 5)
    names = [Path(evaluation.checkpoint).name for evaluation in found]
    for number, evaluation in enumerate(found):
        points = [(one.achieved, one.rise) for one in evaluation.measurements if one.rise and one.rise > 0]
        axes.plot(
            [achieved for achieved, _ in points],
            [rise for _, rise in points],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            label=f"{evaluation.checkpoint if names.count(names[number]) > 1 else names[number]}\n({evaluation.made})",
        )
    tokens = found[0].measurements[0].tokens
    axes.set(
        xlabel="sparsity achieved (fraction of the gated weights skipped)",
        ylabel="rise of perplexity over dense",
        title=f"Loss against sparsity, {tokens} predicted tokens",
        yscale="log",
    )
    axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_minor_formatter(lambda value, position: "")
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    try:
        pictures.save(figure, path)
    except OSError as error:
        raise OptionError(f"--plot {path} cannot be written ({error.strerror or error}); give another file") from error


def _percent(value: float, position: object) -> str:
    return f"{100 * value:.3g}%"
