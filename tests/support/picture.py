"""The picture of the page that says how it works: `python tests/support/picture.py` draws it. Needs the extra 'plot'.

A product of 16 inputs and 10 outputs with random numbers, gated by the rule that the package runs.
"""

from pathlib import Path

import torch

from wina_convert import pictures
from wina_convert.runtime.rule import cutoffs, dropped, scores

PICTURE = Path(__file__).parents[2] / ".github" / "how_it_works.png"
KEPT, SKIPPED, LINE = "#1f6fb4", "#c9ced6", "#b3402a"


def draw(path: Path, seed: int = 2) -> int:
    """Draw it, and return how many inputs are skipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, generator=generator) * torch.randn(16, generator=generator).abs()  # few are large, as in models
    weight = torch.randn(10, 16, generator=generator) * torch.rand(16, generator=generator).add(0.3)
    norms = weight.norm(dim=0)
    scored = scores(x, norms)
    threshold = scored.sort().values[7:9].mean()  # half are above
    skipped = dropped(x, cutoffs(threshold, norms))
    colours = [SKIPPED if skip else KEPT for skip in skipped.tolist()]

    figure, ((left, middle, right),) = pictures.figure(11, 3.6, columns=3)
    left.bar(range(16), scored.tolist(), color=colours)
    left.axhline(float(threshold), color=LINE, linewidth=1.5, label="threshold")
    left.legend(loc="upper right", frameon=False, fontsize=9)
    left.set(title="1. Score: |x| · norm of the column", xlabel="input", xticks=[], ylabel="score")

    shade = (weight.abs() / weight.abs().max()).tolist()
    for output, row in enumerate(shade):
        for column, value in enumerate(row):
            colour, alpha = (SKIPPED, 0.35) if skipped[column] else (KEPT, 0.15 + 0.85 * value)
            middle.add_patch(_square(column, 9 - output, colour, alpha))
    middle.set(title="2. Read the columns above it", xlabel="input", ylabel="output")
    middle.set(xlim=(-0.6, 15.6), ylim=(-0.6, 9.6), xticks=[], yticks=[])

    gated = weight @ torch.where(skipped, 0.0, x)
    places = torch.arange(10).flip(0)
    right.barh((places + 0.2).tolist(), (weight @ x).tolist(), height=0.38, color=SKIPPED, label="all inputs")
    right.barh((places - 0.2).tolist(), gated.tolist(), height=0.38, color=KEPT, label="kept inputs")
    right.set(title="3. Sum them: y stays close", xlabel="y", ylabel="output", yticks=[])
    right.legend(loc="best", frameon=False, fontsize=9)
    for axes in (left, middle, right):
        axes.title.set_fontsize(11)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    pictures.save(figure, path)
    return int(skipped.sum())


def _square(x: int, y: int, colour: str, alpha: float) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, color=colour, alpha=alpha, linewidth=0)


if __name__ == "__main__":
    draw(PICTURE)
