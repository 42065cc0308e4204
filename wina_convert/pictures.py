"""What every picture needs: matplotlib, an optional extra, without any of its windows."""

from pathlib import Path
from typing import Any

from .errors import OptionError


def check_available() -> None:
    """Refuse early where matplotlib is missing.

    Raises:
        OptionError: it is.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("--plot needs matplotlib; pip install 'wina-convert[plot]'") from error


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of this size in inches and its axes, [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes."""
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
