"""Share what verbs need that measure trained heads on real prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.session import open_llm, with_head
from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab.cli.memory import Memory, check_memory
from ppsd.lab.cli.oracle import benchmark, subject

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.lab.runner import Cell, Measurement, Results
    from ppsd.lab.tasks import Variant
    from ppsd.measure.workload import Task

ALL = "all"
GREEDY, SAMPLED = "greedy", "T=1"
Pipeline = Annotated[
    EngineConfig, Without(("mode", "block", "in_flight", "concurrent"))
]  # these verbs run all modes

Virtual = Annotated[
    bool,
    benchmark(
        "Run on virtual clocks: stages take just their pace, however long they compute.",
        "--virtual",
    ),
]


@dataclass
class WorkOptions:
    """Say what is decoded, how often, and where measurements go."""

    prompts: Annotated[list[Path], benchmark("JSONL or text file of prompts; may be repeated.")]
    limit: Annotated[int | None, benchmark("Take so many prompts of each file, evenly.")] = None
    max_tokens: Annotated[int, benchmark("Tokens of an answer.", "-n", "--max-tokens")] = 128
    repeats: Annotated[int, benchmark("Repeats of everything, interleaved.", min=1)] = 1
    out: Annotated[
        Path | None, benchmark("Keep each measurement here (JSON lines), and continue from it.")
    ] = None
    memory: Memory = "any"
    as_json: Annotated[bool, benchmark("Print one JSON object.", "--json")] = False

    def tasks(self) -> list[Task]:
        """Return all prompts; an id that two files share gets its file's name before it."""
        from ppsd.measure.workload import load_tasks

        check_memory(self.memory)
        found = [(path, task) for path in self.prompts for task in load_tasks(path, self.limit)]
        ids = [task.id for _, task in found]
        if len(set(ids)) == len(ids):
            return [task for _, task in found]
        return [replace(task, id=f"{path.stem}/{task.id}") for path, task in found]


@contextmanager
def planned_pipeline(
    config: EngineConfig, chosen: Sequence[Variant], *, virtual: bool = False
) -> Iterator[LLM]:
    """Open a pipeline planned for PPSD whose buffers suit every variant.

    Raises ConfigError when it has no drafts.
    """
    from ppsd.engine.choose import planned
    from ppsd.lab.tasks import RIVAL

    drafts = "an exit head: drafts are what is measured"
    if config.head == "none":
        raise ConfigError("head", config.head, drafts)
    best = planned(with_head(config).replaced(mode="ppsd"))
    rows = max((max(v.rows, v.block or 1) for v in chosen), default=1)
    fixed = config.replaced(
        split=best.split, exit_layer=None, head=best.head, mode="ppsd", rows=rows
    )
    rivals = any(v.mode == RIVAL for v in chosen)
    with open_llm(fixed, **clocks(virtual, rivals=rivals)) as llm:
        if not llm.drafts:
            raise ConfigError("head", config.head, drafts)
        yield llm


def clocks(virtual: bool, *, rivals: bool = False) -> dict[str, Any]:
    """Return what makes an LLM run on virtual clocks, or on real ones, and work for ``rivals``."""
    from ppsd.lab.emulated import EmulatedPipeline
    from ppsd.lab.rivals.rivals import RivalPipeline

    return (
        {"pipeline": EmulatedPipeline} if virtual else {"pipeline": RivalPipeline} if rivals else {}
    )


def measured(
    verb: str,
    llm: LLM,
    work: WorkOptions,
    names: Sequence[str],
    tasks: Sequence[Task],
    settings: Sequence[str],
    measure: Callable[[Cell], Measurement],
) -> Results:
    """Run what is not measured yet, and return all measurements."""
    from ppsd.lab.memory import noted
    from ppsd.lab.rivals.rivals import used_by
    from ppsd.lab.runner import Results, interleaved, run
    from ppsd.provenance import portable, provenance

    about = {
        "verb": verb,
        "variants": list(names),
        **subject(llm, tasks),
        **used_by(names, llm.layout.identity),
        "max_tokens": work.max_tokens,
        "bounds": llm.layout.bounds,
        "config": portable(llm.config),
    }
    results = Results(work.out, about, provenance(llm.config))
    ids = [f"{task.id} @ {setting}" for setting in settings for task in tasks]
    cells = interleaved(list(names), ids, work.repeats)
    with progress.bar("measuring", len(cells), "{task.fields[note]}") as (bar, task):

        def done(cell: Cell) -> None:
            bar.update(task, advance=1, note=f"{cell.variant} · {cell.task}")

        run(cells, results, noted(measure, llm.layout.cores), done)
    return results


def groups_of(tasks: Sequence[Task], settings: Sequence[str]) -> dict[str, list[str]]:
    """Return names of measured tasks by category, all of them first, for each way of sampling."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        for task in tasks:
            for group in (ALL, task.category):
                name = group if setting == GREEDY else f"{group} {setting}"
                groups.setdefault(name, []).append(f"{task.id} @ {setting}")
    return groups


def show(
    llm: LLM, work: WorkOptions, results: Results, groups: Mapping[str, Sequence[str]]
) -> None:
    """Print a table of all groups, or one JSON object."""
    from ppsd.lab.memory import label, with_memory
    from ppsd.lab.report import TASK_HEADS, task_cells
    from ppsd.lab.tasks import summarize

    rows = summarize(with_memory(results, work.memory), groups, llm.layout.stages)
    memory = label(results, work.memory)
    if work.as_json:
        record = {
            "requests": memory,
            "stages": llm.layout.stages,
            "bounds": llm.layout.bounds,
            "settings": results.settings,
            "provenance": results.provenance,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(record, indent=1))
        return
    if memory:
        print(memory)
    table = Table(*TASK_HEADS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*task_cells(asdict(row)))
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
