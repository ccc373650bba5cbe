"""Every split tried on this machine: is the one that was planned the best?

Imported by cli/. Drafts are an oracle's, right as often as a curve over exit layers says and free,
which the planner is told too; so the comparison is about times, not about heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import numpy as np

from ppsd.bench.oracle import OracleBench, Variant
from ppsd.bench.runner import Cell, Measurement, Results, Spread, spread
from ppsd.bench.workload import Task
from ppsd.cost.planner import Exit, Plan, Problem, alternatives
from ppsd.engine.llm import LLM

Opener = Callable[[Plan], AbstractContextManager[LLM]]


def exits_along(rates: Mapping[int, float]) -> tuple[Exit, ...]:
    """An exit at every layer from the first to the last of ``rates``, linear in between."""
    known = sorted(rates)
    layers = range(known[0], known[-1] + 1)
    alphas = np.interp(layers, known, [rates[layer] for layer in known]).tolist()
    return tuple(Exit(layer, alpha, 0.0) for layer, alpha in zip(layers, alphas, strict=True))


def trials(problem: Problem) -> dict[str, Plan]:
    """PPSD at every split, the planner's choice first, by name."""
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
        """Run one request on the pipeline of the cell's trial."""
        plan = self._trials[cell.variant]
        assert plan.exit is not None, "trials draft"
        variant = Variant("ppsd", in_flight=plan.schedule.in_flight, alpha=plan.exit.alpha)
        if cell.variant != self._here:
            self.close()
            llm = self._stack.enter_context(self._opened(plan))
            self._bench = OracleBench(llm, [variant], self._tasks, self._tokens, self._plain)
            self._here = cell.variant
        measured = self._bench.measure(cell._replace(variant=variant.name))
        return replace(measured, variant=cell.variant)

    def close(self) -> None:
        """Close the pipeline that is open; may be called twice."""
        self._here = ""
        self._stack.close()


@dataclass(frozen=True)
class Row:
    """One split; times in seconds per token; ``alpha`` as realised; ``error`` of the prediction."""

    bounds: tuple[int, ...]
    window: int
    alpha: float
    predicted: float
    measured: Spread
    error: float


def summarize(results: Results, tried: Mapping[str, Plan]) -> list[Row]:
    """One row a split, the planner's choice first; predictions are for the α that came out."""
    return list(_rows(results, tried))


def _rows(results: Results, tried: Mapping[str, Plan]) -> Iterator[Row]:
    for name, plan in tried.items():
        runs = [m for cell, m in results.measurements.items() if cell.variant == name]
        measured = spread([run.token_time for run in runs])
        alpha = spread([run.alpha for run in runs]).median
        predicted = float(plan.cost.token_time(alpha, plan.schedule))
        window, error = plan.schedule.in_flight, predicted / measured.median - 1
        yield Row(plan.bounds, window, alpha, predicted, measured, error)


def behind_best(rows: Sequence[Row]) -> float:
    """How much longer the planner's choice, the first row, takes than the fastest, as a share."""
    return rows[0].measured.median / min(row.measured.median for row in rows) - 1
