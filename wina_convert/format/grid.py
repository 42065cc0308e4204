"""The sparsities that a checkpoint knows. Imports nothing, so that the command line's help shows at once."""

from ..errors import OptionError

MAX_SPARSITY = 0.95
GRID = tuple(round(0.05 * k, 2) for k in range(20))  # 0, 0.05, ..., 0.95


def check_sparsity(sparsity: float) -> float:
    """The sparsity as a float.

    Raises:
        OptionError: it is not a number within [0, 0.95].
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= MAX_SPARSITY:
        raise OptionError(f"sparsity is {sparsity!r}; give a fraction between 0 and {MAX_SPARSITY}, for example 0.5")
    return float(sparsity)
