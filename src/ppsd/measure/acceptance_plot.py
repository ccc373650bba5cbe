"""Acceptance as pictures: by head, by category, by position, and the first head that is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppsd.plots import require_matplotlib, save

BAR_ROOM = 0.8  # of the space between two ticks


def plot_acceptance(heads: Mapping[str, Any], first: Mapping[str, Any], path: Path) -> None:
    """Draw the figures of ``summarize`` by label, and those of ``first_right``."""
    figure, ((overall, position), (category, shares)) = require_matplotlib().subplots(
        2, 2, figsize=(11, 7.5)
    )
    _bars(overall, {label: {f"top {k}": v for k, v in h["top"].items()} for label, h in
                    heads.items()}, "share of positions")  # fmt: skip
    _position(position, heads)
    alphas = {
        label: {name: found["alpha"] for name, found in h["by_category"].items()}
        for label, h in heads.items()
    }
    _bars(category, alphas, "acceptance rate α")
    category.tick_params(axis="x", labelrotation=60)
    _bars(shares, {"first right": first["shares"]}, "share of positions")
    shares.set_title("first head that is right, by exit layer", fontsize=9)
    save(figure, path)


def _bars(axes: Any, groups: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Draw a group of bars for each name, one bar in it for each key of ``groups``."""
    width = BAR_ROOM / len(groups)
    for i, (key, values) in enumerate(groups.items()):
        places = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(values))]
        axes.bar(places, list(values.values()), width, label=key)
        axes.set_xticks(range(len(values)), list(values), fontsize=7)
    axes.set(ylabel=label, ylim=(0, 1))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7)


def _position(axes: Any, heads: Mapping[str, Any]) -> None:
    for label, found in heads.items():
        buckets = found["by_position"]
        middle = [(b["first"] + b["last"]) / 2 for b in buckets]
        axes.plot(middle, [b["alpha"] for b in buckets], marker=".", label=label)
    axes.set(xlabel="position after the prompt", ylabel="acceptance rate α", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
