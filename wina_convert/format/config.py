"""WinaConfig: exactly what `quantization_config` of a WINA checkpoint's config.json stores, and its checks."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self

from ..errors import CheckpointError, OptionError
from .grid import GRID, check_sparsity

FORMAT_VERSION = 2
READABLE = (1, 2)
NEW_IN_2 = ("basis", "shares", "biases", "low_rank")  # without these fields, version 2 is version 1
PREFILL = ("gated", "dense")


@dataclass
class WinaConfig:
    """Configuration of a WINA checkpoint, without transformers; `runtime.quantization` makes it one of its kind.

    Attributes:
        sparsity: fraction of the gated projections' inputs to skip, each projection counted by its weights, within [0, 0.95];
            None: the checkpoint's default.
        prefill: "gated" skips in every call; "dense" only where a call brings one token a sequence. None: the default.
        grid: ascending sparsities at which the checkpoint stores thresholds, the first 0.
        modules: full names of the gated projections, in the order of the model.
        scheme: how the score's column weights were made ("wina": L2 norms).
        allocation: how the sparsity is divided among projections ("uniform": all alike).
        shares: the fraction asked of each projection at the points of the grid, by its name within a decoder layer, or by its
            full name where layers differ; empty for "uniform".
        biases: whether each gated projection has a bias for each point of the grid.
        low_rank: of each gated projection, the part of its weights that its low-rank term has about; 0: there is none.
        basis: what change of basis is folded into the weights: its `kind`, and how it was found.
        calibration: what the thresholds were fitted on.
        source: what was converted.
        tool_version: version of the package that wrote the checkpoint.
        format_version: version of the stored format.

    Raises:
        OptionError: `sparsity` or `prefill` cannot be used.
        CheckpointError: the stored fields are of a newer format or do not fit together.
    """

    sparsity: float | None = None
    prefill: str | None = None
    grid: list[float] = field(default_factory=lambda: list(GRID))
    modules: list[str] = field(default_factory=list)
    scheme: str = "wina"
    allocation: str = "uniform"
    shares: dict[str, list[float]] = field(default_factory=dict)
    biases: bool = False
    low_rank: float = 0.0
    basis: dict[str, Any] = field(default_factory=lambda: {"kind": "none"})
    calibration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    tool_version: str = ""
    format_version: int = FORMAT_VERSION
    quant_method: str = "wina"

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            self.sparsity = check_sparsity(self.sparsity)
        if self.prefill is not None and self.prefill not in PREFILL:
            raise OptionError(f"prefill is {self.prefill!r}; give one of {', '.join(PREFILL)}")
        grid = self.grid
        ascending = (
            isinstance(grid, list)
            and 2 <= len(grid) <= 1000
            and all(isinstance(point, (int, float)) and 0 <= point <= 1 for point in grid)
            and grid[0] == 0
            and all(a < b for a, b in pairwise(grid))
        )
        if not ascending:
            raise CheckpointError("quantization_config.grid of config.json is not an ascending list that starts at 0")
        if not isinstance(self.modules, list) or not all(isinstance(name, str) for name in self.modules):
            raise CheckpointError("quantization_config.modules of config.json is not a list of names")
        for name, kind in (
            ("shares", dict),
            ("biases", bool),
            ("basis", dict),
            ("calibration", dict),
            ("source", dict),
            ("scheme", str),
            ("allocation", str),
            ("tool_version", str),
        ):
            if not isinstance(getattr(self, name), kind):
                raise CheckpointError(f"quantization_config.{name} of config.json is no {kind.__name__}")
        part = self.low_rank
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 <= part < 1:
            raise CheckpointError(f"quantization_config.low_rank of config.json is {part!r}, no number from 0 to 1")
        for projection, share in self.shares.items():
            if not _rises(share, len(grid)):
                raise CheckpointError(
                    f"quantization_config.shares of config.json has no {len(grid)} ascending fractions from 0 for {projection!r}"
                )
        if self.sparsity is not None and self.sparsity > grid[-1]:
            raise OptionError(f"sparsity is {self.sparsity}; this checkpoint has thresholds up to {grid[-1]}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Read the stored block.

        Raises:
            CheckpointError: its format version is unknown, or a field is.
        """
        version = config_dict.get("format_version")
        if version not in READABLE or isinstance(version, bool):
            raise CheckpointError(
                f"this checkpoint has WINA format version {version!r} and this wina-convert reads versions "
                f"{' and '.join(map(str, READABLE))}; run `pip install --upgrade wina-convert`"
            )
        known = set(cls.__dataclass_fields__) - (set(NEW_IN_2) if version == 1 else set())
        unknown = sorted(set(config_dict) - known)
        if unknown:
            raise CheckpointError(f"quantization_config of config.json has unknown fields: {', '.join(unknown)}")
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The block to store, in the format version that the checkpoint has."""
        stored = {
            name: value for name, value in asdict(self).items() if self.format_version > 1 or name not in NEW_IN_2
        }
        return {name: value for name, value in stored.items() if value or name not in ("biases", "low_rank")}


def _rises(share: Any, length: int) -> bool:
    """Whether it is a list of so many fractions from 0, none below the one before."""
    return (
        isinstance(share, list)
        and len(share) == length
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1 for value in share)
        and share[0] == 0
        and all(a <= b for a, b in pairwise(share))
    )
