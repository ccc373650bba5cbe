"""Plots of sweeps and Gantt charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppsd.lab.simulator import Simulated
from ppsd.lab.sweep import Row
from ppsd.plots import require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS_COLUMN = {"alpha": "alpha", "exit": "exit_layer", "hop": "hop_ms", "stages": "stages"}
AXIS_LABEL = {
    "alpha": "acceptance rate α",
    "exit": "exit layer E",
    "hop": "hop latency (ms)",
    "stages": "stages P",
}
MODE_COLOUR = {"autoregressive": "0.5", "draft-then-verify": "tab:orange", "ppsd": "tab:blue"}
KIND_COLOUR = {
    "prefill": "0.7",
    "forward": "tab:blue",
    "draft": "tab:green",
    "verify": "tab:cyan",
    "cancelled": "tab:red",
}


def plot_sweep(rows: Sequence[Row], axis: str, title: str, path: Path) -> None:
    """Draw speedup over plain decoding against ``axis``: simulated, and what theory says."""
    figure, axes = _figure(AXIS_LABEL[axis], "speedup over plain pipeline decoding", title)
    column = AXIS_COLUMN[axis]
    for mode, colour in MODE_COLOUR.items():
        lane = [row for row in rows if row["mode"] == mode]
        x = [row[column] for row in lane]
        axes.plot(x, [row["speedup"] for row in lane], "o", color=colour, ms=4, label=mode)
        axes.plot(x, [row["model_speedup"] for row in lane], color=colour, lw=1)
    paper = [row for row in rows if row["paper_speedup"] is not None]
    rho = [row["paper_speedup"] for row in paper]
    axes.plot([row[column] for row in paper], rho, ":", color="k", label="ρ* (paper, Eq. 7)")
    if axis == "hop":
        axes.set_xscale("symlog", linthresh=0.01)
    axes.legend(title="points: simulated, lines: model", fontsize=8, title_fontsize=8)
    save(figure, path)


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    title: str,
    path: Path,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw named lines of (x, y), with horizontal ``marks``."""
    figure, axes = _figure(*labels, title)
    for name, (x, y) in lines.items():
        axes.plot(x, y, label=name)
    for name, level in (marks or {}).items():
        axes.axhline(level, color="0.4", lw=0.8, ls="--")
        axes.text(0.01, level, f" {name}", fontsize=8, va="bottom")
    axes.legend(fontsize=8)
    save(figure, path)


def plot_gantt(runs: Mapping[str, Simulated], path: Path) -> None:
    """Draw one chart a mode on one time axis: a lane a stage, a bar a piece of work."""
    plt = require_matplotlib()
    figure, charts = plt.subplots(
        len(runs), sharex=True, figsize=(11, 2.2 * len(runs)), squeeze=False
    )
    for axes, (mode, run) in zip(charts[:, 0], runs.items(), strict=True):
        for stage, lane in enumerate(run.slices):
            for start, end, kind, *_ in lane:
                bar = axes.barh(stage, (end - start) / 1e6, left=start / 1e6, height=0.8)
                bar.patches[0].set(color=KIND_COLOUR[kind], ec="w", lw=0.3)
        axes.set_yticks(range(len(run.slices)), [f"stage {k}" for k in range(len(run.slices))])
        axes.invert_yaxis()
        axes.set_title(f"{mode}: {run.tokens} tokens in {run.seconds * 1e3:.1f} ms", fontsize=9)
    charts[-1, 0].set_xlabel("simulated time (ms)")
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KIND_COLOUR.values()]
    figure.legend(bars, KIND_COLOUR, ncols=len(bars), fontsize=8, loc="lower right")
    save(figure, path)


def _figure(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
    figure, axes = require_matplotlib().subplots(figsize=(6.4, 4.2))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.axhline(1, color="0.4", lw=0.8)
    return figure, axes
