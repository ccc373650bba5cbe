"""``ppsd-lab splits``: what is tried, what is compared, and a run over a tiny model."""

from __future__ import annotations

import json
import math

import pytest

from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab import splits
from ppsd.lab.cli.oracle import BenchOptions
from ppsd.lab.cli.splits import _problem
from ppsd.lab.runner import Measurement, Results
from ppsd.plan.planner import Problem, alternatives
from ppsd.plan.profile import estimate
from ppsd.plan.sizes import Sizes
from tests.support.command import lab

SIZES = Sizes(layers=6, hidden=64, inner=96, vocabulary=1000, layer=50_000, cached=64,
              lm_head=150_000, tied=True)  # fmt: skip
RATES = {1: 0.2, 3: 0.6, 5: 0.7}


def problem(stages: int = 2) -> Problem:
    return Problem(estimate(SIZES), stages, splits.exits_along(RATES))


def test_rates_are_linear_between_the_exits_given() -> None:
    exits = splits.exits_along(RATES)
    assert [e.layer for e in exits] == [1, 2, 3, 4, 5]
    assert [e.alpha for e in exits] == pytest.approx([0.2, 0.4, 0.6, 0.65, 0.7])


@pytest.mark.parametrize(("stages", "count"), [(2, 5), (3, 10)])
def test_every_split_is_tried_the_planned_one_first(stages: int, count: int) -> None:
    tried = splits.trials(problem(stages))
    assert len({plan.bounds for plan in tried.values()}) == len(tried) == count
    assert all(plan.exit and plan.exit.layer == plan.bounds[1] for plan in tried.values())
    drafting = [p for p in alternatives(problem(stages)) if p.exit and p.bitwise]
    assert next(iter(tried.values())).bounds == drafting[0].bounds


def run(name: str, repeat: int, seconds: float) -> Measurement:
    """A repeat in which everything takes (repeat + 1) times as long, plain decoding 20 s."""
    pace, counts = repeat + 1, {"judged": 10, "accepted": 5}
    return Measurement(
        name, "x", repeat, 10, pace * seconds, 1.0, counts, "", {"plain": pace * 2.0}
    )


def test_the_planned_split_is_compared_with_the_fastest_median() -> None:
    tried = splits.trials(problem())
    results = Results(None, {}, {})
    for i, name in enumerate(tried):
        for repeat, extra in enumerate((0.0, 0.5, 90.0)):  # one repeat of each is disturbed
            results.add(run(name, repeat, 10.0 + abs(i - 2) + extra))
    rows = splits.summarize(results, tried)
    assert [row.measured.median for row in rows[:3]] == pytest.approx(
        [2 / t for t in (1.25, 1.15, 1.05)]
    )
    assert splits.behind_best(rows) == pytest.approx(1.25 / 1.05 - 1)
    for row, plan in zip(rows, tried.values(), strict=True):
        assert row.predicted == plan.plain_time / float(plan.cost.token_time(0.5, plan.schedule))
        assert row.error == pytest.approx(row.predicted / row.measured.median - 1)


def test_a_curve_through_all_runs_sees_through_noise() -> None:
    """Speedups fall off on both sides of a split next to the planned one; single runs are off."""
    tried = splits.trials(problem())
    planned, *_ = tried.values()
    best = planned.bounds[1] - 1
    results = Results(None, {}, {})
    for name, plan in tried.items():
        for repeat in range(40):
            noise = 0.05 * (-1) ** repeat
            away = plan.bounds[1] - best
            results.add(run(name, repeat, 10 * math.exp(0.02 * away**2 + noise)))
    curve = splits.behind_curve(results, tried)
    assert curve is not None
    assert curve.median == pytest.approx(math.expm1(0.02), rel=0.3)
    assert curve.low <= curve.median <= curve.high
    assert splits.behind_curve(results, splits.trials(problem(3))) is None


def test_a_run_is_continued_and_shown_both_ways(tiny_model, tmp_path) -> None:
    pipeline = f"--model {tiny_model()} --stages 2 --dtype float64 --transport inprocess"
    flags = [*pipeline.split(), "--alpha", "1:0.2,5:0.8", "--tokens", 6, "--repeats", 2]
    flags += ["--out", tmp_path / "m.jsonl"]
    found = lab("splits", *flags, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert sorted(row["bounds"][1] for row in record["rows"]) == [1, 2, 3, 4, 5]
    assert record["behind_best"] >= 0
    assert record["behind_curve"]["median"] >= 0
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 1 + 5 * 2
    shown = lab("splits", *flags).stdout
    assert f"the planned split takes {record['behind_best']:.1%} longer" in shown
    assert shown.startswith("ORACLE drafts")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--alpha", "0:0.5"], "alpha"),
        (["--alpha", "half"], "alpha"),
        (["--alpha", "2:0.5", "--stages", "1"], "stages"),
    ],
)
def test_what_it_refuses(tiny_model, arguments, field) -> None:
    stages = [] if "--stages" in arguments else ["--stages", "2"]
    error = lab("splits", "--model", tiny_model(), *stages, *arguments).exception
    assert isinstance(error, ConfigError)
    assert error.field == field


def test_the_planned_split_is_that_of_so_many_cores(tiny_model, monkeypatch) -> None:
    """Three stages on two cores take turns, which decides where to cut."""
    monkeypatch.setattr("ppsd.engine.choose._at_once", lambda config: 2)
    config = EngineConfig(str(tiny_model()), stages=3, transport="inprocess")
    assert _problem(config, BenchOptions(), {3: 0.6}).at_once == 2
