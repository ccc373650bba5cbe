"""``ppsd-lab simulate``: the real policy on a virtual clock, for machines one does not have."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from ppsd.cli.flags import flag, integers
from ppsd.errors import ConfigError
from ppsd.speculation.policy import MAX_ROWS

if TYPE_CHECKING:
    from ppsd.lab.sweep import BuildCost, Row, Scenario

GANTT_TOKENS = 48  # a chart of more is unreadable
PRINTED = {
    "mode": "mode",
    "block": "m",
    "in_flight": "w",
    "stages": "P",
    "exit_layer": "E",
    "alpha": "α",
    "hop_ms": "hop ms",
    "tokens_per_second": "tokens/s",
    "speedup": "speedup",
    "model_speedup": "model",
    "paper_speedup": "ρ*",
}


_request = functools.partial(flag, panel="Pipeline and request")
_times = functools.partial(flag, panel="Times, or a preset in their place")
_output = functools.partial(flag, panel="Output")


@dataclass
class ScenarioOptions:
    """What is decoded, and over how many stages."""

    stages: Annotated[int, _request("Number of stages P.")] = 4
    layers: Annotated[int, _request("Decoder layers N; --model has its own.")] = 32
    exit_layer: Annotated[int | None, _request("Layers E of stage 0; N/P if left out.")] = None
    alpha: Annotated[
        str, _request("Acceptance: a rate, or exit:rate pairs.", metavar="α|E:α,…")
    ] = "0.8"
    trace: Annotated[
        Path | None, _request("JSON list of recorded acceptances (0 or 1) in place of --alpha.")
    ] = None
    block: Annotated[int | None, _request("Rows m of a block; 4 in draft-then-verify.")] = None
    in_flight: Annotated[int | None, _request("Blocks w of ppsd; P if left out.")] = None
    rows: Annotated[
        str | None, _request("Also waves of so many rows of a candidate tree.", metavar="R,…")
    ] = None
    tokens: Annotated[int, _request("Tokens to decode.", min=2)] = 10_000
    prompt_tokens: Annotated[int, _request("Tokens of the prompt.", min=1)] = 1
    seed: Annotated[int, _request("Decides acceptance and jitter.", min=0)] = 0
    jitter: Annotated[float, _request("σ of log-normal noise on times.", min=0.0, max=3.0)] = 0.0


@dataclass
class TimeOptions:
    """What work and messages cost."""

    model: Annotated[
        str | None, _times("Named shape or a config.json; together with --hardware.")
    ] = None
    hardware: Annotated[str | None, _times("h100-nvlink, pcie-consumer, 10gbe or wan.")] = None
    layer_ms: Annotated[float, _times("One layer, one row.")] = 1.0
    head_ms: Annotated[float, _times("One draft by the exit head.")] = 0.0
    lm_head_ms: Annotated[float, _times("LM head, one row.")] = 0.0
    hop_ms: Annotated[float, _times("Latency of a message.")] = 0.0
    overhead_ms: Annotated[float, _times("Sender's own work for a message.")] = 0.0
    row_cost: Annotated[float, _times("Each further row of a block; 1 is as much again.")] = 0.0

    def costs(self, layers: int) -> tuple[BuildCost, int]:
        """Return how a split's cost is built, and the number of layers."""
        from ppsd.lab.pipelines import predict, uniform
        from ppsd.plan.model import Link
        from ppsd.plan.presets import find_hardware, find_shape

        if self.model is not None and self.hardware is not None:
            shape = find_shape(self.model)
            build = functools.partial(predict, shape, find_hardware(self.hardware))
            return build, shape.sizes.layers
        if self.model is not None or self.hardware is not None:
            raise ConfigError("model", self.model, "given together with --hardware")
        build = functools.partial(
            uniform,
            layer=self.layer_ms / 1e3,
            link=Link(self.hop_ms / 1e3),
            head=self.head_ms / 1e3,
            lm_head=self.lm_head_ms / 1e3,
            overhead=self.overhead_ms / 1e3,
            row_cost=self.row_cost,
            cancel=self.hop_ms / 1e3,  # a cancel is a message too
        )
        return build, layers


@dataclass
class OutputOptions:
    """Where results go."""

    sweep: Annotated[str | None, _output("Vary alpha, exit, hop or stages.")] = None
    csv: Annotated[Path | None, _output("Write all columns here.")] = None
    plot: Annotated[Path | None, _output("Plot the sweep to this file.")] = None
    gantt: Annotated[
        Path | None, _output("Directory for gantt.png and a Perfetto trace of each mode.")
    ] = None
    as_json: Annotated[bool, _output("Print one JSON object.", "--json")] = False


def simulate(scenario: ScenarioOptions, times: TimeOptions, output: OutputOptions) -> None:
    """Predict plain, draft-then-verify and PPSD decoding for given times, or for a preset."""
    from ppsd.lab import plot, sweep

    if output.sweep == "exit" and scenario.stages == 1:
        raise ConfigError("sweep", output.sweep, "alpha, hop or stages with one stage")
    if output.plot and not output.sweep:
        raise ConfigError("plot", str(output.plot), "used together with --sweep")
    chosen = _scenario(scenario, times)
    rows = sweep.sweep(chosen, output.sweep) if output.sweep else sweep.compare(chosen)
    source = chosen.cost().source
    if output.csv:
        sweep.write_csv(rows, output.csv)
    if output.plot and output.sweep:
        plot.plot_sweep(rows, output.sweep, source.partition(" (")[0], output.plot)
    if output.gantt:
        _write_gantt(chosen, output.gantt)
    if output.as_json:
        print(json.dumps({"source": source, "rows": rows}))
    else:
        _show(rows, source)


def _scenario(options: ScenarioOptions, times: TimeOptions) -> Scenario:
    from ppsd.lab.sweep import Scenario

    build, layers = times.costs(options.layers)
    if options.stages == 1:
        for name in ("exit_layer", "rows"):
            if (value := getattr(options, name)) is not None:
                raise ConfigError(name, value, "left out with one stage, which drafts nothing")
    return Scenario(
        build=build,
        layers=layers,
        stages=options.stages,
        exit_layer=options.exit_layer,
        alphas=_alphas(options.alpha),
        recorded=None if options.trace is None else _recorded(options.trace),
        tokens=options.tokens,
        seed=options.seed,
        block=options.block,
        in_flight=options.in_flight,
        jitter=options.jitter,
        prompt_tokens=options.prompt_tokens,
        rows=_rows(options.rows),
    )


def _rows(text: str | None) -> tuple[int, ...]:
    rows = integers("rows", text) if text else ()
    if not all(1 <= count <= MAX_ROWS for count in rows):
        raise ConfigError("rows", text, f"numbers of rows in [1, {MAX_ROWS}]")
    return rows


def _alphas(text: str) -> tuple[tuple[int, float], ...]:
    """Read ``0.8`` or ``8:0.49,15:0.53``."""
    try:
        if ":" not in text:
            return ((0, float(text)),)
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(exit_layer), float(alpha)) for exit_layer, alpha in pairs)
    except ValueError:
        raise ConfigError("alpha", text, "a rate such as 0.8, or pairs like 8:0.5,15:0.6") from None


def _recorded(path: Path) -> tuple[float, ...]:
    try:
        if hits := tuple(float(hit) for hit in json.loads(path.read_text())):
            return hits
        raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, RecursionError):
        raise ConfigError("trace", str(path), "a file with a JSON list of 0 and 1") from None


def _write_gantt(scenario: Scenario, directory: Path) -> None:
    from ppsd.engine.trace import TraceLog
    from ppsd.lab.plot import plot_gantt
    from ppsd.speculation.policy import MODES

    short = replace(scenario, tokens=min(scenario.tokens, GANTT_TOKENS))
    cost = short.cost()
    directory.mkdir(parents=True, exist_ok=True)
    runs = {mode: short.run(mode, cost, trace=True) for mode in MODES}
    for mode, run in runs.items():
        log = TraceLog()
        log.add(run.reports())
        log.write(directory / f"{mode}.json", cost.bounds)
    plot_gantt(runs, directory / "gantt.png")


def _show(rows: Sequence[Row], source: str) -> None:
    table = Table(*PRINTED.values(), box=None)
    for row in rows:
        cells = ["–" if row[name] is None else str(row[name]) for name in PRINTED]
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Simulated, not measured; times: {source}")
