"""Write pictures with matplotlib, if it is installed (the optional extra ``plot``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppsd.errors import PpsdError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> Any:
    """Return matplotlib.pyplot, drawing to files only; PpsdError says how to get it."""
    if not can_plot():
        raise PpsdError("plots need matplotlib: pip install 'ppsd-llm[plot]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it; raises PpsdError."""
    figure.tight_layout()
    try:  # without a date and version in it, equal runs give equal files
        figure.savefig(path, dpi=110, metadata={"Software": None})
    except OSError as error:
        raise PpsdError(f"cannot write {path}: {error.strerror}") from error
    require_matplotlib().close(figure)
