"""Write the tables of README and docs that are made from result files, and a plot.

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
from ppsd.lab.runner import PLAIN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    *(DOCS / name for name in ("results.md", "acceptance.md", "exactness.md")),
)
RESULTS = DOCS / "results"
TASKS = RESULTS / "tasks"
CLAIMS = (2.01, 3.81)  # the range of speedups in the paper's abstract
ACCEPTANCE = ("acceptance", "acceptance-sampled", "acceptance-others")
FEWEST = 4  # prompts of a task that is shown
LINEAR, WAVES = "ppsd rows=1", "ppsd rows=16"
SETUPS = {
    "4, chain": ("tasks-4-stages-virtual", LINEAR),
    "4, waves": ("tasks-4-stages-virtual", WAVES),
    "8, chain": ("tasks-8-stages-virtual", LINEAR),
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
EXITS = {  # one run each, stage 0 of two real cores ending at the exit
    ("4", "transformer"): "tasks-exit-4",
    ("8", "transformer"): "tasks-exit-8",
    ("8", "norm"): "tasks-exit-8-norm",
    ("15", "transformer"): "tasks-exit-15",
    ("18", "transformer"): "tasks-exit-18",
}
LOADS = {  # by what was asked and by which head
    ("96 of Spec-Bench, 128", "exit 8"): "load-4-stages-8",
    ("64 of MT-Bench, 128", "exit 8"): "load-4-stages-32",
    ("64 of MT-Bench, 128", "untrained, no lookup"): "load-4-stages-hopeless",
}
MEMORY = re.compile(r"(\d+) (own|shared|mixed)")
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def percent(*shares: float) -> str:
    """Return shares as percentages: ``68, 86 %``."""
    return ", ".join(f"{100 * share:.0f}" for share in shares) + " %"


def read(name: str) -> Row:
    """Return a result file, ``name`` being its path below docs/results without ``.json``."""
    found: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def rows_of(name: str) -> dict[tuple[str, str], Row]:
    """Return the rows of a result of ``ppsd-lab tasks`` by group and variant."""
    return {(row["group"], row["variant"]): row for row in read(f"tasks/{name}")["rows"]}


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
            cells = [told, str(row["tasks"]), rows_told, percent(row["alpha"])]
            cells.append(f"**{mean}**" if variant == WAVES else mean)
            cells.append(f"{paired['median']:.2f} ({paired['low']:.2f}–{paired['high']:.2f})")
            lines.append([*cells, f"{row['total_ratio']:.2f}×"])
    heads = ["stages, heads", "prompts", "rows", "hits", "over plain, mean of speeds"]
    return table([*heads, "median, quartiles", "all tokens over all time"], lines)


def many() -> str:
    """Return what trees make of many requests, beside plain continuous batching."""
    lines = []
    for (prompts, told), name in LOADS.items():
        for row in read(f"load/{name}")["rows"]:
            if row["variant"] == PLAIN:
                continue
            cells = [str(row["concurrent"]), prompts, told, f"{row['rows']:.0f}"]
            hits, ratio = percent(row["hits"]), f"**{row['ratio']:.2f}×**"
            lines.append([*cells, hits, ratio, f"{row['full_ratio']:.2f}×"])
    heads = ["at once", "prompts, tokens each", "heads", "rows in a wave", "hits"]
    return table([*heads, "over plain", "all under way"], lines)


def rivals() -> str:
    """Return our ways to decode beside the rivals', overall."""
    rows = [row for (g, _), row in rows_of("tasks-4-stages-rivals").items() if g == "all"]
    heads = ["variant", "over plain", "quartiles", "all over all", "hits", "differing"]
    return table(heads, [_rival(row) for row in rows])


def _rival(row: Row) -> list[str]:
    paired = row["paired"]
    return [
        row["variant"],
        f"{row['ratio']:.2f}×",
        f"{paired['low']:.2f}–{paired['high']:.2f}",
        f"{row['total_ratio']:.2f}×",
        "–" if row["alpha"] is None else percent(row["alpha"]),
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
    return table([*heads, "hits", "differing"], lines)


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
    heads = ["tasks", "prompts", "chain", "waves", "best rival", "waves over it"]
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


def figures() -> str:
    """Return what README says of speed."""

    def of(name: str, *variants: str) -> tuple[str, list[str]]:
        rows = [rows_of(name)["all", variant] for variant in variants]
        shares = percent(*(row["alpha"] for row in rows))
        return shares, [f"{row['ratio']:.2f}×" for row in rows]

    load = read("load/load-4-stages-8")["rows"][1]
    chosen = [_oracle(stages, 0.8) for stages in (4, 8)]
    speeds, bests = (
        [f"{row[key]['median']:.2f}×" for row in chosen] for key in ("speedup", "paper")
    )
    found = {  # what decodes, and where it is described: share right, and speedups
        ("four emulated devices, Spec-Bench: a chain", "waves"): of(
            "tasks-4-stages-virtual", LINEAR
        ),
        ("the same: 16 rows of a tree", "waves"): of("tasks-4-stages-virtual", WAVES),
        ("eight emulated devices: 16 rows, heads at three exits", "waves"): of(
            "tasks-8-stages-virtual", WAVES
        ),
        ("four: eight requests at once, over plain batching", "many-requests"): (
            percent(load["hits"]),
            [f"{load['ratio']:.2f}×"],
        ),
        ("four: 16 rows, a model of 1.5B", "a-second-model"): of(
            "tasks-1.5b-4-stages-virtual", WAVES
        ),
        ("two real cores with memory of their own: a chain", "real-drafts"): of(
            "tasks-2-stages-own", "ppsd"
        ),
        ("two real cores, whole bfloat16 weights: 4 rows", "waves"): of(
            "tasks-2-stages-waves-bfloat16", "ppsd rows=4"
        ),
        (f"four, eight: a chain of chosen drafts; ρ\\* {', '.join(bests)}", "emulated-devices"): (
            percent(*(row["alpha"]["median"] for row in chosen)),
            speeds,
        ),
        ("four or eight: no draft right, gate on", "the-gate-never-slower"): ("0 %", [_gated()]),
    }
    lines = [
        [told, f"[{', '.join(ratios)}](docs/results.md#{place})", shares]
        for (told, place), (shares, ratios) in found.items()
    ]
    titles = [
        "devices and drafts",
        "speedup over plain decoding on the same stages",
        "hits: tokens that a draft foresaw",
    ]
    return table(titles, lines)


def _oracle(stages: int, alpha: float) -> Row:
    rows = read(f"pipeline/efficiency-{stages}-stages")["rows"]
    found: Row = next(row for row in rows if row["variant"] == f"ppsd α={alpha:g}")
    return found


def _gated() -> str:
    """Return what the gate keeps when no draft is right, on four and on eight devices."""
    gated = [read(f"pipeline/efficiency-{n}-stages")["gated"]["ppsd gated α=0"] for n in (4, 8)]
    return " and ".join(dict.fromkeys(f"{found['median']:.2f}×" for found in gated))


def heads() -> str:
    """Return the acceptance of the heads that ship, over all prompts."""
    found = read("heads/acceptance")["heads"]
    lines = []
    for name, head in found.items():
        if name.endswith(" alone"):
            continue
        low, high = head["interval"]
        cells = [f"{head['alpha']:.3f}", f"{low:.3f}–{high:.3f}", f"{head['top']['8']:.3f}"]
        cells.append(f"{found[f'{name} alone']['alpha']:.3f}")
        cells.append(f"{head['expected']['head_layers']:.1f}")
        lines.append([_called(head), *cells, f"{head['trained_tokens'] / 1e6:.1f} M"])
    titles = ["head", "α", "95 % interval", "among the first 8", "α without prompt lookup"]
    return table([*titles, "cost in layer-times", "tokens trained on"], lines)


def _called(head: Row) -> str:
    return f"{head['kind']}, exit {head['exit_layer']}"


def elsewhere() -> str:
    """Return the acceptance of the heads at temperature 1, and on prompts of other sets."""
    sampled, others = (read(f"heads/{name}")["heads"] for name in ACCEPTANCE[1:])
    lines = []
    for name, head in sampled.items():
        rates = [rate for h in (head, others[name]) for rate in (h["alpha"], h["top"]["8"])]
        lines.append([_called(head), *(f"{rate:.3f}" for rate in rates)])
    titles = ["temperature 1", "among the first 8", "other sets", "among the first 8"]
    return table(["head", *titles], lines)


def aims() -> str:
    """Return what the heads were to reach, and what they do."""
    greedy, sampled, others = (read(f"heads/{name}")["heads"] for name in ACCEPTANCE)

    def both(head: Row) -> str:
        return f"{head['alpha']:.3f}, {head['top']['8']:.3f}"

    alone = greedy["transformer-8 alone"]
    worst = min(alone["by_category"].items(), key=lambda item: item[1]["alpha"])
    trees = [rows_of(f"tasks-{n}-stages-virtual")["all", WAVES]["ratio"] for n in (4, 8)]
    apart = f"{alone['alpha']:.3f}; {worst[0]} {worst[1]['alpha']:.2f}"
    ratios = ", ".join(f"{ratio:.2f}×" for ratio in trees)
    lines = [
        ["exit 4", "0.67, 0.86", both(greedy["transformer-4"])],
        ["exit 8", "0.72, 0.89", both(greedy["transformer-8"])],
        ["exit 8, without lookup", "0.52, no task below 0.40", apart],
        ["exit 8, temperature 1", "0.50, 0.75", both(sampled["transformer-8"])],
        ["exit 8, HumanEval and GSM8K", "0.68", f"{others['transformer-8']['alpha']:.3f}"],
        ["exit 15", "0.75, 0.91", both(greedy["transformer-15"])],
        ["waves of 16 rows on four and eight emulated stages", "3.4×, 4.2×", ratios],
    ]
    return table(["", "aimed at", "shipped"], lines)


def work() -> str:
    """Return what becomes of the devices: their share of the speed, and the rows made."""
    lines = []
    for stages in (4, 8):
        for told, variant in (("a chain", LINEAR), ("waves of 16 rows", WAVES)):
            row = rows_of(f"tasks-{stages}-stages-virtual")["all", variant]
            cells = [f"{row['ratio'] / stages:.2f}×", f"{row['rows'] / row['judged']:.1f}"]
            lines.append([f"{stages} devices, {told}", *cells])
    return table(["", "over plain decoding, per device", "rows made for a token"], lines)


def exits() -> str:
    """Return two real cores by where stage 0 ends, and whose memory the requests had."""
    lines = []
    for where, name in EXITS.items():
        told = read(f"tasks/{name}")["requests"]
        memory = {kind: int(count) for count, kind in MEMORY.findall(told)}
        row = rows_of(name)["all", "ppsd"]
        own = f"{memory.get('own', 0)} of {sum(memory.values())}"
        cells = [f"{row['alpha']:.2f}", f"{row['ratio']:.2f}×", own]
        lines.append([*where, *cells, f"[{name}](results/tasks/{name}.json)"])
    titles = ["exit", "head", "α", "PPSD", "requests with memory of their own", "file"]
    return table(titles, lines)


def contract() -> str:
    """Return how exact answers are on real weights, a row for each file of `make exactness`."""
    lines = []
    for path in sorted((RESULTS / "exactness").glob("*-temperature-*.json")):
        found, (dtype, stages, *more) = json.loads(path.read_text()), path.stem.split("-")
        way = "waves" if "waves" in more else "chain"
        same = [f"{found[name]} of {found['prompts']}" for name in ("exact", "bitwise_logits")]
        ties = sum(comparison["margin"] == 0 for comparison in found["comparisons"])
        accepted = f"{found['accepted']} of {found['judged']}"
        where = [dtype, stages, way, more[-1]]
        lines.append([*where, *same, str(found["tokens"]), accepted, str(ties)])
    titles = ["dtype", "stages", "drafts", "temperature", "same tokens", "same bits in all logits"]
    return table([*titles, "tokens", "drafts accepted", "ties"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "waves": waves,
    "reached": reached,
    "needed": needed,
    "figures": figures,
    "heads": heads,
    "elsewhere": elsewhere,
    "aims": aims,
    "work": work,
    "exits": exits,
    "contract": contract,
    "many": many,
    "rivals": rivals,
    "best": best,
    "second": second,
    "reliability": reliability,
}


def written(text: str) -> str:
    """Return the page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main() -> int:
    """Rewrite the pages, or check them; return the exit code."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    stale = {page: after for page, text in texts.items() if (after := written(text)) != text}
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page}: tables are not what the files say; run tools/results.py")
        return int(bool(stale))
    for page, after in stale.items():
        page.write_text(after, encoding="utf-8")
    report_plots.reliability(tenths(), TASKS / "reliability.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
