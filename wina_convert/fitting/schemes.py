"""How the columns of a matrix are weighted in the score of its inputs: a scheme is one entry of a table.

The runtime knows no scheme: it multiplies |x_j| by the stored weight of column j, whatever that is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True)
class Scheme:
    """A way to score.

    Attributes:
        name: as config.json stores it.
        column_weights: from a projection's transposed weight [in, out] to the weight of every column [in], float32.
        recomputed: whether they follow from the stored weight alone, so that `wina verify` can hold them against it.
    """

    name: str
    column_weights: Callable[[Tensor], Tensor]
    recomputed: bool


def column_norms(weight_t: Tensor) -> Tensor:
    """L2 norm of every column of W, from its contiguous transpose.

    Args:
        weight_t: [in, out], any floating dtype, contiguous. Another memory order would sum in another order.

    Returns:
        [in], float32, accumulated in float32.
    """
    norms: Tensor = torch.linalg.vector_norm(weight_t, dim=1, dtype=torch.float32)
    return norms


SCHEMES = {
    scheme.name: scheme
    for scheme in (Scheme("wina", column_norms, recomputed=True),)  # arXiv 2505.19427
}


def scheme_of(name: str) -> Scheme:
    """The scheme of a checkpoint.

    Raises:
        CheckpointError: this version does not know it.
    """
    if name not in SCHEMES:
        raise CheckpointError(
            f"scheme in config.json is {name!r}, which this version does not know; run `pip install --upgrade wina-convert`"
        )
    return SCHEMES[name]
