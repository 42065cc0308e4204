"""How the sparsity asked of a whole model is divided among its projections: an allocation is one entry of a table.

The runtime knows no allocation: thresholds contain it. What reads a checkpoint takes the stored numbers, whatever the name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..format.config import WinaConfig
from ..format.grid import GRID
from ..format.names import split_layer

FAR = 50.0  # a logit whose sigmoid is 0 or 1 for every purpose


@dataclass(frozen=True)
class Budget:
    """The sparsity asked of each projection at a level of sparsity.

    Attributes:
        allocation: its name, as config.json stores it.
        shares: by projection, the sparsity asked of it at each level of the grid, ascending from 0. A projection that is not
            named is asked for the level itself.
        grid: the levels.
    """

    allocation: str = "uniform"
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    grid: Sequence[float] = GRID

    def asked(self, projection: str, level: float) -> float:
        """The sparsity asked of a projection when the model's is `level`, linear between the levels of the grid."""
        share = self.shares.get(projection)
        return level if share is None else float(np.interp(level, self.grid, share))

    def overall(self, weights: Mapping[str, int], level: float) -> float:
        """What is asked of projections together, each counted by its weights: the level, or the budget is none."""
        return sum(self.asked(name, level) * count for name, count in weights.items()) / sum(weights.values())

    def stored(self) -> dict[str, list[float]]:
        """The shares as config.json stores them: by the name within a decoder layer where all layers agree, else in full."""
        kinds = {kind_of(name): share for name, share in self.shares.items()}
        alike = all(share == kinds[kind_of(name)] for name, share in self.shares.items())
        return {name: list(share) for name, share in (kinds if alike else self.shares).items()}


UNIFORM = Budget()


def kind_of(projection: str) -> str:
    """The name of a projection within its decoder layer, such as "mlp.up_proj"."""
    place = split_layer(projection)
    return place[2] if place else projection


def uniform(weights: Mapping[str, int], prior: Mapping[str, float]) -> Budget:
    """Every projection skips the same fraction of its inputs; arguments as for `by_type`."""
    return UNIFORM


def by_type(weights: Mapping[str, int], prior: Mapping[str, float]) -> Budget:
    """Projections of a type skip alike, types unlike: as the prior says, moved alike in the logit to meet every level.

    At a level s, the share of type k is sigmoid(logit(prior_k) + d(s)), and d(s) makes the mean of the shares, each projection
    counted by its weights, s. So the shares rise with s, stay between 0 and 1 and keep their order.

    Args:
        weights: of each gated projection, by its full name; what stays dense is in no mean.
        prior: by the name within a decoder layer, the share at 50%, within (0, 1).
    """
    shares = np.array([prior[kind_of(name)] for name in weights])
    logits = np.log(shares / (1 - shares))
    parts = np.array(list(weights.values()), dtype=np.float64) / sum(weights.values())
    columns = [np.zeros_like(logits), *(_moved(logits, parts, level) for level in GRID[1:])]
    table = np.stack(columns, axis=1)
    return Budget("types", {name: tuple(row.tolist()) for name, row in zip(weights, table, strict=True)})


def measured(weights: Mapping[str, int], prior: Mapping[str, float]) -> Budget:
    """What each projection, skipping alone, loses on the calibration text divides it, and the prior (see `fitting.measured`).

    Until then the prior alone does, which reads as many bytes. Arguments as for `by_type`.
    """
    return replace(by_type(weights, prior), allocation="measured")


def greedy(weights: Mapping[str, int], prior: Mapping[str, float]) -> Budget:
    """Every decoder layer skips the same; within one, TEAL's search divides it on the calibration text (see `fitting.greedy`).

    Until then it asks all alike. Arguments as for `by_type`.
    """
    return Budget("greedy")


def _moved(logits: NDArray[np.float64], parts: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Shares whose mean, counted by parts that add up to 1, is the level: bisection down to neighbouring numbers."""
    low, high = -FAR, FAR
    while low < (middle := (low + high) / 2) < high:
        if float(parts @ _sigmoid(logits + middle)) < level:
            low = middle
        else:
            high = middle
    return _sigmoid(logits + high)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    return found


# name, as config.json stores it -> from the weights of the gated projections and the family's prior to the budget
ALLOCATIONS: dict[str, Callable[[Mapping[str, int], Mapping[str, float]], Budget]] = {
    "uniform": uniform,
    "types": by_type,
    "measured": measured,
    "greedy": greedy,
}
SEARCHED = ("measured", "greedy")  # those whose shares are found on the model


def budget_of(config: WinaConfig) -> Budget:
    """The budget of a checkpoint.

    Raises:
        CheckpointError: config.json does not tell it: it names an allocation without its shares, or shares for other kinds of
            projections than it gates.
    """
    if not config.shares and config.allocation != UNIFORM.allocation:
        raise CheckpointError(
            f"allocation in config.json is {config.allocation!r}, which this version does not know without shares; "
            "run `pip install --upgrade wina-convert`"
        )
    if not config.shares:
        return UNIFORM
    if config.allocation == UNIFORM.allocation:
        raise CheckpointError(f"allocation in config.json is {config.allocation!r}, which has no shares; convert again")
    if set(config.shares) == set(config.modules):
        return Budget(config.allocation, dict(config.shares), config.grid)
    unlike = {kind_of(name) for name in config.modules} ^ set(config.shares)
    if unlike:
        raise CheckpointError(
            f"modules and shares in config.json do not fit together: only one of them has {min(unlike)!r}; convert again"
        )
    return Budget(config.allocation, {name: config.shares[kind_of(name)] for name in config.modules}, config.grid)
