"""What candidate trees are predicted to bring: in ticks, beside stages with clocks of their own."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import pytest

from ppsd.errors import ConfigError
from ppsd.lab.pipelines import uniform
from ppsd.lab.simulator import simulate
from ppsd.lab.virtual_waves import simulate_waves
from ppsd.plan.model import Link
from ppsd.plan.planner import Exit, Problem, alternatives
from ppsd.plan.presets import find_shape
from ppsd.plan.profile import estimate
from ppsd.plan.waves import Growth, _drawn, price, shares, wave_token_time
from ppsd.speculation.policy import PLAIN, Schedule
from tests.support.command import ppsd

TOKENS = 120


def same_luck(alpha: float) -> bytes:
    """Return the rank of each token as the planner draws it."""
    limits = list(accumulate(shares(alpha)))
    return bytes(bisect_right(limits, luck) for luck in _drawn(0, TOKENS + 1))


free = Growth(lambda rows: 1.0, lambda rows: 1.0)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_plain_decoding_is_as_simulated_and_requests_fill_the_pipeline(stages: int) -> None:
    cost = uniform([4] * stages, 1e-3)
    plain = simulate(cost, PLAIN, bytes(TOKENS)).token_time
    assert wave_token_time(cost, free, 0, {}) == pytest.approx(plain)
    assert wave_token_time(cost, free, 0, {}, load=stages) == pytest.approx(plain / stages, rel=0.1)
    many = wave_token_time(cost, free, 0, {}, load=3 * stages)
    assert many == pytest.approx(plain / stages / 3, rel=0.1)


def test_waves_take_turns_where_workers_share_cores() -> None:
    own = uniform([4] * 4, 1e-3)
    shared = replace(own, at_once=1)
    waves, turns = (wave_token_time(cost, free, 4, {0: 0.7}) for cost in (own, shared))
    assert turns > 2 * waves
    plain, alone = (wave_token_time(cost, free, 0, {}) for cost in (own, shared))
    assert plain == alone, "no two stages work at once"


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("stages", "alpha"), [(2, 0.67), (4, 0.45), (4, 0.67), (8, 0.67)])
def test_ticks_agree_with_clocks(stages: int, alpha: float, rows: int) -> None:
    """With the same luck; a tick hides when a stage would have gone on by itself."""
    cost = uniform([4] * stages, 1e-3)
    clocks = simulate_waves(cost, rows, same_luck(alpha)).token_time
    assert wave_token_time(cost, free, rows, {0: alpha}) == pytest.approx(clocks, rel=0.06)


@pytest.mark.parametrize("hop", [1e-4, 1e-3, 2e-2])
def test_hops_delay_trees_and_plain_decoding_as_clocks_say(hop: float) -> None:
    cost = uniform([4] * 4, 1e-3, Link(hop, 1e9), row_bytes=8192)
    plain = simulate(cost, PLAIN, bytes(TOKENS)).token_time
    assert wave_token_time(cost, free, 0, {}) == pytest.approx(plain)
    for rows in (1, 4, 16):
        clocks = simulate_waves(cost, rows, same_luck(0.67)).token_time
        assert wave_token_time(cost, free, rows, {0: 0.67}) == pytest.approx(clocks, rel=0.06)


def test_an_lm_head_takes_longer_for_many_rows_as_it_was_timed() -> None:
    cost = replace(uniform([4] * 4, 1e-3), lm_head=3e-3)  # the last stage is the slowest
    grown = free._replace(lm_head=lambda rows: min(rows, 2.0))
    many = 4, {0: 0.7}, 8  # rows, heads and requests
    slower = wave_token_time(cost, grown, *many)
    assert wave_token_time(cost, free, *many) < slower
    assert slower <= wave_token_time(replace(cost, lm_head=6e-3), free, *many)


def test_rows_that_cost_bring_less_and_heads_on_the_way_bring_more() -> None:
    cost = uniform([4] * 4, 1e-3)
    alone = wave_token_time(cost, free, 16, {0: 0.5})
    assert wave_token_time(cost, free._replace(layer=float), 16, {0: 0.5}) > alone
    assert wave_token_time(cost, free, 16, {0: 0.5, 1: 0.8}) < alone


def test_costly_rows_are_not_fed() -> None:
    """Where a second row doubles the time, sixteen allowed rows are one or two."""
    cost = uniform([4] * 4, 1e-3)
    one = wave_token_time(cost, free._replace(layer=float), 1, {0: 0.8})
    assert wave_token_time(cost, free._replace(layer=float), 16, {0: 0.8}) < 1.1 * one


def test_a_rate_is_a_rate() -> None:
    assert sum(shares(1.0)) == 1.0
    with pytest.raises(ConfigError, match="alpha must be a rate"):
        shares(1.5)


def test_plan_names_rows_and_answers_for_a_load() -> None:
    options = [
        "--model",
        "vicuna-7b",
        "--hardware",
        "h100-nvlink",
        "--workers",
        "4",
        "--alpha",
        "8:0.7,17:0.8",
    ]
    one = json.loads(ppsd("plan", *options, "--json").stdout)["waves"]
    assert [way["rows"] for way in one] == [1, 4, 16]
    assert one[-1]["speedup"] > max(way["speedup"] for way in one[:-1])  # there rows are free
    many = json.loads(ppsd("plan", *options, "--load", 4, "--json").stdout)["waves"]
    assert many[-1]["tokens_per_second"] > one[-1]["tokens_per_second"]
    assert many[-1]["speedup"] < one[-1]["speedup"]  # plain decoding fills the pipeline, too
    text = ppsd("plan", *options, "--load", 4).stdout
    assert "Candidate trees for 4 requests at once (--concurrent 4): --split " in text


def test_plan_counts_hops_of_trees() -> None:
    options = ["--model", "vicuna-7b", "--hardware", "wan", "--workers", "4", "--alpha", "8:0.8"]
    near, far = (
        json.loads(ppsd("plan", *options, "--link-ms", ms, "--json").stdout)["waves"]
        for ms in ("0", "1000")
    )
    for quick, slow in zip(near, far, strict=True):
        assert quick["tokens_per_second"] > 10 > slow["tokens_per_second"]


def test_plan_without_heads_says_nothing_of_trees() -> None:
    options = ["--model", "vicuna-7b", "--hardware", "h100-nvlink", "--workers", "4"]
    assert json.loads(ppsd("plan", *options, "--json").stdout)["waves"] == []


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_one_row_is_a_chain_to_which_theory_agrees(stages: int, alpha: float) -> None:
    """Of heads that are right less often one row a tick does better: it may be a second choice."""
    cost = uniform([4] * stages, 1e-3)
    plain, chain = (wave_token_time(cost, free, rows, {0: alpha}) for rows in (0, 1))
    theory = float(cost.speedup(alpha, Schedule(1, stages)))
    assert plain / chain == pytest.approx(theory, rel=0.06)


def test_a_later_candidate_is_never_likelier_and_bad_heads_bring_nothing() -> None:
    for alpha in (0.0, 0.05, 0.2, 0.35, 0.9, 1.0):
        found = shares(alpha)
        assert found == sorted(found, reverse=True)
        assert sum(found) <= 1 + 1e-12
    cost = uniform([4] * 4, 1e-3)
    plain, trees = (wave_token_time(cost, free, rows, {0: 0.0}) for rows in (0, 16))
    assert trees == pytest.approx(plain, rel=0.01)


def test_of_two_heads_at_a_later_boundary_the_better_one_counts() -> None:
    profile = estimate(find_shape("smollm2-135m").sizes)
    draft = profile.head_time(1, 8192) / 4
    first, good, bad = (Exit(4, 0.45, draft), Exit(8, 0.75, draft), Exit(8, 0.3, draft / 8))
    cuts = (4, 8, 13, 18, 22, 26, 29)
    problems = [
        Problem(profile, 8, exits, split=cuts) for exits in ((first, good), (first, good, bad))
    ]
    one, both = (price(problem, alternatives(problem), 1) for problem in problems)
    assert one == both
    assert {way.heads for way in both} == {"auto"}
