"""How the columns of a matrix are weighted in the score of its inputs: a scheme is one entry of a table.

The runtime knows no scheme: it multiplies |x_j| by the stored weight of column j, whatever that is. In every scheme a column
of zeros weighs 0: skipping its input changes no output, so that it is skipped first and at any sparsity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import ARCHITECTURES
from ..errors import CheckpointError
from ..format.names import split_layer

LOW_RANK_PART = 0.05
KEYS_AND_GATES = frozenset(kind for family in ARCHITECTURES.values() for kind in family.weighted)


@dataclass(frozen=True)
class Scheme:
    """A way to score.

    Attributes:
        name: as config.json stores it.
        column_weights: from a projection's full name and its transposed weight [in, out], contiguous, to the weight of every
            column [in], float32. In another basis, of the turned weight. For "learned", what learning began with.
        low_rank: the part of a matrix's weights that its low-rank term has about, which stands in for what is skipped; 0: none.
        recomputed: whether they follow from the stored weight alone, so that `wina verify` can hold them against it.
    """

    name: str
    column_weights: Callable[[str, Tensor], Tensor]
    recomputed: bool
    low_rank: float = 0.0


def column_norms(weight_t: Tensor) -> Tensor:
    """L2 norm of every column of W, from its contiguous transpose.

    Args:
        weight_t: [in, out], any floating dtype, contiguous. Another memory order would sum in another order.

    Returns:
        [in], float32, accumulated in float32.
    """
    norms: Tensor = torch.linalg.vector_norm(weight_t, dim=1, dtype=torch.float32)
    return norms


def every_norm(name: str, weight_t: Tensor) -> Tensor:
    """L2 norms, whatever the projection (WINA, arXiv 2505.19427, equation 4); arguments as in `Scheme.column_weights`."""
    return column_norms(weight_t)


def norms_of_keys_and_gates(name: str, weight_t: Tensor) -> Tensor:
    """L2 norms where the keys or the gate come from and 1 elsewhere: what the code of WINA's authors does.

    Which projections these are is data of the families (`Architecture.weighted`). Arguments as in `Scheme.column_weights`.
    """
    place = split_layer(name)
    return column_norms(weight_t) if place and place[2] in KEYS_AND_GATES else ones(name, weight_t)


def ones(name: str, weight_t: Tensor) -> Tensor:
    """1 for every column that is not all zeros: the magnitude alone decides (TEAL, arXiv 2408.14690).

    Arguments as in `Scheme.column_weights`.
    """
    largest: Tensor = torch.linalg.vector_norm(weight_t, math.inf, dim=1)  # comparing all weights would take memory
    return (largest > 0).float()


def sums_of_magnitudes(name: str, weight_t: Tensor) -> Tensor:
    """L1 norms, accumulated in float32 (WAS, Wang et al., EMNLP 2025); arguments as in `Scheme.column_weights`."""
    sums: Tensor = torch.linalg.vector_norm(weight_t, 1, dim=1, dtype=torch.float32)
    return sums


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("wina", every_norm, recomputed=True),
        Scheme("wina-paper", norms_of_keys_and_gates, recomputed=True),
        Scheme("teal", ones, recomputed=True),
        Scheme("was", sums_of_magnitudes, recomputed=True),
        # ||S V_j|| of R-Sparse (arXiv 2504.19449, equation 5) is the norm of column j: what is its own is the low-rank term
        Scheme("r-sparse", every_norm, recomputed=True, low_rank=LOW_RANK_PART),
    )
}


LEARNED = Scheme("learned", every_norm, recomputed=False)  # no option: only learning makes them


def scheme_of(name: str) -> Scheme:
    """The scheme of a checkpoint.

    Raises:
        CheckpointError: this version does not know it.
    """
    if name == LEARNED.name:
        return LEARNED
    if name not in SCHEMES:
        raise CheckpointError(
            f"scheme in config.json is {name!r}, which this version does not know; run `pip install --upgrade wina-convert`"
        )
    return SCHEMES[name]
