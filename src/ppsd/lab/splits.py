"""Every split tried on this machine: is the one that was planned the best?

Drafts are an oracle's, right as often as a curve over exit layers says and free, which the planner
is told too; so the comparison is about times, not about heads. Each run is compared with plain
decoding on the same pipeline right before it: that takes as long whatever the split, and a
machine's pace may change within a minute by more than splits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import numpy as np

from ppsd.engine.llm import LLM
from ppsd.lab.oracle import OracleBench, Variant
from ppsd.lab.runner import PLAIN, Cell, Measurement, Results, Spread, spread
from ppsd.measure.workload import Task
from ppsd.plan.planner import Exit, Plan, Problem, alternatives

REACH = 6  # layers around the planned split that a parabola describes
RESAMPLES = 500

Opener = Callable[[Plan], AbstractContextManager[LLM]]


def exits_along(rates: Mapping[int, float]) -> tuple[Exit, ...]:
    """Return an exit at every layer from the first to the last of ``rates``, linear in between."""
    known = sorted(rates)
    layers = range(known[0], known[-1] + 1)
    alphas = np.interp(layers, known, [rates[layer] for layer in known]).tolist()
    return tuple(Exit(layer, alpha, 0.0) for layer, alpha in zip(layers, alphas, strict=True))


def trials(problem: Problem) -> dict[str, Plan]:
    """Return PPSD at every split, the planner's choice first, by name."""
    wanted = replace(problem, mode="ppsd", block=1)
    return {_name(plan): plan for plan in alternatives(wanted, every_split=True)}


def _name(plan: Plan) -> str:
    return "split " + ",".join(map(str, plan.bounds[1:-1]))


class SplitBench:
    """Measures trials, each on a pipeline that ``opened`` cuts for it; ``close`` closes the last.

    The oracle learns the plain output once: it is the same however the model is cut.
    """

    def __init__(
        self, opened: Opener, trials: Mapping[str, Plan], tasks: Sequence[Task], tokens: int
    ) -> None:
        self._opened = opened
        self._trials = trials
        self._tasks = tasks
        self._tokens = tokens
        self._plain: dict[str, list[int]] = {}
        self._here = ""
        self._stack = ExitStack()

    def measure(self, cell: Cell) -> Measurement:
        """Run one request on the pipeline of the cell's trial, plainly and by PPSD."""
        plan = self._trials[cell.variant]
        assert plan.exit is not None, "trials draft"
        variant = Variant("ppsd", in_flight=plan.schedule.in_flight, alpha=plan.exit.alpha)
        if cell.variant != self._here:
            self.close()
            llm = self._stack.enter_context(self._opened(plan))
            both = (Variant("autoregressive"), variant)
            self._bench = OracleBench(llm, both, self._tasks, self._tokens, self._plain)
            self._bench.measure(cell._replace(variant=variant.name))  # warms up
            self._here = cell.variant
        names = (PLAIN, variant.name)
        order = reversed(names) if cell.repeat % 2 else names
        runs = {name: self._bench.measure(cell._replace(variant=name)) for name in order}
        details = runs[variant.name].details | {"plain": runs[PLAIN].token_time}
        return replace(runs[variant.name], variant=cell.variant, details=details)

    def close(self) -> None:
        """Close the pipeline that is open; may be called twice."""
        self._here = ""
        self._stack.close()


@dataclass(frozen=True)
class Row:
    """One split; speedups over plain decoding on the same pipeline; ``alpha`` as realised.

    ``token_time`` in seconds; ``error`` of the predicted speedup.
    """

    bounds: tuple[int, ...]
    window: int
    alpha: float
    token_time: float
    predicted: float
    measured: Spread
    error: float


def summarize(results: Results, tried: Mapping[str, Plan]) -> list[Row]:
    """Return one row a split, the planner's choice first; predictions take the α that came out."""
    return [
        _row([m for cell, m in results.measurements.items() if cell.variant == name], plan)
        for name, plan in tried.items()
    ]


def _row(runs: Sequence[Measurement], plan: Plan) -> Row:
    alpha = spread([run.alpha for run in runs]).median
    predicted = plan.speedup_at(alpha)
    measured = spread([run.details["plain"] / run.token_time for run in runs])
    return Row(
        bounds=plan.bounds,
        window=plan.schedule.in_flight,
        alpha=alpha,
        token_time=spread([run.token_time for run in runs]).median,
        predicted=predicted,
        measured=measured,
        error=predicted / measured.median - 1,
    )


def behind_curve(results: Results, tried: Mapping[str, Plan]) -> Spread | None:
    """Return ``behind_best`` by a parabola through all runs near the planned split, for two stages.

    One layer more or less changes little, so neighbours tell about each other: where single medians
    scatter by more than splits differ, the curve does not. Quartiles are of RESAMPLES bootstraps.
    """
    planned, *others = (plan.bounds for plan in tried.values())
    if len(planned) != 3 or len(others) < 2:
        return None
    cuts = {name: plan.bounds[1] - planned[1] for name, plan in tried.items()}
    near = [
        (cuts[cell.variant], math.log(run.details["plain"] / run.token_time))
        for cell, run in results.measurements.items()
        if abs(cuts[cell.variant]) <= REACH
    ]
    points = np.array(near)
    grid = np.unique(points[:, 0])
    generator = np.random.default_rng(0)
    found: list[float] = []
    while len(found) < RESAMPLES:
        cut, gain = points[generator.integers(len(points), size=len(points))].T
        if len(np.unique(cut)) > 2:  # a parabola needs three
            curve = np.polyfit(cut, gain, deg=2)
            found.append(float(np.polyval(curve, grid).max() - np.polyval(curve, 0)))
    return spread([math.expm1(loss) for loss in found])


def behind_best(rows: Sequence[Row]) -> float:
    """Return the share that the planner's choice, the first row, is slower than the fastest."""
    return max(row.measured.median for row in rows) / rows[0].measured.median - 1
