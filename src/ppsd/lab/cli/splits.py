"""``ppsd-lab splits``: every split tried, to see whether the planned one is the best."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.flags import pairs
from ppsd.cli.session import open_llm
from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab.cli.oracle import (
    ORACLE_LABEL,
    SET_HERE,
    BenchOptions,
    benchmark,
    check_stages,
    table_console,
)

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.lab.runner import Spread
    from ppsd.lab.splits import Row
    from ppsd.plan.planner import Plan, Problem

OWN = (*SET_HERE, "split", "exit_layer", "block", "in_flight", "pace")


def splits(
    config: Annotated[EngineConfig, Without(OWN)],
    options: BenchOptions,
    alpha: Annotated[
        str, benchmark("Acceptance by exit; linear between the exits given.", metavar="EXIT:α,…")
    ],
) -> None:
    """Decode with every split there is, and compare the planned one with the best."""
    check_stages(config)
    rates = pairs("alpha", alpha, "exit:rate")
    from ppsd.lab import splits as study

    problem = _problem(config, options, rates)
    tried = study.trials(problem)
    results = _measure(config, options, tried, problem)
    rows = study.summarize(results, tried)
    behind, curve = study.behind_best(rows), study.behind_curve(results, tried)
    if options.as_json:
        record: dict[str, Any] = {
            "label": ORACLE_LABEL,
            "alpha": rates,
            "source": problem.profile.source,
        }
        record |= {"behind_best": behind, "behind_curve": curve and dataclasses.asdict(curve)}
        record |= {"rows": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(record | {"provenance": results.provenance}, indent=1))
    else:
        _show(rows, behind, curve)


def _problem(config: EngineConfig, options: BenchOptions, rates: Mapping[int, float]) -> Problem:
    from ppsd.engine.choose import outlook
    from ppsd.lab.splits import exits_along
    from ppsd.plan.planner import Problem

    found = outlook(config)
    last = found.profile.sizes.layers - 1
    if not all(1 <= layer <= last for layer in rates):
        raise ConfigError("alpha", sorted(rates), f"exits in [1, {last}]")
    # prompts are short beside this: what matters is where the timed tokens lie
    return Problem(
        found.profile,
        config.stages,
        exits_along(rates),
        context=options.tokens // 2,
        at_once=found.at_once,
    )


def _measure(
    config: EngineConfig, options: BenchOptions, tried: Mapping[str, Plan], problem: Problem
) -> Any:
    tasks = options.tasks()
    from ppsd.lab import oracle, runner
    from ppsd.lab import splits as study
    from ppsd.measure.workload import digest
    from ppsd.provenance import portable, provenance

    @contextmanager
    def opened(plan: Plan) -> Iterator[LLM]:
        split, window = tuple(plan.bounds[1:-1]), plan.schedule.in_flight
        fixed = config.replaced(split=split, in_flight=window, plan="off", head="none", mode="ppsd")
        with open_llm(fixed, trace=True, drafter=oracle.placeholder()) as llm:
            yield llm

    rates = {exit_.layer: exit_.alpha for exit_ in problem.exits}
    settings = {
        "verb": "splits, against plain",
        "variants": list(tried),
        "tasks": [task.id for task in tasks],
        "asked": digest(tasks),
        "tokens": options.tokens,
        "rates": rates,
        "pipeline": portable(config),
    }
    results = runner.Results(options.out, settings, provenance())
    cells = runner.interleaved(list(tried), [task.id for task in tasks], options.repeats)
    bench = study.SplitBench(opened, tried, tasks, options.tokens)
    with progress.bar("measuring", len(cells), "{task.fields[note]}") as (bar, task):

        def done(cell: runner.Cell) -> None:
            bar.update(task, advance=1, note=cell.variant)

        try:
            runner.run(cells, results, bench.measure, done)
        finally:
            bench.close()
    return results


def _show(rows: list[Row], behind: float, curve: Spread | None) -> None:
    console = table_console()
    console.print(ORACLE_LABEL, soft_wrap=True)
    heads = ("split", "w", "α", "ms a token", "speedup", "quartiles", "predicted")
    table = Table(*heads, box=None)
    for row in rows:
        measured, split = row.measured, ",".join(map(str, row.bounds[1:-1]))
        quartiles = f"{measured.low:.3f} … {measured.high:.3f}"
        speedups = (f"{measured.median:.3f}", quartiles, f"{row.predicted:.3f}")
        times = (f"{row.alpha:.3f}", f"{row.token_time * 1e3:.2f}")
        table.add_row(split, str(row.window), *times, *speedups)
    console.print(table)
    console.print(f"the planned split takes {behind:.1%} longer than the fastest")
    if curve:
        quartiles = f"{curve.low:.1%} … {curve.high:.1%}"
        console.print(f"by a parabola through all runs near it: {curve.median:.1%} ({quartiles})")
