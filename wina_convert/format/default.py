"""What the card says of the default sparsity: one line, which `wina retarget` writes anew."""

import re

_LINE = re.compile(r"^By default .* of the weights of gated projections are skipped: .*$", re.MULTILINE)


def default_line(sparsity: float, dense: int, gated: int) -> str:
    """The line, from the bytes of weights that a token reads of the dense and of the gated model."""
    return (
        f"By default {sparsity:.1%} of the weights of gated projections are skipped: a token reads {gated / 1e6:.2f} MB instead "
        f"of {dense / 1e6:.2f} MB."
    )


def with_default(card: str, line: str) -> str:
    """A card with the line for another default; one without such a line stays as it is."""
    return _LINE.sub(lambda match: line, card, count=1)
