"""``ppsd bench``: the pipeline against theory, and against the simulator."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.display import pace_label
from ppsd.cli.options import Memory, PipelineOptions, check_memory, flag, grouped, numbers
from ppsd.cli.session import open_llm
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.bench import efficiency, predict
    from ppsd.bench.oracle import Variant
    from ppsd.bench.runner import Cell, Measurement, Results, Spread
    from ppsd.bench.workload import Task
    from ppsd.engine.llm import LLM

app = typer.Typer(
    help="Measure the pipeline: against theory, the simulator and other decoders.",
    no_args_is_help=True,
    add_completion=False,
)
_bench = functools.partial(flag, panel="Benchmark")

WIDTH = 120
ORACLE_LABEL = "ORACLE drafts: acceptance is chosen, not a head's"


@dataclass
class BenchOptions:
    """What is measured how often, and where it goes."""

    prompts: Annotated[
        Path | None, _bench("JSONL or text file of prompts; one short prompt if left out.")
    ] = None
    limit: Annotated[int | None, _bench("Take so many prompts, evenly from the file.")] = None
    alphas: Annotated[
        str | None, _bench("Acceptance rates of the oracle's drafts.", metavar="α,…")
    ] = None
    tokens: Annotated[int, _bench("Timed tokens of each request.")] = 128
    repeats: Annotated[int, _bench("Repeats of every mode, interleaved.")] = 7
    out: Annotated[
        Path | None, _bench("Keep each measurement here (JSON lines), and continue from it.")
    ] = None
    as_json: Annotated[bool, _bench("Print one JSON object.", "--json")] = False

    def tasks(self) -> list[Task]:
        """The prompts."""
        from ppsd.bench.workload import default_tasks, load_tasks

        return default_tasks() if self.prompts is None else load_tasks(self.prompts, self.limit)

    def rates(self, default: tuple[float, ...]) -> tuple[float, ...]:
        """The oracle's acceptance rates."""
        rates = default if self.alphas is None else numbers("alphas", self.alphas)
        if not rates or not all(0 <= rate <= 1 for rate in rates):
            raise ConfigError("alphas", self.alphas, "rates in [0, 1] separated by commas")
        return rates


@app.command("efficiency")
@grouped
def bench_efficiency(
    pipeline: PipelineOptions,
    options: BenchOptions,
    memory: Memory = "any",
) -> None:
    """Compare PPSD's speedup over plain decoding with theory, and say where the rest goes."""
    from ppsd.bench import efficiency
    from ppsd.bench.memory import label as memory_label
    from ppsd.bench.memory import with_memory

    check(pipeline, ("mode", "block", "head", "gate"))
    check_memory(memory)
    variants = efficiency.variants(options.rates(efficiency.ALPHAS), pipeline.in_flight)
    with measured("efficiency", pipeline, options, variants, block=1) as (llm, everything):
        results = with_memory(everything, memory)
        fast = [v for v in variants if v.alpha is not None]
        rows = efficiency.summarize(results, [v.name for v in fast if not v.gate])
        gated = efficiency.gated_speedups(results, [v.name for v in fast if v.gate])
        plain = efficiency.plain_summary(results)
        found = memory_label(everything, memory)
        label = _label(llm, results) + (f" · {found}" if found else "")
        if options.as_json:
            speedups = {name: asdict(speedup) for name, speedup in gated.items()}
            record = {"label": label, "memory": memory, "kept": len(results), "plain": plain}
            record |= {"rows": [asdict(row) for row in rows], "gated": speedups}
            print(json.dumps(record_of(llm, results) | record, indent=1))
        else:
            _show_efficiency(label, plain, rows)
            for name, speedup in gated.items():
                print(f"{name}: {_number(speedup.median)} × plain ({_quartiles(speedup)})")


@app.command("predict")
@grouped
def bench_predict(
    pipeline: PipelineOptions,
    options: BenchOptions,
    profile: Annotated[
        bool,
        _bench(
            "Predict from profiles taken in between, not from the run's own times; takes some "
            "ten seconds more a request."
        ),
    ] = False,
) -> None:
    """Compare the simulator's token times with the engine's, in all three modes."""
    from ppsd.bench import predict
    from ppsd.speculation.policy import DEFAULT_BLOCK, schedule_for

    check(pipeline, ("mode", "in_flight", "head", "gate"))
    if profile:
        _check_profiled(pipeline)
    block = pipeline.block or DEFAULT_BLOCK
    variants = predict.variants(options.rates(predict.ALPHAS), block)
    verb = "predict by profile" if profile else "predict"
    with (
        _profiler(pipeline) if profile else nullcontext(_unchanged) as around,
        measured(verb, pipeline, options, variants, block, around) as (llm, results),
    ):
        stages = llm.layout.stages
        schedules = {v.name: schedule_for(v.mode, stages, v.block, v.in_flight) for v in variants}
        price = _price(llm, options, profiled=profile)
        rows = predict.summarize(results, schedules, price)
        if options.as_json:
            source = "profiles taken in between" if profile else "stage times of the run itself"
            record = {"source": source, "rows": [asdict(row) for row in rows]}
            print(json.dumps(record_of(llm, results) | record, indent=1))
        else:
            _show_predictions(_label(llm, results), rows)


def _check_profiled(pipeline: PipelineOptions) -> None:
    """Refuse pipelines that a profile says nothing of."""
    if pipeline.transport not in ("auto", "shared-memory"):
        raise ConfigError("transport", pipeline.transport, "auto or shared-memory with --profile")
    if pipeline.devices != "cpu":
        raise ConfigError("devices", pipeline.devices, "cpu with --profile")


Measure = Callable[["Cell"], "Measurement"]


def _unchanged(measure: Measure) -> Measure:
    return measure


@contextmanager
def _profiler(pipeline: PipelineOptions) -> Iterator[Callable[[Measure], Measure]]:
    """Take a profile between any two measurements, and note both neighbours with each."""
    from ppsd.cli.profile import subject_of
    from ppsd.config import EngineConfig
    from ppsd.cost.measure import profiler

    c = EngineConfig(**pipeline.settings())
    subject = subject_of(c.model, c.dtype, c.stages, c.threads_per_stage, "shared-memory")
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


def _price(llm: LLM, options: BenchOptions, *, profiled: bool) -> predict.Price:
    from ppsd.bench import predict

    shape = predict.shape_of(llm.layout, llm.config)
    if not profiled:
        return predict.own_times(shape)
    half = options.tokens // 2
    contexts = {task.id: len(llm.encode(task.messages)) + half for task in options.tasks()}
    paced = range(llm.layout.stages) if llm.config.pace else ()
    pace = [llm.config.pace_of(rank) for rank in paced]
    return predict.profiled(llm.layout.bounds, contexts, pace, shape)


def check(pipeline: PipelineOptions, own: Sequence[str]) -> None:
    """Refuse flags that the benchmark would have to ignore."""
    for field in dataclasses.fields(pipeline):
        value = getattr(pipeline, field.name)
        if field.name in own and value != field.default:
            raise ConfigError(field.name, value, "left out: this benchmark sets its own")
    if pipeline.stages == 1 and pipeline.split is None:
        raise ConfigError("stages", 1, "at least 2")


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError("out", str(out), "a file in a directory that exists")


def _decided(pipeline: PipelineOptions, block: int) -> PipelineOptions:
    """All modes run where ``ppsd`` would be cut, with room for blocks of ``block`` rows."""
    from ppsd.config import EngineConfig
    from ppsd.engine.build import plan_layout
    from ppsd.model.source import resolve_model

    wanted = dataclasses.replace(pipeline, head="none", mode="ppsd", block=None)
    config = EngineConfig(**wanted.settings())
    _, layout, _ = plan_layout(config, resolve_model(config.model))
    split = ",".join(map(str, layout.bounds[1:-1]))
    mode = "ppsd" if block == 1 else "draft-then-verify"
    return dataclasses.replace(wanted, mode=mode, block=block, plan="off", split=split)


@contextmanager
def measured(
    verb: str,
    pipeline: PipelineOptions,
    options: BenchOptions,
    variants: Sequence[Variant],
    block: int,
    around: Callable[[Measure], Measure] = _unchanged,
) -> Iterator[tuple[LLM, Results]]:
    """Open the pipeline, run what is not measured yet, and give all measurements."""
    _check_out(options.out)
    tasks = options.tasks()
    from ppsd.bench import oracle, runner
    from ppsd.bench.memory import noted
    from ppsd.provenance import portable, provenance

    with open_llm(_decided(pipeline, block), trace=True, drafter=oracle.placeholder()) as llm:
        config = llm.config
        settings = {
            "verb": verb,
            "variants": [variant.name for variant in variants],
            "tasks": [task.id for task in tasks],
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


def _label(llm: LLM, results: Results) -> str:
    """What has to stand beside every figure."""
    from ppsd.bench.runner import total

    bounds = ",".join(map(str, llm.layout.bounds))
    pace = pace_label(llm.config, total(results, "overruns"), total(results, "blocks"))
    return f"{ORACLE_LABEL} · {llm.layout.stages} stages at {bounds}{pace}"


def record_of(llm: LLM, results: Results) -> dict[str, Any]:
    """What every ``--json`` object begins with."""
    from ppsd.bench.runner import total

    return {
        "label": _label(llm, results),
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
    """Standard output, wide enough for the tables where it is a file."""
    width = None if Console().is_terminal else WIDTH
    return Console(highlight=False, markup=False, width=width)


def _show_efficiency(label: str, plain: dict[str, Any], rows: Sequence[efficiency.Row]) -> None:
    console = table_console()
    console.print(label, soft_wrap=True)
    stages = " + ".join(f"{stage['median'] * 1e3:.2f}" for stage in plain["stage_times"])
    console.print(f"plain: {plain['token_time']['median'] * 1e3:.2f} ms a token; stages {stages}")
    heads = ("α", "speedup", "quartiles", "ρ*", "of ρ*", "bound", "of bound")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        speedup = (_number(row.speedup.median), _quartiles(row.speedup))
        paper = (_number(row.paper.median), _share(row.of_paper))
        model = (_number(row.model.median), _share(row.of_model))
        table.add_row(_number(row.alpha.median), *speedup, *paper, *model)
    console.print(table)
    console.print("\nms a token: measured = ideal + losses (means)")
    parts = list(rows[0].budget)
    losses = Table("α", "measured", *parts, box=None, pad_edge=False)
    for row in rows:
        times = [row.token_time, *row.budget.values()]
        losses.add_row(_number(row.alpha.median), *(f"{time * 1e3:.2f}" for time in times))
    console.print(losses)


def _show_predictions(label: str, rows: Sequence[predict.Row]) -> None:
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
        table.add_row(row.variant, _number(row.alpha.median), *times, *errors, speedup)
    console.print(table)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _share(value: Spread) -> str:
    return f"{value.median:.1%}"


def _quartiles(value: Spread) -> str:
    return f"{value.low:.3f}–{value.high:.3f}"
