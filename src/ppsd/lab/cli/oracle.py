"""Share what verbs need that measure with drafts of a chosen acceptance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from ppsd.cli import progress
from ppsd.cli.display import pace_label
from ppsd.cli.flags import flag, numbers
from ppsd.cli.session import open_llm
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.lab.oracle import Variant
    from ppsd.lab.runner import Cell, Measurement, Results, Spread
    from ppsd.measure.workload import Task

benchmark = functools.partial(flag, panel="Benchmark")

WIDTH = 120
# An oracle takes the place of heads, and the verbs set modes and gates themselves.
SET_HERE = ("mode", "head", "force_head", "lookup", "gate", "rows", "heads", "concurrent")
ORACLE_LABEL = "ORACLE drafts: acceptance is chosen, not a head's"


@dataclass
class BenchOptions:
    """Say what is measured how often, and where it goes."""

    prompts: Annotated[
        Path | None, benchmark("JSONL or text file of prompts; one short prompt if left out.")
    ] = None
    limit: Annotated[int | None, benchmark("Take so many prompts, evenly from the file.")] = None
    tokens: Annotated[int, benchmark("Timed tokens of each request.")] = 128
    repeats: Annotated[int, benchmark("Repeats of every mode, interleaved.")] = 7
    out: Annotated[
        Path | None, benchmark("Keep each measurement here (JSON lines), and continue from it.")
    ] = None
    as_json: Annotated[bool, benchmark("Print one JSON object.", "--json")] = False

    def tasks(self) -> list[Task]:
        """Return the prompts."""
        from ppsd.measure.workload import default_tasks, load_tasks

        return default_tasks() if self.prompts is None else load_tasks(self.prompts, self.limit)


Rates = Annotated[str | None, benchmark("Acceptance rates of the oracle's drafts.", metavar="α,…")]


def rates_of(alphas: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return the oracle's acceptance rates; raises ConfigError."""
    rates = default if alphas is None else numbers("alphas", alphas)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ConfigError("alphas", alphas, "rates in [0, 1] separated by commas")
    return rates


Measure = Callable[["Cell"], "Measurement"]


def unchanged(measure: Measure) -> Measure:
    """Measure without anything around it."""
    return measure


def check_stages(config: EngineConfig) -> None:
    """Refuse a pipeline that has nothing to speculate with."""
    if config.stages == 1:
        raise ConfigError("stages", 1, "at least 2")


def check_out(out: Path | None) -> None:
    """Raise ConfigError where no file can be written, before anything is measured."""
    from ppsd.plan.profile import check_writable

    if out is None:
        return
    if not out.absolute().parent.is_dir():
        raise ConfigError("out", str(out), "a file in a directory that exists")
    check_writable(out)


def subject(llm: LLM, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what measurements are of, as settings: names alone may come to mean other things."""
    from ppsd.measure.workload import digest
    from ppsd.model.head_files import weights_digest

    layout = llm.layout
    first = [Path(llm.config.head)] if layout.head is not None and layout.head.trained else []
    heads = [*first, *(found.path for found in layout.inner if found is not None)]
    return {
        "tasks": [task.id for task in tasks],
        "asked": digest(tasks),
        "model": layout.identity.fingerprint,
        "heads": [weights_digest(head) for head in heads],
    }


def _decided(config: EngineConfig, block: int) -> EngineConfig:
    """Return where ``ppsd`` would be cut, with room for blocks of ``block`` rows, for all modes."""
    from ppsd.engine.layout import plan_layout
    from ppsd.model.source import resolve_model

    wanted = config.replaced(head="none", mode="ppsd", block=None)
    _, layout, _ = plan_layout(wanted, resolve_model(wanted.model))
    mode = "ppsd" if block == 1 else "draft-then-verify"
    split = tuple(layout.bounds[1:-1])
    return wanted.replaced(mode=mode, block=block, plan="off", split=split)


@contextmanager
def measured(
    verb: str,
    config: EngineConfig,
    options: BenchOptions,
    variants: Sequence[Variant],
    block: int,
    around: Callable[[Measure], Measure] = unchanged,
) -> Iterator[tuple[LLM, Results]]:
    """Open the pipeline, run what is not measured yet, and give all measurements."""
    check_out(options.out)
    tasks = options.tasks()
    from ppsd.lab import oracle, runner
    from ppsd.lab.memory import noted
    from ppsd.provenance import portable, provenance

    with open_llm(_decided(config, block), trace=True, drafter=oracle.placeholder()) as llm:
        config = llm.config
        settings = {
            "verb": verb,
            "variants": [variant.name for variant in variants],
            **subject(llm, tasks),
            "tokens": options.tokens,
            "bounds": llm.layout.bounds,
            "config": portable(config),
        }
        results = runner.Results(options.out, settings, provenance(config))
        bench = oracle.OracleBench(llm, variants, tasks, options.tokens)
        names, ids = [v.name for v in variants], [task.id for task in tasks]
        cells = runner.interleaved(names, ids, options.repeats)

        fields = "{task.completed} of {task.total} · {task.fields[note]}"
        with progress.bar("measuring", len(cells), fields) as (bar, task):

            def done(cell: Cell) -> None:
                bar.update(task, advance=1, note=f"{cell.variant}, task {cell.task}")

            measure = noted(bench.measure, llm.layout.cores)
            runner.run(cells, results, around(measure), done)
        yield llm, results


def label_of(llm: LLM, results: Results) -> str:
    """Return the text that stands beside every figure."""
    from ppsd.lab.runner import total

    bounds = ",".join(map(str, llm.layout.bounds))
    pace = pace_label(llm.config, total(results, "overruns"), total(results, "blocks"))
    return f"{ORACLE_LABEL} · {llm.layout.stages} stages at {bounds}{pace}"


def record_of(llm: LLM, results: Results) -> dict[str, Any]:
    """Return the first keys of every ``--json`` object."""
    from ppsd.lab.runner import total

    return {
        "label": label_of(llm, results),
        "stages": llm.layout.stages,
        "bounds": llm.layout.bounds,
        "pace": llm.config.pace or None,
        "overruns": total(results, "overruns"),
        "blocks": total(results, "blocks"),
        "settings": results.settings,
        "repeats": 1 + max(cell.repeat for cell in results.measurements),
        "provenance": results.provenance,
    }


def table_console() -> Console:
    """Return standard output, wide enough for the tables where it is a file."""
    width = None if Console().is_terminal else WIDTH
    return Console(highlight=False, markup=False, width=width)


def number(value: float) -> str:
    """Write a figure of a table."""
    return f"{value:.3f}"


def share(value: Spread) -> str:
    """Write a median as a share."""
    return f"{value.median:.1%}"


def quartiles(value: Spread) -> str:
    """Write the quartiles of a figure."""
    return f"{value.low:.3f}–{value.high:.3f}"
