"""Write the tables of docs/results.md that are made from result files, and a plot.

``tools/results.py`` rewrites what stands between ``<!-- table NAME -->`` and ``<!-- end -->``;
with ``--check`` it changes nothing and fails if a table is not what the files say.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppsd.lab import report_plots
from ppsd.lab.closed_forms import paper_alpha
from ppsd.lab.report import table

DOCS = Path(__file__).parents[1] / "docs"
PAGE, TASKS = DOCS / "results.md", DOCS / "results" / "tasks"
CLAIMS = (2.01, 3.81)  # the range of speedups in the paper's abstract
FEWEST = 4  # prompts of a task that is shown
LINEAR, WAVES = "ppsd rows=1", "ppsd rows=16"
SETUPS = {
    "4, linear": ("tasks-4-stages", "ppsd"),
    "4, waves": ("tasks-4-stages-virtual", WAVES),
    "8, linear": ("tasks-8-stages-virtual", LINEAR),
    "8, waves": ("tasks-8-stages-virtual", WAVES),
}
RUNS = {
    "4, exit 8": ("tasks-4-stages-virtual", "all"),
    "8, exits 4, 8 and 18": ("tasks-8-stages-virtual", "all"),
    "4, exit 8, temperature 1": ("tasks-4-stages-sampled", "all T=1"),
}
SECOND = {
    "4 emulated": "tasks-1.5b-4-stages-virtual",
    "2 emulated": "tasks-1.5b-2-stages-virtual",
    "2 real cores": "tasks-1.5b-2-stages",
}
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def rows_of(name: str) -> dict[tuple[str, str], Row]:
    """Return the rows of a result of ``ppsd-lab tasks`` by group and variant."""
    record = json.loads((TASKS / f"{name}.json").read_text(encoding="utf-8"))
    return {(row["group"], row["variant"]): row for row in record["rows"]}


def reached() -> str:
    """Return which tasks reach the paper's claims, by stages and schedule."""
    found = {setup: (rows_of(name), variant) for setup, (name, variant) in SETUPS.items()}
    groups = [g for g, v in rows_of("tasks-8-stages-virtual") if v == WAVES]
    lines = []
    for group in groups:
        rows = [rows.get((group, variant)) for rows, variant in found.values()]
        if all(row is not None and row["tasks"] >= FEWEST for row in rows):
            lines.append([group, *(_cell(row) for row in rows if row is not None)])
    return table(["tasks", *SETUPS], lines)


def _cell(row: Row) -> str:
    """Return speedup and α, in bold for the lower claim and in italics, too, for the upper one."""
    marks = "*" * (2 * (row["ratio"] >= CLAIMS[0]) + (row["ratio"] >= CLAIMS[1]))
    return f"{marks}{row['ratio']:.2f}×{marks} ({row['alpha']:.2f})"


def needed() -> str:
    """Return the α that the claims need by the closed form, on equal stages without any loss."""
    lines = []
    for claim in CLAIMS:
        alphas = [float(paper_alpha(claim, stages, 1)) for stages in (4, 8)]
        lines.append([f"{claim:.2f}×", *(f"{alpha:.3f}" for alpha in alphas)])
    return table(["speedup", "α on 4 stages", "α on 8 stages"], lines)


def waves() -> str:
    """Return what trees make on virtual clocks, greedy and sampled."""
    lines = []
    for told, (name, group) in RUNS.items():
        rows = rows_of(name)
        for rows_told, variant in (("1 (a chain)", LINEAR), ("16", WAVES)):
            row = rows[group, variant]
            paired, mean = row["paired"], f"{row['ratio']:.2f}×"
            cells = [told, str(row["tasks"]), rows_told, f"{row['alpha']:.0%}"]
            cells.append(f"**{mean}**" if variant == WAVES else mean)
            cells.append(f"{paired['median']:.2f} ({paired['low']:.2f}–{paired['high']:.2f})")
            lines.append([*cells, f"{row['total_ratio']:.2f}×"])
    heads = ["stages, heads", "prompts", "rows", "hits", "over plain, mean of speeds"]
    return table([*heads, "median, quartiles", "all tokens over all time"], lines)


def rivals() -> str:
    """Return our ways to decode beside the rivals', overall."""
    rows = [row for (g, _), row in rows_of("tasks-4-stages-rivals").items() if g == "all"]
    heads = ["variant", "over plain", "quartiles", "all over all", "drafts accepted", "differing"]
    return table(heads, [_rival(row) for row in rows])


def _rival(row: Row) -> list[str]:
    paired = row["paired"]
    return [
        row["variant"],
        f"{row['ratio']:.2f}×",
        f"{paired['low']:.2f}–{paired['high']:.2f}",
        f"{row['total_ratio']:.2f}×",
        "–" if row["alpha"] is None else f"{row['alpha']:.0%}",
        str(row["differing"]),
    ]


def second() -> str:
    """Return the ways to decode the second model, overall."""
    lines = []
    for stages, name in SECOND.items():
        found = [row for (group, _), row in rows_of(name).items() if group == "all"]
        lines += [
            [stages, str(row["tasks"]), *_rival(row)] for row in found if row["alpha"] is not None
        ]
    heads = ["stages", "prompts", "variant", "over plain", "quartiles", "all over all"]
    return table([*heads, "drafts accepted", "differing"], lines)


def best() -> str:
    """Return waves beside the best rival of each task."""
    rows = rows_of("tasks-4-stages-rivals")
    lines = []
    for group in dict.fromkeys(group for group, _ in rows):
        own = {v: row["ratio"] for (g, v), row in rows.items() if g == group}
        others = {v: ratio for v, ratio in own.items() if not v.startswith(("ppsd", "plain"))}
        name = max(others, key=lambda v: others[v])
        cells = [str(rows[group, WAVES]["tasks"]), f"{own[LINEAR]:.2f}×", f"{own[WAVES]:.2f}×"]
        gain = own[WAVES] / others[name]
        lines.append([group, *cells, f"{name}, {others[name]:.2f}×", f"{gain:.2f}"])
    heads = ["tasks", "prompts", "linear", "waves", "best rival", "waves over it"]
    return table(heads, lines)


def tenths() -> list[tuple[int, int]]:
    """Return how many drafts of waves were judged and right, by tenths of their probability."""
    found: list[tuple[int, int]] = rows_of("tasks-4-stages-virtual")["all", WAVES]["reliability"]
    return found


def reliability() -> str:
    """Return how often drafts are right, by the probability that heads and copies gave them."""
    lines = [
        [f"{i / 10:.1f}–{(i + 1) / 10:.1f}", f"{judged:,}", f"{right / judged:.2f}"]
        for i, (judged, right) in enumerate(tenths())
        if judged
    ]
    return table(["probability stated", "drafts judged", "share right"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "waves": waves,
    "reached": reached,
    "needed": needed,
    "rivals": rivals,
    "best": best,
    "second": second,
    "reliability": reliability,
}


def written(text: str) -> str:
    """Return the page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main() -> int:
    """Rewrite the page, or check it; return the exit code."""
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in sys.argv[1:]:
        if after != before:
            print(f"{PAGE}: tables are not what the files say; run tools/results.py")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    report_plots.reliability(tenths(), TASKS / "reliability.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
