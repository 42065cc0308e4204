"""What the card says of the default sparsity, which `wina retarget` writes anew: a line, and how to reproduce it."""

import re

_LINE = re.compile(r"^By default .* of the weights of gated projections are skipped: .*$", re.MULTILINE)
_COMMAND = re.compile(r"^(`wina-convert [^`\n]*`)(?:, then `wina retarget [^`\n]*`)? with wina-convert", re.MULTILINE)


def default_line(sparsity: float, dense: int, gated: int) -> str:
    """The line, from the bytes of weights that a token reads of the dense and of the gated model."""
    return (
        f"By default {sparsity:.1%} of the weights of gated projections are skipped: a token reads {gated / 1e6:.2f} MB instead "
        f"of {dense / 1e6:.2f} MB."
    )


def with_default(card: str, line: str, sparsity: float, converted: float) -> str:
    """A card with the line for another default, and the command that makes it; what a card lacks is not added.

    Args:
        card: the text.
        line: as `default_line` makes it.
        sparsity: the new default.
        converted: the default that the conversion gave.
    """
    then = "" if sparsity == converted else f", then `wina retarget DIR --sparsity {sparsity}`"
    card = _COMMAND.sub(lambda match: f"{match[1]}{then} with wina-convert", card, count=1)
    return _LINE.sub(lambda match: line, card, count=1)
