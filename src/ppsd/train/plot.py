"""Plot a run: the loss of every head and its agreement with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ppsd.errors import PpsdError

FILE = "curves.png"
POINTS = 100  # of a loss curve: single steps hide it


def plot_run(metrics: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and agreement against training tokens; raises PpsdError when disks are full."""
    from matplotlib.figure import Figure

    records = list(metrics)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer, points in _series(records, "loss").items():
        left.plot(*zip(*_means(points), strict=True), label=f"exit {layer}")
    for layer, points in _series(records, "validation").items():
        tokens = [t for t, _ in points]
        (line,) = right.plot(tokens, [v["alpha"] for _, v in points], label=f"exit {layer}")
        top4 = [v["top4"] for _, v in points]
        right.plot(tokens, top4, "--", color=line.get_color(), label=f"exit {layer}, top 4")
    left.set(xlabel="training tokens", ylabel="loss", yscale="log")
    right.set(xlabel="training tokens", ylabel="agreement on held-out text", ylim=(0, 1))
    right.legend(fontsize="small", ncols=2, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PpsdError(f"cannot write {path}: {error.strerror}") from error


def _means(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most POINTS points, each the mean of the steps since the one before."""
    size = -(-len(points) // POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]


def _series(records: Iterable[Mapping[str, Any]], kind: str) -> dict[str, list[tuple[int, Any]]]:
    """Return values of one kind of record by exit layer, each with its training tokens."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in records:
        for layer, value in record.get(kind, {}).items():
            found.setdefault(str(layer), []).append((record["tokens"], value))
    return found
