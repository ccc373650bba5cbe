"""The simulator against the engine: the same schedule, stage times and acceptances, two clocks.

For each request the cost model is built from the times that its own stages needed, with the links
as plain decoding of the same repeat shows them; the simulator then runs the real policy over the
request's own trace of accepted drafts. What is compared is the time per token after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ppsd.bench.oracle import PLAIN, Variant
from ppsd.bench.runner import Measurement, Results, Spread, pairs, spread
from ppsd.cost.model import MIN_LAYER, CostModel, Link, StageCost
from ppsd.cost.simulator import simulate
from ppsd.errors import PpsdError
from ppsd.speculation.policy import Schedule
from ppsd.worker.pace import POLL_S

if TYPE_CHECKING:
    from ppsd.config import EngineConfig
    from ppsd.engine.build import Layout

ALPHAS = (0.8, 0.5)
SEEDS = 5  # simulations with jitter are averaged over so many


@dataclass(frozen=True)
class Shape:
    """What the simulator must know of a pipeline beyond times.

    ``layers`` by stage: how often each looks for a cancel during a block; ``head_layers``: the LM
    head's work in layers of the last stage.
    """

    layers: tuple[int, ...]
    head_layers: float


def shape_of(layout: Layout, config: EngineConfig) -> Shape:
    """The shape of a pipeline; a paced stage looks for a cancel every POLL_S, not every layer."""
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
    """The three modes, the drafting ones at each α."""
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
    rows = [_rows(stage) for stage in run.details["stages"]]
    first = _mean(run.details["stages"][0], 1)
    later = [_mean(s, n) for s, n in zip(run.details["stages"][1:], rows[1:], strict=True)]
    most = max(rows[1:])
    alone = [_mean(stage, 1) for stage in plain.details["stages"][1:]]
    growth = sum(later) / sum(alone)
    row_cost = max(0.0, (growth - 1) / (most - 1)) if most > 1 else 0.0
    single = [time / (1 + (most - 1) * row_cost) for time in later]
    *middle, last = [first, *single]
    share = shape.layers[-1] / (shape.layers[-1] + shape.head_layers)
    times = [*middle, last * share]
    return CostModel(
        stages=tuple(
            StageCost(layers, max(MIN_LAYER, time / layers))
            for layers, time in zip(shape.layers, times, strict=True)
        ),
        links=tuple(Link(max(0.0, (gap or 0.0) - sending)) for gap in links),
        head=max(0.0, gaps["drafting"] or 0.0),
        lm_head=last * (1 - share),
        row_cost=row_cost,
        overhead=sending,
        source="stage times of the run itself",
    )


def _rows(stage: dict[str, Any]) -> int:
    """The number of rows that most of a stage's blocks had."""
    if not stage:
        raise PpsdError("too few tokens to tell the time of a stage; ask for more")
    return int(max(stage, key=lambda rows: stage[rows]["count"]))


def _mean(stage: dict[str, Any], rows: int) -> float:
    return float(stage[str(rows)]["mean"])


def jitter_of(run: Measurement) -> float:
    """σ of the logarithm of stage times in one request: root mean square over the stages."""
    found = [s[str(_rows(s))]["sigma"] ** 2 for s in run.details["stages"]]
    return float((sum(found) / len(found)) ** 0.5)


def predicted_token_time(
    run: Measurement, plain: Measurement, shape: Shape, schedule: Schedule
) -> float:
    """Seconds per token that the simulator expects of a request."""
    cost, hits = cost_of(run, plain, shape), bytes(map(int, run.hits))
    sigma = jitter_of(run)
    times = [
        simulate(cost, schedule, hits, jitter=sigma, seed=seed).token_time for seed in range(SEEDS)
    ]
    return sum(times) / len(times)


@dataclass(frozen=True)
class Row:
    """All repeats of one variant; times in seconds per token; ``error`` is predicted/measured − 1.

    ``median_error`` is the median of its absolute values.
    """

    variant: str
    alpha: Spread
    measured: Spread
    predicted: Spread
    error: Spread
    median_error: float


def summarize(results: Results, schedules: dict[str, Schedule], shape: Shape) -> list[Row]:
    """One row for each variant that was measured together with plain decoding."""
    return [
        _row(name, partners, schedule, shape)
        for name, schedule in schedules.items()
        if (partners := list(pairs(results, name, PLAIN)))
    ]


def _row(
    name: str,
    partners: list[tuple[Measurement, Measurement]],
    schedule: Schedule,
    shape: Shape,
) -> Row:
    predicted = [predicted_token_time(run, plain, shape, schedule) for run, plain in partners]
    measured = [run.token_time for run, _ in partners]
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    return Row(
        variant=name,
        alpha=spread([run.alpha for run, _ in partners]),
        measured=spread(measured),
        predicted=spread(predicted),
        error=spread(errors),
        median_error=spread([abs(e) for e in errors]).median,
    )
