"""``ppsd bench tasks|baselines|report``: real prompts, trained heads, and other decoders."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.options import Memory, PipelineOptions, check_memory, flag, integers
from ppsd.cli.session import open_llm
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.bench.runner import Cell, Measurement, Results
    from ppsd.bench.tasks import Variant
    from ppsd.bench.workload import Task
    from ppsd.engine.llm import LLM

_bench = functools.partial(flag, panel="Benchmark")
ALL = "all"
GREEDY, SAMPLED = "greedy", "T=1"


@dataclass
class WorkOptions:
    """What is decoded, how often, and where measurements go."""

    prompts: Annotated[list[Path], _bench("JSONL or text file of prompts; may be repeated.")]
    limit: Annotated[int | None, _bench("Take so many prompts of each file, evenly.")] = None
    max_tokens: Annotated[int, _bench("Tokens of an answer.", "-n", "--max-tokens")] = 128
    repeats: Annotated[int, _bench("Repeats of everything, interleaved.", min=1)] = 1
    out: Annotated[
        Path | None, _bench("Keep each measurement here (JSON lines), and continue from it.")
    ] = None
    memory: Memory = "any"
    as_json: Annotated[bool, _bench("Print one JSON object.", "--json")] = False

    def tasks(self) -> list[Task]:
        """All prompts; an id that two files share gets its file's name before it."""
        from ppsd.bench.workload import load_tasks

        check_memory(self.memory)
        found = [(path, task) for path in self.prompts for task in load_tasks(path, self.limit)]
        ids = [task.id for _, task in found]
        if len(set(ids)) == len(ids):
            return [task for _, task in found]
        return [replace(task, id=f"{path.stem}/{task.id}") for path, task in found]


def bench_tasks(
    pipeline: PipelineOptions,
    work: WorkOptions,
    gammas: Annotated[
        str, _bench("Draft lengths of draft-then-verify.", metavar="γ,…")
    ] = "1,2,3,4,5,6,7,8",
    sampled: Annotated[bool, _bench("Also decode at temperature 1.", "--sampled")] = False,
) -> None:
    """Compare plain decoding, draft-then-verify and PPSD on real prompts with a trained head."""
    lengths = integers("gammas", gammas)
    tasks = work.tasks()
    from ppsd.bench.tasks import TaskBench, variants
    from ppsd.types import SamplingParams

    chosen = variants(lengths)
    params = {GREEDY: SamplingParams(max_tokens=work.max_tokens)}
    if sampled:
        params[SAMPLED] = SamplingParams(1.0, max_tokens=work.max_tokens)
    with _pipeline(pipeline, chosen) as llm:
        bench = TaskBench(llm, chosen, tasks, params)
        names = [v.name for v in chosen]
        results = _measure("tasks", llm, work, names, tasks, list(params), bench.measure)
        _report(llm, work, results, _groups(tasks, list(params)))


def bench_baselines(pipeline: PipelineOptions, work: WorkOptions) -> None:
    """Compare the pipeline with other decoders on the same cores, greedily and in one dtype."""
    tasks = work.tasks()
    from ppsd.bench.baselines import BaselineBench, OutsiderProcess, outsiders
    from ppsd.bench.tasks import variants
    from ppsd.types import SamplingParams

    chosen = variants(())
    with _pipeline(pipeline, chosen) as llm, ExitStack() as stack:
        path = llm.layout.files.path
        dtype = str(llm.layout.dtype).removeprefix("torch.")
        others = []
        for outsider in outsiders(llm.layout.bounds[1], path.suffix == ".gguf"):
            shares = llm.layout.cores[: 1 if outsider.one_stage else None]
            cores = [core for share in shares for core in share]
            threads = llm.layout.threads * len(shares)
            others.append(OutsiderProcess(outsider, str(path), dtype, threads, cores))
            stack.callback(others[-1].close)
        params = SamplingParams(max_tokens=work.max_tokens)
        bench = BaselineBench(llm, chosen, others, tasks, params)
        names = [v.name for v in chosen] + [other.name for other in others]
        results = _measure("baselines", llm, work, names, tasks, [GREEDY], bench.measure)
        _report(llm, work, results, _groups(tasks, [GREEDY]))


def bench_report(
    results: Annotated[list[Path], typer.Argument(help="--json outputs of bench and acceptance.")],
    out: Annotated[Path, typer.Option(help="Directory of the page and its plots.")],
    trace: Annotated[
        list[Path] | None, typer.Option(help="Trace of generate --trace; may be repeated.")
    ] = None,
) -> None:
    """Turn result files into one Markdown page with plots."""
    from ppsd.bench.report import read_result, write_report

    page = write_report([read_result(path) for path in results], trace or [], out)
    print(page)


@contextmanager
def _pipeline(pipeline: PipelineOptions, chosen: Sequence[Variant]) -> Iterator[LLM]:
    """A pipeline planned for PPSD whose buffers suit every variant.

    Raises ConfigError when it has no drafts.
    """
    if pipeline.mode != "auto" or pipeline.block is not None:
        raise ConfigError("mode", pipeline.mode, "left out: this benchmark runs all modes")
    from ppsd.config import EngineConfig
    from ppsd.engine.choose import planned

    config = planned(EngineConfig(**replace(pipeline, mode="ppsd").settings()))
    split = None if config.split is None else ",".join(map(str, config.split))
    fixed = replace(pipeline, split=split, exit_layer=None, head=config.head)
    largest = max((v.block or 1 for v in chosen), default=1)
    mode = "draft-then-verify" if largest > 1 else "ppsd"
    with open_llm(replace(fixed, mode=mode, block=largest)) as llm:
        if not llm.drafts:
            raise ConfigError("head", pipeline.head, "an exit head: drafts are what is measured")
        yield llm


def _measure(
    verb: str,
    llm: LLM,
    work: WorkOptions,
    names: Sequence[str],
    tasks: Sequence[Task],
    settings: Sequence[str],
    measure: Callable[[Cell], Measurement],
) -> Results:
    from ppsd.bench.memory import noted
    from ppsd.bench.runner import Results, interleaved, run
    from ppsd.provenance import portable, provenance

    about = {
        "verb": verb,
        "variants": list(names),
        "tasks": [task.id for task in tasks],
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


def _groups(tasks: Sequence[Task], settings: Sequence[str]) -> dict[str, list[str]]:
    """Names of measured tasks by category, all of them first, for each way of sampling."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        for task in tasks:
            for group in (ALL, task.category):
                name = group if setting == GREEDY else f"{group} {setting}"
                groups.setdefault(name, []).append(f"{task.id} @ {setting}")
    return groups


def _report(
    llm: LLM, work: WorkOptions, results: Results, groups: Mapping[str, Sequence[str]]
) -> None:
    from ppsd.bench.memory import label, with_memory
    from ppsd.bench.report import TASK_HEADS, task_cells
    from ppsd.bench.tasks import summarize

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
