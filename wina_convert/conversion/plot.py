"""Pictures of a conversion: asked against achieved sparsity per layer, and the score histograms with their thresholds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import pictures
from ..fitting.budget import Budget
from ..fitting.histogram import ScoreHistogram
from ..format.experts import of_any_expert
from ..format.names import SCORES_PNG, SPARSITY_PNG, split_layer

PICTURES = {
    SPARSITY_PNG: "Sparsity achieved by decoder layer and projection",
    SCORES_PNG: "Distribution of the scores by projection, with the thresholds",
}


@dataclass(frozen=True)
class ScoreCurve:
    """What the picture of one projection's scores needs of its histogram.

    Attributes:
        scores: [G], float64, where there are any.
        density: [G], float64, fraction of scores per factor of 2.
        threshold: at the default sparsity.
    """

    scores: Tensor
    density: Tensor
    threshold: float


def score_curve(histogram: ScoreHistogram, sparsity: float) -> ScoreCurve:
    """The distribution above its lowest 0.2%, and the threshold."""
    scores, density = histogram.density()
    shown = scores > histogram.quantile(0.002)
    return ScoreCurve(scores[shown], density[shown], histogram.quantile(sparsity))


def draw_conversion(folder: Path, report: Mapping[str, Any], curves: Mapping[str, ScoreCurve], budget: Budget) -> None:
    """Write both pictures into a folder.

    Args:
        folder: where to.
        report: as in wina_report.json.
        curves: the distribution of scores of every projection.
        budget: the sparsity that was asked of each.
    """
    draw_sparsity(folder / SPARSITY_PNG, report, budget)
    draw_scores(folder / SCORES_PNG, report["options"]["sparsity"], curves)


def draw_sparsity(path: Path, report: Mapping[str, Any], budget: Budget) -> None:
    """One line per kind of projection: the sparsity achieved on held-out calibration text, by layer; of experts, their mean.

    Where kinds are asked for unlike sparsities, a dashed line in the colour of each says for which (in the mean
    over the layers, where these differ too).
    """
    asked = report["verification"]["held_out"]["sparsity"]
    figure, ((axes,),) = pictures.figure(9, 5)
    kinds: dict[str, dict[int, list[float]]] = {}
    shares: dict[str, list[float]] = {}
    for name, achieved in report["verification"]["held_out"]["projections"].items():
        layer, kind = _layer_and_kind(name)
        kinds.setdefault(kind, {}).setdefault(layer, []).append(achieved)
        shares.setdefault(kind, []).append(budget.asked(name, asked))
    for kind, by_layer in kinds.items():
        points = [(layer, sum(found) / len(found)) for layer, found in by_layer.items()]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=kind)
        if budget.shares:
            axes.axhline(
                sum(shares[kind]) / len(shares[kind]), color=line.get_color(), linestyle="--", linewidth=0.8, alpha=0.6
            )
    thin = "; thin: of each" if budget.shares else ""
    axes.axhline(asked, color="black", linestyle="--", linewidth=1.2, label=f"asked {asked:.0%}{thin}")
    axes.set(
        xlabel="decoder layer",
        ylabel="fraction of inputs skipped",
        title="Sparsity achieved on held-out calibration text",
    )
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, asked - 0.05), max(high, asked + 0.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    pictures.save(figure, path)


def draw_scores(path: Path, sparsity: float, curves: Mapping[str, ScoreCurve]) -> None:
    """The distribution of scores of every kind of projection, a line a layer, with the thresholds as ticks on it.

    Of the experts of a layer, the first stands for all.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    kinds: dict[str, list[tuple[int, ScoreCurve]]] = {}
    for name, curve in curves.items():
        layer, kind = _layer_and_kind(name)
        if layer not in (known for known, _ in kinds.get(kind, ())):
            kinds.setdefault(kind, []).append((layer, curve))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, grid = pictures.figure(max(4 * columns, 7), 3 * rows, rows, columns)
    last = max(layer for members in kinds.values() for layer, _ in members)
    for axes, (kind, members) in zip(grid.flat, kinds.items(), strict=False):
        for layer, curve in members:
            color = colormaps["viridis"](layer / max(last, 1))
            axes.plot(curve.scores.tolist(), curve.density.tolist(), color=color, linewidth=1)
            if len(curve.scores):
                height = float(curve.density[int((curve.scores - curve.threshold).abs().argmin())])
                axes.plot([curve.threshold], [height], marker="|", markersize=16, markeredgewidth=2, color=color)
        axes.set(xscale="log", title=kind)
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    (tick,) = grid.flat[0].plot([], [], marker="|", markersize=12, markeredgewidth=2, color="black", linestyle="none")
    figure.legend([tick], [f"threshold at {sparsity:.0%}"], loc="outside upper right", frameon=False)
    layers = ScalarMappable(Normalize(0, max(last, 1)), "viridis")
    bar = figure.colorbar(layers, ax=grid, label="decoder layer", aspect=40)
    bar.locator.set_params(integer=True)
    bar.update_ticks()
    figure.supxlabel("score |x| · column weight")
    figure.supylabel("scores in a factor of 2")
    pictures.save(figure, path)


def _layer_and_kind(name: str) -> tuple[int, str]:
    place = split_layer(name)
    return (place[1], of_any_expert(place[2])) if place else (0, name)  # the head, a kind of its own
