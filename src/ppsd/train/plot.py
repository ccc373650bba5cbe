"""A run's curves as a picture: loss of every head and its agreement with the model.

Imported by cli/; matplotlib is imported only here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppsd.errors import PpsdError

FILE = "curves.png"


def can_plot() -> bool:
    """Whether matplotlib is installed (extra ``train``)."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(metrics: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and agreement against training tokens; raises PpsdError when disks are full."""
    from matplotlib.figure import Figure

    records = list(metrics)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer, points in _series(records, "loss").items():
        left.plot(*zip(*points, strict=True), label=f"exit {layer}", linewidth=0.8)
    for layer, points in _series(records, "validation").items():
        tokens = [t for t, _ in points]
        (line,) = right.plot(tokens, [v["alpha"] for _, v in points], label=f"exit {layer}")
        top4 = [v["top4"] for _, v in points]
        right.plot(tokens, top4, "--", color=line.get_color(), label=f"exit {layer}, top 4")
    left.set(xlabel="training tokens", ylabel="loss", yscale="log")
    right.set(xlabel="training tokens", ylabel="agreement on held-out text", ylim=(0, 1))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PpsdError(f"cannot write {path}: {error.strerror}") from error


def _series(records: Iterable[Mapping[str, Any]], kind: str) -> dict[str, list[tuple[int, Any]]]:
    """Values of one kind of record by exit layer, each with its training tokens."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in records:
        for layer, value in record.get(kind, {}).items():
            found.setdefault(str(layer), []).append((record["tokens"], value))
    return found
