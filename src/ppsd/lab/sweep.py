"""Sweeps of the simulator over one quantity: rows of plain numbers for CSV files and plots."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppsd.errors import ConfigError
from ppsd.lab.pipelines import even_split
from ppsd.lab.simulator import Simulated, acceptance, simulate
from ppsd.lab.virtual_waves import ranks, simulate_waves
from ppsd.plan import theory
from ppsd.plan.model import CostModel
from ppsd.speculation.policy import MODES, Schedule, schedule_for

AXES = ("alpha", "exit", "hop", "stages")
ALPHAS = tuple(i / 20 for i in range(21))
HOPS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # seconds

Row = dict[str, Any]
BuildCost = Callable[[Sequence[int]], CostModel]  # layers of each stage → their cost


@dataclass(frozen=True)
class Scenario:
    """What is simulated: a way to build the cost of any split, and the request.

    ``alphas`` holds (exit layer, α) points between which α is interpolated; one point is a
    constant; ``recorded`` acceptances take their place. ``block`` and ``in_flight`` override the
    modes' own; ``jitter`` is σ of log-normal noise. Waves of each number of ``rows`` are simulated,
    too.
    """

    build: BuildCost
    layers: int
    stages: int
    exit_layer: int | None
    alphas: tuple[tuple[int, float], ...]
    tokens: int
    seed: int = 0
    block: int | None = None
    in_flight: int | None = None
    jitter: float = 0.0
    prompt_tokens: int = 1
    recorded: tuple[float, ...] | None = None
    rows: tuple[int, ...] = ()

    def cost(self) -> CostModel:
        """Return the cost of this scenario's split."""
        return self.build(even_split(self.layers, self.stages, self.exit_layer))

    def alpha(self, exit_layer: int) -> float:
        """Return α of an exit head after ``exit_layer``, constant beyond the outermost points."""
        if self.recorded is not None:
            judged = max(1, self.tokens - 1)  # the last token is never drafted
            return float(np.resize(self.recorded, judged).mean())
        exits, rates = zip(*sorted(self.alphas), strict=True)
        return float(np.interp(exit_layer, exits, rates))

    def schedule(self, mode: str) -> Schedule:
        """Return the mode's schedule for this many stages."""
        if mode == "autoregressive":
            return schedule_for(mode, self.stages)
        in_flight = self.in_flight if mode == "ppsd" else None
        block = self.block if mode == "draft-then-verify" or self.in_flight else None
        return schedule_for(mode, self.stages, block, in_flight)

    def run(self, mode: str, cost: CostModel, *, trace: bool = False) -> Simulated:
        """Simulate one mode; the same positions are accepted in all of them."""
        rates = self.recorded or self.alpha(cost.exit_layer)
        hits = acceptance(rates, self.tokens, self.seed)
        return simulate(
            cost,
            self.schedule(mode),
            hits,
            prompt_tokens=self.prompt_tokens,
            jitter=self.jitter,
            seed=self.seed,
            trace=trace,
        )


def compare(scenario: Scenario, cost: CostModel | None = None) -> list[Row]:
    """Simulate every mode: times, speedup over plain decoding, and what theory says."""
    cost = cost or scenario.cost()
    alpha = scenario.alpha(cost.exit_layer)
    runs = {mode: scenario.run(mode, cost) for mode in MODES}
    plain = runs["autoregressive"].token_time
    found = [_row(mode, scenario, cost, alpha, run, plain) for mode, run in runs.items()]
    if cost.size > 1:
        found += [_waves(count, scenario, cost, alpha, plain) for count in scenario.rows]
    return found


def _waves(rows: int, scenario: Scenario, cost: CostModel, alpha: float, plain: float) -> Row:
    """Simulate waves of a head whose first candidate is right with probability ``alpha``."""
    run = simulate_waves(
        cost,
        rows,
        ranks(alpha, scenario.tokens, scenario.seed),
        prompt_tokens=scenario.prompt_tokens,
        jitter=scenario.jitter,
        seed=scenario.seed,
    )
    row = _row("ppsd", scenario, cost, alpha, run, plain)
    theirs = {"mode": f"ppsd rows={rows}", "model_speedup": None, "paper_speedup": None}
    return row | theirs  # theory knows chains alone


def _row(
    mode: str, scenario: Scenario, cost: CostModel, alpha: float, run: Simulated, plain: float
) -> Row:
    schedule = scenario.schedule(mode)
    paper = float(theory.paper_speedup(alpha, cost.layers, cost.exit_layer))
    return {
        "mode": mode,
        "block": schedule.block,
        "in_flight": schedule.in_flight,
        "stages": cost.size,
        "exit_layer": cost.exit_layer,
        "alpha": round(alpha, 6),
        "hop_ms": round(cost.links[0].latency * 1e3, 6) if cost.links else 0.0,
        "ms_per_token": round(run.token_time * 1e3, 6),
        "tokens_per_second": round(1 / run.token_time, 2),
        "speedup": round(plain / run.token_time, 3),
        "model_speedup": round(float(cost.speedup(alpha, schedule)), 3),
        "paper_speedup": round(paper, 3) if mode == "ppsd" else None,
        "busy_share": " ".join(f"{busy / run.seconds:.3f}" for busy in run.busy),
    }


def sweep(scenario: Scenario, axis: str) -> list[Row]:
    """Run ``compare`` at many values of ``axis``: ``alpha``, ``exit``, ``hop`` or ``stages``."""
    variants = {"alpha": _alphas, "exit": _exits, "hop": _hops, "stages": _stages}
    if axis not in variants:
        raise ConfigError("sweep", axis, "one of " + ", ".join(AXES))
    if axis == "alpha" and scenario.recorded is not None:
        raise ConfigError("sweep", axis, "another axis with recorded drafts, which have their α")
    return [row for variant, cost in variants[axis](scenario) for row in compare(variant, cost)]


def _alphas(scenario: Scenario) -> list[tuple[Scenario, CostModel]]:
    cost = scenario.cost()
    return [(replace(scenario, alphas=((0, alpha),)), cost) for alpha in ALPHAS]


def _exits(scenario: Scenario) -> list[tuple[Scenario, CostModel]]:
    """Try every exit layer that leaves each further stage a layer, at the same number of stages."""
    last = scenario.layers - scenario.stages + 1
    variants = [replace(scenario, exit_layer=exit_layer) for exit_layer in range(1, last + 1)]
    return [(variant, variant.cost()) for variant in variants]


def _hops(scenario: Scenario) -> list[tuple[Scenario, CostModel]]:
    cost = scenario.cost()

    def with_hop(seconds: float) -> CostModel:
        links = tuple(replace(link, latency=seconds) for link in cost.links)
        return replace(cost, links=links, cancel=seconds)  # a cancel is a message too

    return [(scenario, with_hop(seconds)) for seconds in HOPS]


def _stages(scenario: Scenario) -> list[tuple[Scenario, CostModel]]:
    """Try 1, 2, 3, … up to 16 even stages; the exit layer is then the end of the first."""
    counts = range(1, min(16, scenario.layers) + 1)
    variants = [replace(scenario, stages=count, exit_layer=None) for count in counts]
    return [(variant, variant.cost()) for variant in variants]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows of equal keys with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
