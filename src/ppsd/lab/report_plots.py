"""The plots of a report. Needs matplotlib (the optional extra ``plot``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppsd.errors import PpsdError
from ppsd.lab.plot import KIND_COLOUR
from ppsd.plots import require_matplotlib, save

Record = Mapping[str, Any]
ALL, PLAIN, PPSD, DRAFTING = "all", "plain", "ppsd", "draft-then-verify γ="
SHOWN_MS = 400.0  # of a timeline: more is unreadable


def efficiency(records: Sequence[Record], path: Path) -> None:
    """Draw measured speedup against α beside ρ* and the bound, a panel a record."""
    figure, panels = require_matplotlib().subplots(
        1, len(records), figsize=(4.6 * len(records), 4), squeeze=False
    )
    for axes, record in zip(panels[0], records, strict=True):
        rows = sorted(record["rows"], key=lambda row: row["alpha"]["median"])
        alpha = [row["alpha"]["median"] for row in rows]
        middle = [row["speedup"]["median"] for row in rows]
        reach = [
            [row["speedup"]["median"] - row["speedup"]["low"] for row in rows],
            [row["speedup"]["high"] - row["speedup"]["median"] for row in rows],
        ]
        axes.plot(alpha, [row["paper"]["median"] for row in rows], ":k", label="ρ*")
        axes.plot(alpha, [row["model"]["median"] for row in rows], label="bound, measured times")
        axes.errorbar(alpha, middle, reach, fmt="o", capsize=3, label="measured, quartiles")
        paced = " (paced)" if record["pace"] else ""
        axes.set(xlabel="acceptance rate α (oracle)")
        axes.set_title(f"{stages_and_window(record)}{paced}\n{record['name']}", fontsize=10)
        _finish(axes)
    panels[0][0].set_ylabel("speedup over plain decoding")
    save(figure, path)


def stages_and_window(record: Record) -> str:
    """Return how many stages, and the window where it is not as large."""
    window = record["settings"]["config"]["in_flight"]
    return f"{record['stages']} stages" + (f", {window} blocks in flight" if window else "")


def by_task(record: Record, path: Path) -> None:
    """Draw bars of each group's speedup: PPSD, and the best draft length of draft-then-verify."""
    groups = list(dict.fromkeys(row["group"] for row in record["rows"]))
    figure, axes = require_matplotlib().subplots(figsize=(max(6.4, 0.7 * len(groups)), 4.2))
    best = {group: _best_drafting(record, group) for group in groups}
    names = {v: [_ratio(record, group, v) for group in groups] for v in ours(record)}
    if any(best.values()):
        names["draft-then-verify, best γ"] = [best[group] or 0.0 for group in groups]
    width = 0.8 / len(names)
    for i, (name, values) in enumerate(names.items()):
        axes.bar([x + i * width for x in range(len(groups))], values, width, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="speedup over plain decoding")
    _finish(axes)
    save(figure, path)


def draft_lengths(record: Record, path: Path) -> bool:
    """Draw speedup against draft length on all tasks; False without draft-then-verify."""
    rows = [row for row in record["rows"] if row["group"] == ALL]
    drafting = [row for row in rows if row["variant"].startswith(DRAFTING)]
    if not drafting:
        return False
    figure, axes = require_matplotlib().subplots(figsize=(6.4, 4.2))
    lengths = [int(row["variant"].removeprefix(DRAFTING)) for row in drafting]
    axes.plot(lengths, [row["ratio"] for row in drafting], "o-", label="draft-then-verify")
    for i, variant in enumerate(ours(record), 1):
        axes.axhline(_ratio(record, ALL, variant), color=f"C{i}", label=variant)
    axes.set(xlabel="draft length γ", ylabel="speedup over plain decoding")
    _finish(axes)
    save(figure, path)
    return True


def reliability(tenths: Sequence[Sequence[int]], path: Path) -> None:
    """Draw how often drafts of so much stated probability are right; areas tell how many are."""
    figure, axes = require_matplotlib().subplots(figsize=(4.6, 4.2))
    found = [(i, judged, right) for i, (judged, right) in enumerate(tenths) if judged]
    middles = [(i + 0.5) / len(tenths) for i, _, _ in found]
    largest = max(judged for _, judged, _ in found)
    areas = [200 * judged / largest for _, judged, _ in found]
    axes.plot([0, 1], [0, 1], ":k", label="as stated")
    axes.scatter(middles, [right / judged for _, judged, right in found], areas, label="drafts")
    axes.set(xlabel="probability stated", ylabel="share right", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def exit_depth(records: Sequence[Record], path: Path) -> None:
    """Draw speedup and α of PPSD on all tasks against the exit layer, by kind of head."""
    figure, (left, right) = require_matplotlib().subplots(1, 2, figsize=(9, 4))
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(head_name(record).rsplit("-", 1)[0], []).append(record)
    for kind, found in kinds.items():
        rows = [
            row
            for record in found
            for row in record["rows"]
            if (row["group"], row["variant"]) == (ALL, ours(record)[0])
        ]
        layers = [record["bounds"][1] for record in found]
        left.plot(layers, [row["ratio"] for row in rows], "o-", label=kind)
        right.plot(layers, [row["alpha"] for row in rows], "o-", label=kind)
    left.set(xlabel="exit layer E", ylabel="speedup over plain decoding")
    right.set(xlabel="exit layer E", ylabel="acceptance rate α", ylim=(0, 1))
    for axes in (left, right):
        _finish(axes)
    save(figure, path)


def ours(record: Record) -> list[str]:
    """Return the variants of a run that are PPSD: with chains alone, or of each number of rows."""
    names = dict.fromkeys(row["variant"] for row in record["rows"])
    return [name for name in names if name == PPSD or name.startswith(f"{PPSD} rows=")]


def head_name(record: Record) -> str:
    """Return the head of a run, as it was named."""
    return str(record["settings"]["config"].get("head")).rsplit("/", 1)[-1]


def heads(record: Record, path: Path) -> None:
    """Draw α against exit layer, against the head's cost, and against training, by kind of head."""
    figure, (left, middle, right) = require_matplotlib().subplots(
        1, 3, figsize=(13, 4), sharey=True
    )
    kinds: dict[str, list[Record]] = {}
    for head in record["heads"].values():
        layers = f" {head['layers']}" if head["layers"] else ""
        lookup = " with lookup" if head["lookup"] else ""
        kinds.setdefault(f"{head['kind']}{layers}{lookup}", []).append(head)
    for name, found in kinds.items():
        alphas = [head["alpha"] for head in found]
        left.plot([head["exit_layer"] for head in found], alphas, "o", label=name)
        middle.plot([head["expected"]["head_layers"] for head in found], alphas, "o")
        trained = [(h["trained_tokens"] / 1e6, h["alpha"]) for h in found if h["trained_tokens"]]
        [dots] = right.plot([t for t, _ in trained], [alpha for _, alpha in trained], "o")
        for exit_layer, tokens, rates in _trained(found):
            right.plot(tokens, rates, color=dots.get_color(), label=f"{name}, exit {exit_layer}")
    left.set(xlabel="exit layer E", ylabel="acceptance rate α", ylim=(0, 1))
    middle.set(xlabel="cost of a draft (layer-times)")
    right.set(xlabel="million tokens trained on")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    save(figure, path)


def _trained(heads: Sequence[Record]) -> Iterator[tuple[int, list[float], list[float]]]:
    """Return exit layer, millions of training tokens and α of kinds with several heads."""
    for exit_layer in sorted({head["exit_layer"] for head in heads}):
        pairs = sorted(
            (head["trained_tokens"] / 1e6, head["alpha"])
            for head in heads
            if head["exit_layer"] == exit_layer and head["trained_tokens"]
        )
        if len(pairs) > 1:
            yield exit_layer, [tokens for tokens, _ in pairs], [alpha for _, alpha in pairs]


def timelines(traces: Sequence[Path], path: Path) -> None:
    """Draw what each stage does from the first token on: a chart a Chrome trace."""
    plt = require_matplotlib()
    figure, charts = plt.subplots(
        len(traces), sharex=True, figsize=(11, 2.2 * len(traces)), squeeze=False
    )
    for axes, trace in zip(charts[:, 0], traces, strict=True):
        slices = [piece for piece in _slices(trace) if piece["name"] in KIND_COLOUR]
        begin = min((s["ts"] + s["dur"] for s in slices if s["name"] == "verify"), default=0.0)
        for piece in slices:
            start = (piece["ts"] - begin) / 1e3
            if 0 <= start < SHOWN_MS:
                axes.barh(
                    piece["tid"] - 1, piece["dur"] / 1e3, left=start, height=0.8,
                    color=KIND_COLOUR[piece["name"]], ec="w", lw=0.3,
                )  # fmt: skip
        axes.set_yticks(sorted({piece["tid"] - 1 for piece in slices}))
        axes.invert_yaxis()
        axes.set(title=trace.stem, ylabel="stage", xlim=(0, SHOWN_MS))
    charts[-1, 0].set_xlabel("time (ms)")
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KIND_COLOUR.values()]
    figure.legend(bars, KIND_COLOUR, ncols=len(bars), fontsize=8, loc="lower right")
    save(figure, path)


def _slices(trace: Path) -> Iterator[dict[str, Any]]:
    try:
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        yield from (event for event in events if event["ph"] == "X")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PpsdError(f"{trace} is not a trace of ppsd generate --trace ({error!r})") from error


def _ratio(record: Record, group: str, variant: str) -> float:
    wanted = (group, variant)
    found = [r["ratio"] for r in record["rows"] if (r["group"], r["variant"]) == wanted]
    return float(found[0]) if found else 0.0


def _best_drafting(record: Record, group: str) -> float | None:
    ratios = [
        row["ratio"]
        for row in record["rows"]
        if row["group"] == group and row["variant"].startswith(DRAFTING)
    ]
    return max(ratios, default=None)


def _finish(axes: Any) -> None:
    axes.axhline(1, color="0.4", lw=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
