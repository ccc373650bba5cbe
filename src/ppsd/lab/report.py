"""Results of ``ppsd-lab`` and ``ppsd acceptance`` as one Markdown page with plots.

Each kind of result file has one section; every figure keeps its label and provenance. Numbers come
from the files alone: nothing is measured or computed anew here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppsd.errors import PpsdError
from ppsd.lab import report_plots as plots
from ppsd.lab.report_plots import ALL, PLAIN

Record = dict[str, Any]
PAGE = "report.md"
PROFILED = " by profile"  # ends the verb of a predict record with profiles of its own


def read_result(path: Path) -> Record:
    """Read a result file; raises PpsdError when it is none of those a report can show."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        found = kind(record)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise PpsdError(f"{path} is not the --json output of a benchmark ({error!r})") from error
    if found not in SECTIONS:
        shown = ", ".join(SECTIONS)
        raise PpsdError(f"{path} is of {found}, and a report shows only {shown}")
    return record | {"name": path.stem}


def kind(record: Record) -> str:
    """Return what a record holds: a verb, or ``acceptance``; KeyError where nothing tells."""
    verb = "acceptance" if "first_right" in record else str(record["settings"]["verb"])
    return verb.removesuffix(PROFILED)


def write_report(records: Sequence[Record], traces: Sequence[Path], out: Path) -> Path:
    """Write the page and its plots into the directory ``out``; give the page's path."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        records = _told_apart(records)
        parts = ["# Measured results\n"]
        for name, section in SECTIONS.items():
            chosen = [record for record in records if kind(record) == name]
            parts += section(chosen, out) if chosen else []
        parts += _timelines(traces, out) if traces else []
        page = out / PAGE
        page.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise PpsdError(f"cannot write the report to {out}: {error.strerror}") from error
    return page


def _told_apart(records: Sequence[Record]) -> list[Record]:
    """Return records of different names, which those of their plots are made from."""
    taken: set[str] = set()
    found = []
    for record in records:
        name = first = record["name"]
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{first}-{number}"
        taken.add(name)
        found.append(record | {"name": name})
    return found


def _efficiency(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Pipeline efficiency\n"
    yield (
        "Drafts come from an oracle of chosen acceptance, so this is the pipeline apart from the "
        "quality of a head. ρ* is the paper's optimum for equal stages; the bound is that of the "
        "stage times measured in the same run.\n"
    )
    plots.efficiency(records, out / "efficiency.png")
    yield "![speedup against acceptance](efficiency.png)\n"
    for record in records:
        yield f"### {record['name']}: {plots.stages_and_window(record)}\n\n{record['label']}\n"
        heads = ["α", "speedup", "quartiles", "ρ*", "of ρ*", "bound", "of the bound"]
        yield table(heads, [_efficiency_cells(row) for row in record["rows"]])
        budget = list(record["rows"][0]["budget"]) if record["rows"] else []
        rows = [
            [f"{row['alpha']['median']:.2f}", _ms(row["token_time"])]
            + [_ms(row["budget"][part]) for part in budget]
            for row in record["rows"]
        ]
        yield "Where a token's time goes, milliseconds (means, because they add up):\n"
        yield table(["α", "measured", *budget], rows)
        yield _origin(record)


def _efficiency_cells(row: Record) -> list[str]:
    return [
        f"{row['alpha']['median']:.3f}",
        f"{row['speedup']['median']:.3f}×",
        f"{row['speedup']['low']:.3f}–{row['speedup']['high']:.3f}",
        f"{row['paper']['median']:.3f}×",
        f"{row['of_paper']['median']:.1%}",
        f"{row['model']['median']:.3f}×",
        f"{row['of_model']['median']:.1%}",
    ]


def _predict(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Simulator against engine\n"
    yield "The simulator gets the acceptance trace of the same run, and the times that are named.\n"
    for record in records:
        by = "profiles" if record["settings"]["verb"].endswith(PROFILED) else "its stage times"
        yield f"### {record['stages']} stages, by {by}\n\n{record['label']}\n"
        rows = [
            [row["variant"], f"{row['alpha']['median']:.3f}"]
            + [_ms(row[name]["median"]) for name in ("measured", "predicted")]
            + [f"{row['error']['median']:+.1%}", f"{row['median_error']:.1%}"]
            for row in record["rows"]
        ]
        heads = ["mode", "α", "measured ms", "simulated ms", "error", "median of its size"]
        yield table(heads, rows)
        yield _origin(record)


def _tasks(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Tasks, with trained heads\n"
    groups = _alike(records)
    compared = [record for group in groups for record in group]
    for record in records:
        if record in compared:
            continue
        yield f"### {_title(record)}\n"
        yield from _task_plots(record, out)
        rows = [row for row in record["rows"] if _overall(row["group"])]
        yield table(TASK_HEADS, [task_cells(row) for row in rows])
        if len(rows) < len(record["rows"]):
            yield table(BY_TASK_HEADS, list(_by_task(record)))
        yield _origin(record)
    for group in groups:
        yield from _exits(sorted(group, key=lambda record: record["bounds"][1]), out)


def _overall(group: str) -> bool:
    """Return True if a group is all tasks, at some temperature."""
    return group.split(" ")[0] == ALL


def _by_task(record: Record) -> Iterator[list[str]]:
    """Yield a line a task under BY_TASK_HEADS; the result file has all draft lengths."""
    rows = {(row["group"], row["variant"]): row for row in record["rows"]}
    own_variants = plots.ours(record)
    for (group, variant), own in rows.items():
        if _overall(group) or variant not in own_variants:
            continue
        drafting = [r for (g, v), r in rows.items() if g == group and v.startswith(plots.DRAFTING)]
        best = max(drafting, key=lambda row: row["ratio"], default=None)
        _, _, tasks, speed, _, speedup, quartiles, _, alpha, *_ = task_cells(own)
        differing = sum(row["differing"] for row in (own, *drafting))
        name = "–" if best is None else f"γ={best['variant'].removeprefix(plots.DRAFTING)}"
        rival = "–" if best is None else f"{best['ratio']:.2f}×"
        told = group if len(own_variants) == 1 else f"{group}, {variant}"
        yield [told, tasks, speed, speedup, quartiles, alpha, name, rival, str(differing)]


def _exits(records: Sequence[Record], out: Path) -> Iterator[str]:
    picture = f"{records[0]['name']}-exits.png"
    plots.exit_depth(records, out / picture)
    yield f"### Exits compared, {records[0]['stages']} stages\n"
    yield f"![speedup and acceptance against exit layer]({picture})\n"
    rows = [
        [str(record["bounds"][1]), plots.head_name(record), *task_cells(row)[1:]]
        for record in records
        for row in record["rows"]
        if row["group"] == ALL and row["variant"] != PLAIN
    ]
    yield table(["exit", "head", *TASK_HEADS[1:]], rows)
    yield from map(_origin, records)


def _alike(records: Sequence[Record]) -> list[list[Record]]:
    """Return runs that differ in exit and head only: same stages, prompts and variants."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        settings = record["settings"]
        shared = (settings[name] for name in ("tasks", "max_tokens", "variants"))
        key = str((record["stages"], *shared))
        groups.setdefault(key, []).append(record)
    return [g for g in groups.values() if len({record["bounds"][1] for record in g}) > 1]


def _task_plots(record: Record, out: Path) -> Iterator[str]:
    by_task, by_length = f"{record['name']}-tasks.png", f"{record['name']}-lengths.png"
    plots.by_task(record, out / by_task)
    yield f"![speedup by task]({by_task})\n"
    if plots.draft_lengths(record, out / by_length):
        yield f"![speedup against draft length]({by_length})\n"


TASK_HEADS = [
    "group", "variant", "tasks", "tokens/s", "a device", "speedup", "quartiles", "all tokens", "α",
    "resyncs", "discarded", "differing outputs",
]  # fmt: skip


BY_TASK_HEADS = [
    "task", "prompts", "tokens/s", "PPSD", "quartiles", "α", "best draft length",
    "draft-then-verify", "differing outputs",
]  # fmt: skip


def task_cells(row: Record) -> list[str]:
    """Return a row of ``tasks`` under TASK_HEADS."""
    paired = row["paired"]
    return [
        row["group"],
        row["variant"],
        str(row["tasks"]),
        f"{row['speed']:.1f}",
        f"{row['per_device']:.1f}",
        f"{row['ratio']:.2f}×",
        f"{paired['low']:.2f}–{paired['high']:.2f}",
        f"{row['total_ratio']:.2f}×",
        "–" if row["alpha"] is None else f"{row['alpha']:.3f}",
        str(row["resyncs"]),
        str(row["discarded"]),
        str(row["differing"]),
    ]


def _baselines(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Other decoders on the same cores\n"
    yield "Speedup is over plain decoding on the pipeline; where it is below 1× we are ahead.\n"
    for record in records:
        rows = [row for row in record["rows"] if row["group"] == ALL]
        yield f"### {_title(record)}\n"
        yield table(TASK_HEADS, [task_cells(row) for row in rows])
        yield _origin(record)


def _endurance(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Long requests, and many\n"
    yield (
        "Seconds per token at both ends of a request; what the longer context explains comes from "
        "a profile.\n"
    )
    heads = ["mode", "first ms", "last ms", "ratio", "quartiles", "by context", "beyond"]
    for record in records:
        yield f"### {_title(record)}\n"
        rows = [
            [row["variant"]]
            + [_ms(row[name]["median"]) for name in ("first", "last")]
            + ["{median:.3f}".format(**row["ratio"]), "{low:.3f}–{high:.3f}".format(**row["ratio"])]
            + [f"{row['explained']:.3f}", f"{row['beyond']:+.1%}"]
            for row in record["drift"]
        ]
        yield table(heads, rows)
        grown = ", ".join(f"{size / 2**20:+.1f}" for size in record["memory"]["growth"])
        yield f"Memory over {len(record['memory']['resident'])} requests: {grown} MiB a stage.\n"
        yield _origin(record)


def _acceptance(records: Sequence[Record], out: Path) -> Iterator[str]:
    yield "## Exit heads\n"
    for record in records:
        yield f"### {record['name']}\n"
        picture = f"{record['name']}-heads.png"
        plots.heads(record, out / picture)
        yield f"![acceptance against exit layer, cost and training]({picture})\n"
        names = ["head", "exit", "trained on tokens", "α", "95 % interval", "top 4", "layer-times",
                 "expected", "ρ*"]  # fmt: skip
        yield table(names, [_head_cells(*item) for item in record["heads"].items()])
        categories = sorted({c for h in record["heads"].values() for c in h["by_category"]})
        rows = [
            [name] + [f"{h['by_category'][name]['alpha']:.3f}" for h in record["heads"].values()]
            for name in categories
        ]
        yield table(["α by category", *record["heads"]], rows)
        shares = record["first_right"]["shares"].items()
        firsts = " · ".join(f"{label} {share:.1%}" for label, share in shares)
        yield f"First head that is right, by exit layer: {firsts}\n"
        yield _origin(record)


def _head_cells(label: str, head: Record) -> list[str]:
    between = "–" if head["interval"] is None else "{:.3f}–{:.3f}".format(*head["interval"])
    expected = head["expected"]
    return [
        label,
        str(head["exit_layer"]),
        "–" if head["trained_tokens"] is None else f"{head['trained_tokens']:,}",
        f"{head['alpha']:.3f}",
        between,
        f"{head['top']['4']:.3f}",
        f"{expected['head_layers']:.2f}",
        f"{expected['speedup']:.2f}×",
        f"{expected['paper']:.2f}×",
    ]


def _timelines(traces: Sequence[Path], out: Path) -> Iterator[str]:
    yield "## The same text, plain and PPSD\n"
    plots.timelines(traces, out / "timeline.png")
    yield "![what each stage does](timeline.png)\n"


def _title(record: Record) -> str:
    bounds = ", ".join(map(str, record["bounds"]))
    pace = record["settings"]["config"].get("pace")
    label = f" · PACED: emulated stages of {pace} s" if pace else ""
    memory = f" · {found}" if (found := record.get("requests")) else ""
    return f"{record['name']}: {record['stages']} stages at layers {bounds}{label}{memory}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _origin(record: Record) -> str:
    """Return the provenance in one line; the result file has all of it."""
    found = record["provenance"]
    origins = found if isinstance(found, list) else [found]
    commits = ", ".join(dict.fromkeys(str(o["commit"]) for o in origins))
    first: Mapping[str, Any] = origins[0]
    return (
        f"`{first['command']}` · commit {commits} · torch {first['versions']['torch']} · "
        f"{first['cpu']}, {first['cores']} cores\n"
    )


SECTIONS: dict[str, Callable[[Sequence[Record], Path], Iterator[str]]] = {
    "tasks": _tasks,
    "efficiency": _efficiency,
    "predict": _predict,
    "acceptance": _acceptance,
    "baselines": _baselines,
    "endurance": _endurance,
}
