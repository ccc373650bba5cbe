"""``ppsd-lab predict``: the simulator against the engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab.cli.oracle import (
    SET_HERE,
    BenchOptions,
    Measure,
    Rates,
    benchmark,
    check_stages,
    label_of,
    measured,
    number,
    rates_of,
    record_of,
    table_console,
    unchanged,
)

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.lab import predict as study
    from ppsd.lab.runner import Cell, Measurement


def predict(
    config: Annotated[EngineConfig, Without((*SET_HERE, "in_flight"))],
    options: BenchOptions,
    profile: Annotated[
        bool,
        benchmark(
            "Predict from profiles taken in between, not from the run's own times; takes some "
            "ten seconds more a request."
        ),
    ] = False,
    alphas: Rates = None,
) -> None:
    """Compare the simulator's token times with the engine's, in all three modes."""
    from ppsd.lab import predict as study
    from ppsd.speculation.policy import DEFAULT_BLOCK, schedule_for

    check_stages(config)
    if profile:
        _check_profiled(config)
    block = config.block or DEFAULT_BLOCK
    variants = study.variants(rates_of(alphas, study.ALPHAS), block)
    verb = "predict by profile" if profile else "predict"
    with (
        _profiler(config) if profile else nullcontext(unchanged) as around,
        measured(verb, config, options, variants, block, around) as (llm, results),
    ):
        stages = llm.layout.stages
        schedules = {v.name: schedule_for(v.mode, stages, v.block, v.in_flight) for v in variants}
        price = _price(llm, options, profiled=profile)
        rows = study.summarize(results, schedules, price)
        if options.as_json:
            source = "profiles taken in between" if profile else "stage times of the run itself"
            record = {"source": source, "rows": [asdict(row) for row in rows]}
            print(json.dumps(record_of(llm, results) | record, indent=1))
        else:
            _show(label_of(llm, results), rows)


def _check_profiled(config: EngineConfig) -> None:
    """Refuse pipelines that a profile says nothing of."""
    if config.transport not in ("auto", "shared-memory"):
        raise ConfigError("transport", config.transport, "auto or shared-memory with --profile")
    if set(config.devices) != {"cpu"}:
        raise ConfigError("devices", config.devices, "cpu with --profile")


@contextmanager
def _profiler(config: EngineConfig) -> Iterator[Callable[[Measure], Measure]]:
    """Take a profile between any two measurements, and note both neighbours with each."""
    from ppsd.cli.profile import subject_of
    from ppsd.engine.profiler import profiler

    subject = subject_of(config)
    newest: list[dict[str, Any]] = []
    with profiler(subject) as take:

        def profile() -> dict[str, Any]:
            return take({}, lambda done, total: None).to_json()

        def between(measure: Measure) -> Measure:
            def measured_between(cell: Cell) -> Measurement:
                before = newest.pop() if newest else profile()
                found = measure(cell)
                newest.append(profile())
                details = found.details | {"profiles": [before, *newest]}
                return dataclasses.replace(found, details=details)

            return measured_between

        yield between


def _price(llm: LLM, options: BenchOptions, *, profiled: bool) -> study.Price:
    from ppsd.lab import predict as study

    shape = study.shape_of(llm.layout, llm.config)
    if not profiled:
        return study.own_times(shape)
    half = options.tokens // 2
    contexts = {task.id: len(llm.encode(task.messages)) + half for task in options.tasks()}
    paced = range(llm.layout.stages) if llm.config.pace else ()
    pace = [llm.config.pace_of(rank) for rank in paced]
    return study.profiled(llm.layout.bounds, contexts, pace, shape)


def _show(label: str, rows: Sequence[study.Row]) -> None:
    console = table_console()
    console.print(label, soft_wrap=True)
    heads = (
        "mode",
        "α",
        "measured ms",
        "simulated ms",
        "error",
        "quartiles",
        "median |error|",
        "of speedup",
    )
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        times = [f"{each.median * 1e3:.2f}" for each in (row.measured, row.predicted)]
        error = row.error
        quartiles = f"{error.low:+.1%} … {error.high:+.1%}"
        errors = (f"{error.median:+.1%}", quartiles, f"{row.median_error:.1%}")
        speedup = f"{row.speedup_error.median:+.1%}"
        table.add_row(row.variant, number(row.alpha.median), *times, *errors, speedup)
    console.print(table)
