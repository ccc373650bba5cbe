"""The simulator against the engine: the same schedule, stage times and acceptances, two clocks.

For each request the cost model is built from the times that its own stages needed, with the links
as plain decoding of the same repeat shows them; the simulator then runs the real policy over the
request's own trace of accepted drafts. What is compared is the time per token after the first.
With profiles (``profiled``) nothing is taken from the run but that trace, and what the oracle
takes for a draft, as it is no part of a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ppsd.errors import PpsdError
from ppsd.lab.efficiency import alone
from ppsd.lab.oracle import Variant
from ppsd.lab.runner import PLAIN, Measurement, Results, Spread, pairs, spread
from ppsd.lab.simulator import simulate
from ppsd.plan.model import MIN_LAYER, CostModel, Link, StageCost
from ppsd.plan.planner import Exit, Problem, cost_model
from ppsd.plan.profile import Profile
from ppsd.speculation.policy import Schedule
from ppsd.worker.pace import POLL_S

if TYPE_CHECKING:
    from ppsd.config import EngineConfig
    from ppsd.engine.layout import Layout

ALPHAS = (0.8, 0.5)


@dataclass(frozen=True)
class Shape:
    """What the simulator must know of a pipeline beyond times.

    ``layers`` by stage: how often each looks for a cancel during a block; ``head_layers``: the LM
    head's work in layers of the last stage.
    """

    layers: tuple[int, ...]
    head_layers: float


def shape_of(layout: Layout, config: EngineConfig) -> Shape:
    """Return the shape of a pipeline; a paced stage looks for a cancel every POLL_S."""
    spec = layout.spec
    layers = tuple(b - a for a, b in pairwise(layout.bounds))
    head_layers = spec.head_parameters / spec.layer_parameters
    if not config.pace:
        return Shape(layers, head_layers)
    looks = [config.pace_of(rank) / POLL_S for rank in range(len(layers))]
    share = layers[-1] / (layers[-1] + head_layers)
    looks[-1] *= share
    return Shape(tuple(max(1, round(n)) for n in looks), looks[-1] * (1 / share - 1))


def variants(alphas: Sequence[float], block: int) -> list[Variant]:
    """Return the three modes, the drafting ones at each α."""
    drafting = [
        variant
        for alpha in alphas
        for variant in (
            Variant("draft-then-verify", block=block, alpha=alpha),
            Variant("ppsd", alpha=alpha),
        )
    ]
    return [Variant("autoregressive"), *drafting]


def cost_of(run: Measurement, plain: Measurement, shape: Shape) -> CostModel:
    """Build the cost model of one request from its own stage times and the plain one's links."""
    gaps, links = run.details["gaps"], plain.details["gaps"]["links"]
    sending = gaps["sending"] or 0.0
    times, row_cost = row_times(run, plain)
    stages, lm_head = _stage_costs(shape, times)
    return CostModel(
        stages=stages,
        links=tuple(Link(max(0.0, (gap or 0.0) - sending)) for gap in links),
        head=gaps["drafting"] or 0.0,
        lm_head=lm_head,
        row_cost=row_cost,
        overhead=sending,
        source="stage times of the run itself",
    )


def _stage_costs(shape: Shape, times: Sequence[float]) -> tuple[tuple[StageCost, ...], float]:
    """Return stages taking ``times`` a row, the last with its LM head, and the LM head's part."""
    *others, last = times
    lm_head = last * shape.head_layers / (shape.layers[-1] + shape.head_layers)
    costs = tuple(
        StageCost(layers, max(MIN_LAYER, time / layers))
        for layers, time in zip(shape.layers, [*others, last - lm_head], strict=True)
    )
    return costs, lm_head


def row_times(run: Measurement, plain: Measurement) -> tuple[list[float], float]:
    """Return each stage's seconds for one row, and what a further row costs as a share of it.

    Rows enter stage 0 one by one. Later stages see blocks; how much longer these take than the
    plain run's single rows is put down to their rows, in equal parts.
    """
    first, *later = run.details["stages"]
    singles = alone(plain)[1:]
    if "1" not in first or not all(later):
        raise PpsdError("too few tokens to tell the time of a stage; ask for more")
    rows = max(_rows(stage) for stage in later)
    times = [_mean(stage, _rows(stage)) for stage in later]
    if rows == 1:
        return [_mean(first, 1), *times], 0.0
    row_cost = max(0.0, (sum(times) / sum(singles) - 1) / (rows - 1))
    return [_mean(first, 1), *(time / (1 + (rows - 1) * row_cost) for time in times)], row_cost


def _rows(stage: dict[str, Any]) -> int:
    """Return the number of rows that most of a stage's blocks had."""
    return int(max(stage, key=lambda rows: stage[rows]["count"]))


def _mean(stage: dict[str, Any], rows: int) -> float:
    return float(stage[str(rows)]["mean"])


class Account(NamedTuple):
    """What a request is thought to cost; ``jitter``: σ of log-normal noise."""

    cost: CostModel
    jitter: float = 0.0


# A request, the plain one of the same repeat, and a schedule: one or several accounts.
Price = Callable[[Measurement, Measurement, Schedule], Sequence[Account]]


def own_times(shape: Shape) -> Price:
    """Price requests by what their own stages took."""
    return lambda run, plain, schedule: [Account(cost_of(run, plain, shape))]


def profiled(
    bounds: Sequence[int], contexts: Mapping[str, int], pace: Sequence[float], shape: Shape
) -> Price:
    """Price requests by the profiles taken just before and just after them, and their spread.

    They stand in a request's ``details``, as JSON. ``contexts``: cached positions half-way through
    each task. Stages with a ``pace``, in seconds, take that for every block; all else is measured.
    """

    def price(run: Measurement, plain: Measurement, schedule: Schedule) -> list[Account]:
        oracle = Exit(bounds[1], alpha=0.0, draft=run.details["gaps"]["drafting"] or 0.0)
        profiles = map(Profile.from_json, run.details["profiles"])
        problems = [Problem(p, len(bounds) - 1, context=contexts[run.task]) for p in profiles]
        costs = [cost_model(problem, bounds, oracle, schedule) for problem in problems]
        if not pace:
            return [Account(c, p.profile.jitter) for c, p in zip(costs, problems, strict=True)]
        stages, lm_head = _stage_costs(shape, pace)
        return [
            Account(replace(cost, stages=stages, lm_head=lm_head, row_cost=0.0)) for cost in costs
        ]

    return price


def predicted_token_time(
    run: Measurement, plain: Measurement, schedule: Schedule, price: Price
) -> float:
    """Simulate a request, and return its seconds per token, the mean over its accounts."""
    hits = bytes(map(int, run.hits))
    accounts = price(run, plain, schedule)
    return statistics.fmean(
        simulate(cost, schedule, hits, jitter=jitter).token_time for cost, jitter in accounts
    )


@dataclass(frozen=True)
class Row:
    """All repeats of one variant; times in seconds per token; ``error`` is predicted/measured − 1.

    ``median_error`` is the median of its absolute values. ``speedup_error`` is that of
    the speedup over plain decoding, which a change of the machine's pace leaves alone.
    """

    variant: str
    alpha: Spread
    measured: Spread
    predicted: Spread
    error: Spread
    median_error: float
    speedup_error: Spread


def summarize(results: Results, schedules: dict[str, Schedule], price: Price) -> list[Row]:
    """Return one row for each variant that was measured together with plain decoding."""
    return [
        _row(name, partners, schedule, price)
        for name, schedule in schedules.items()
        if (partners := list(pairs(results, name, PLAIN)))
    ]


def _row(
    name: str,
    partners: list[tuple[Measurement, Measurement]],
    schedule: Schedule,
    price: Price,
) -> Row:
    predicted = [predicted_token_time(run, plain, schedule, price) for run, plain in partners]
    measured = [run.token_time for run, _ in partners]
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    plainly = [
        predicted_token_time(p, p, Schedule(1, 1), price) / p.token_time for _, p in partners
    ]
    speedups = [plain / (1 + error) - 1 for plain, error in zip(plainly, errors, strict=True)]
    return Row(
        variant=name,
        alpha=spread([run.alpha for run, _ in partners]),
        measured=spread(measured),
        predicted=spread(predicted),
        error=spread(errors),
        median_error=spread([abs(e) for e in errors]).median,
        speedup_error=spread(speedups),
    )
