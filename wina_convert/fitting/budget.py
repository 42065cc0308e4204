"""How the sparsity asked of a whole model is divided among its projections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import CheckpointError
from ..format.config import WinaConfig
from ..format.grid import GRID


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


UNIFORM = Budget()


def budget_of(config: WinaConfig) -> Budget:
    """The budget of a checkpoint.

    Raises:
        CheckpointError: this version does not know how the checkpoint's was divided.
    """
    if config.allocation != UNIFORM.allocation:
        raise CheckpointError(
            f"allocation in config.json is {config.allocation!r}, which this version does not know; "
            "run `pip install --upgrade wina-convert`"
        )
    return UNIFORM
