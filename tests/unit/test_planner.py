"""The planner against brute force, and what it says about odd workers, links and heads."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd.errors import ConfigError
from ppsd.plan import theory
from ppsd.plan.model import Link
from ppsd.plan.planner import (
    Exit,
    Plan,
    Problem,
    alternatives,
    check_split,
    choose,
    cost_model,
    plain_cost,
)
from ppsd.plan.profile import LayerTime, RowsTime, Timing, estimate
from ppsd.plan.sizes import Sizes
from ppsd.speculation.policy import PLAIN, Schedule

SIZES = Sizes(layers=9, hidden=64, inner=96, vocabulary=1000, layer=50_000, cached=64,
              lm_head=150_000, tied=True)  # fmt: skip
PROFILE = estimate(SIZES)


def exits(*pairs: tuple[int, float], draft: float = 3e-6) -> tuple[Exit, ...]:
    return tuple(Exit(layer, alpha, draft) for layer, alpha in pairs)


def undelayed(plan: Plan) -> float:
    """Token time without the wait for stage 0's layer to end, which is no monotonous function."""
    m, w = plan.schedule.block, plan.schedule.in_flight
    alpha = plan.exit.alpha if plan.exit else 0.0
    return float(theory.token_time(alpha, m, w, plan.cost.tick(m), plan.cost.latency(m)))


@settings(deadline=None, max_examples=60)
@given(
    workers=st.integers(2, 5),
    alpha=st.floats(0, 1),
    layer=st.integers(1, 5),
    draft=st.floats(0, 2e-4),
    hop=st.sampled_from([0.0, 1e-5, 1e-3]),
    data=st.data(),
)
def test_no_split_is_better_than_the_chosen_one(
    workers: int, alpha: float, layer: int, draft: float, hop: float, data: st.DataObject
) -> None:
    speeds = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 2.5]), min_size=workers, max_size=workers)
    )
    problem = Problem(
        PROFILE,
        workers,
        (Exit(layer, alpha, draft),),
        speeds=tuple(speeds),
        links=(Link(hop),) * workers,
        mode="ppsd",
        in_flight=2 * workers,
    )
    every = alternatives(problem, every_split=True)
    best = min(undelayed(plan) for plan in every)
    found = alternatives(problem)
    assert len(found) == 1
    assert min(undelayed(plan) for plan in _candidates(problem)) <= best * (1 + 1e-9)
    if len(set(speeds)) == 1:  # then the delay is the same for all splits of an exit
        assert found[0].token_time == pytest.approx(min(p.token_time for p in every), rel=1e-9)


def _candidates(problem: Problem) -> list[Plan]:
    from ppsd.plan import planner

    exit_, schedule = problem.exits[0], Schedule(1, problem.in_flight or 2)
    bounds = planner._front(problem, exit_)
    return [planner._plan(problem, b, exit_, schedule) for b in bounds]


def covers(bounds: tuple[int, ...], layers: int) -> bool:
    """Every layer is in exactly one stage, in order, and no stage is empty."""
    return [i for a, b in pairwise(bounds) for i in range(a, b)] == list(range(layers)) and all(
        a < b for a, b in pairwise(bounds)
    )


@settings(deadline=None)
@given(
    layers=st.integers(1, 10),
    workers=st.integers(1, 11),
    exit_layer=st.none() | st.integers(0, 11),
    odd=st.booleans(),
)
def test_plans_cover_all_layers_or_are_refused_by_name(
    layers: int, workers: int, exit_layer: int | None, odd: bool
) -> None:
    profile = estimate(replace(SIZES, layers=layers))
    anywhere = exits(*((layer, 0.7) for layer in range(1, layers)))
    speeds = tuple(0.3 + (k * 7) % 4 for k in range(workers)) if odd else ()

    def problem() -> Problem:
        return Problem(profile, workers, anywhere, speeds=speeds, exit_layer=exit_layer)

    if workers > layers or exit_layer not in (None, *range(1, layers - workers + 2)):
        with pytest.raises(ConfigError, match=r"stages|exit_layer"):
            problem()
        return
    found = alternatives(problem())
    assert found
    for plan in found:
        assert len(plan.bounds) == workers + 1
        assert covers(plan.bounds, layers)
        assert workers == 1 or exit_layer in (None, plan.bounds[1])


@given(st.integers(1, 12), st.lists(st.integers(-1, 13), max_size=5))
def test_a_given_split_is_taken_as_it_is_or_refused(layers: int, cuts: list[int]) -> None:
    bounds = (0, *cuts, layers)
    if covers(bounds, layers):
        assert check_split(cuts, layers) == bounds
    else:
        with pytest.raises(ConfigError, match="split must be ascending layers"):
            check_split(cuts, layers)


@given(st.integers(2, 5), st.integers(1, 5), st.floats(0, 1), st.integers(1, 5), st.integers(1, 4))
def test_no_split_is_better_where_workers_share_cores(
    workers: int, at_once: int, alpha: float, layer: int, block: int
) -> None:
    exit_ = Exit(min(layer, 10 - workers), alpha, 1e-4)
    problem = Problem(PROFILE, workers, (exit_,), at_once=at_once, mode="ppsd", block=block)
    best = choose(problem).token_time
    least = min(plan.token_time for plan in alternatives(problem, every_split=True))
    assert best == pytest.approx(least)
    assert best >= choose(replace(problem, at_once=None)).token_time


def test_every_split_of_every_exit_is_listed() -> None:
    problem = Problem(PROFILE, 3, exits((2, 0.5), (4, 0.6)), mode="ppsd")
    found = alternatives(problem, every_split=True)
    assert {plan.bounds for plan in found} == {
        (0, first, cut, 9) for first in (2, 4) for cut in range(first + 1, 9)
    }
    assert [p.token_time for p in found] == sorted(p.token_time for p in found)


def test_stages_are_balanced_by_time_with_both_heads_counted() -> None:
    """The LM head is worth three layers: of 9 layers the last of 3 stages gets one or two."""
    plain = choose(Problem(PROFILE, 3))
    assert (plain.mode, plain.bounds, plain.speedup) == ("autoregressive", (0, 4, 8, 9), 1.0)
    anywhere = tuple(Exit(layer, 0.9, 2 * PROFILE.layer_time(0)) for layer in range(1, 9))
    drafting = choose(Problem(PROFILE, 3, anywhere, mode="ppsd"))
    assert drafting.bounds == (0, 2, 7, 9)  # 2 + 2 for the draft, 5, 2 + 3
    assert drafting.bottleneck in (1, 2)


def test_a_late_exit_pays_only_if_its_drafts_are_better() -> None:
    early, late = Exit(3, 0.6, 1e-6), Exit(6, 0.65, 1e-6)
    assert choose(Problem(PROFILE, 3, (early, late))).exit == early
    sure = replace(late, alpha=0.99)
    assert choose(Problem(PROFILE, 2, (replace(early, alpha=0.4), sure))).exit == sure


def test_slow_hops_ask_for_more_in_flight_and_hopeless_drafts_for_none() -> None:
    slow = (Link(1e-3),) * 3
    wide = choose(Problem(PROFILE, 3, exits((3, 0.8)), links=slow, bitwise=True))
    cost, schedule = wide.cost, wide.schedule
    assert schedule.in_flight == min(64, math.ceil(cost.latency() / cost.tick())) > 3
    assert wide.speedup > 2
    narrow = choose(Problem(PROFILE, 3, exits((3, 0.8)), bitwise=True))
    assert narrow.schedule == Schedule(1, 3)
    hopeless = alternatives(Problem(PROFILE, 3, exits((3, 0.0)), bitwise=True))
    assert hopeless[0].mode == "autoregressive"


@pytest.mark.parametrize(("ticks", "blocks"), [(2.0, 2), (2.04, 2), (2.1, 3), (3.04, 3)])
def test_a_block_more_in_flight_has_to_fill_some_of_a_tick(ticks: float, blocks: int) -> None:
    """A round trip of so many ticks, by the time of a hop."""
    exit_, bounds = Exit(5, 0.9, 0.0), (0, 5, 9)
    near = cost_model(Problem(PROFILE, 2, (exit_,)), bounds, exit_, Schedule(1, 2))
    hop = (ticks * near.tick() - near.latency()) / 2
    far = Problem(PROFILE, 2, (exit_,), split=(5,), mode="ppsd", links=(Link(hop),) * 2)
    assert choose(far).schedule.in_flight == blocks


def test_only_what_is_bitwise_unless_asked_for() -> None:
    heads = exits((3, 0.8))
    assert {p.schedule.block for p in alternatives(Problem(PROFILE, 3, heads, bitwise=True))} == {1}
    free = alternatives(Problem(PROFILE, 3, heads))
    assert {p.mode for p in free} == {"autoregressive", "draft-then-verify", "ppsd"}
    asked = alternatives(Problem(PROFILE, 3, heads, mode="draft-then-verify", block=5))
    assert [p.schedule for p in asked] == [Schedule(5, 1)]


def test_what_is_decided_is_kept() -> None:
    heads = exits((2, 0.8), (4, 0.8))
    fixed = Problem(PROFILE, 3, heads, split=(4, 5), mode="ppsd", in_flight=7)
    [plan] = alternatives(fixed)
    assert (plan.bounds, plan.schedule, plan.exit) == ((0, 4, 5, 9), Schedule(1, 7), heads[1])
    assert choose(Problem(PROFILE, 3, heads, exit_layer=2, mode="ppsd")).exit == heads[0]
    with pytest.raises(ConfigError, match=r"one that the split and the heads at exits \[2, 4\]"):
        choose(Problem(PROFILE, 3, heads, exit_layer=3, mode="ppsd"))


def test_fast_workers_get_more_layers_and_a_slow_link_costs_what_it_costs() -> None:
    even, fast = (choose(Problem(PROFILE, 3, exits((2, 0.9)), speeds=s)) for s in ((), (1, 1, 3)))
    assert fast.bounds[2] < even.bounds[2]
    hop = choose(Problem(PROFILE, 2, links=(Link(0.0), Link(1e-3))))
    assert hop.token_time == pytest.approx(choose(Problem(PROFILE, 2)).token_time + 1e-3)


def test_plain_decoding_is_cut_as_suits_it_whatever_the_exit() -> None:
    """On a slow first worker a late exit costs plain decoding, too, if it keeps that cut."""
    free = Problem(PROFILE, 2, exits((7, 0.5)), speeds=(0.2, 1.0), mode="ppsd")
    bound = replace(free, exit_layer=7)
    assert choose(bound).speedup == choose(free).speedup < 1
    assert plain_cost(bound, PLAIN) == plain_cost(free, PLAIN)
    [kept] = alternatives(replace(bound, exits=(), mode=None))
    assert (kept.bounds, kept.plain_time) == ((0, 7, 9), choose(free).plain_time)


def test_workers_that_share_cores_or_hinder_each_other_are_slower() -> None:
    free = choose(Problem(PROFILE, 3, exits((3, 0.9)), mode="ppsd"))
    shared = choose(Problem(PROFILE, 3, exits((3, 0.9)), mode="ppsd", at_once=1))
    assert shared.speedup < 1 < free.speedup
    crowded = replace(PROFILE, contention=Timing.computed(1.5))
    hindered = choose(Problem(crowded, 3, exits((3, 0.9)), mode="ppsd"))
    assert hindered.token_time == pytest.approx(1.5 * free.token_time)
    assert hindered.plain_time == free.plain_time


def test_context_and_rows_come_from_the_profile() -> None:
    unit = 1e-3
    layer = tuple(
        LayerTime(c, r, Timing.computed(t * unit))
        for c, r, t in ((0, 1, 1), (100, 1, 2), (100, 2, 3), (100, 4, 4))
    )
    heads = tuple(RowsTime(r, Timing.computed(r * unit)) for r in (1, 4))
    profile = replace(PROFILE, layer=layer, lm_head=heads)
    assert [profile.layer_time(c) / unit for c in (0, 50, 100, 999)] == [1, 1.5, 2, 2]
    assert [profile.growth(r) for r in (1, 2, 3, 4)] == [1, 1.5, 1.75, 2]
    problem = Problem(profile, 2, exits((4, 0.5), draft=0.0), context=100, mode="draft-then-verify")
    plan = next(p for p in alternatives(problem) if p.schedule.block == 4)
    # four single rows through 4 layers of 2 ms, the block through 5 of 4 ms, 4 rows of LM head
    assert plan.cost.latency(4) == pytest.approx((4 * 4 * 2 + 5 * 4 + 4) * unit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 10}, r"stages must be an integer in \[1, 9\], got 10"),
        ({"speeds": (1.0,)}, "worker_speed must be 3 numbers above 0"),
        ({"speeds": (1.0, 0.0, 1.0)}, "worker_speed must be 3 numbers above 0"),
        ({"links": (Link(),) * 2}, "link_ms must be one hop, or 3, one a worker, got 2"),
        ({"split": (5, 3)}, r"split must be ascending layers in \[1, 8\], got 5,3"),
        ({"split": (5,)}, r"split must be 2 layers, one for each stage but the first, got 5"),
        (
            {"split": (5, 7), "exit_layer": 4},
            "exit_layer must be the end of stage 0, 5 in this split, got 4",
        ),
        ({"exit_layer": 8}, r"exit_layer must be an integer in \[1, 7\], got 8"),
    ],
)
def test_contradictions_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Problem(**{"profile": PROFILE, "workers": 3} | changes)
    with pytest.raises(ConfigError, match=r"alpha must be a rate in \[0, 1\]"):
        Exit(1, 1.1, 0.0)


def test_memory_counts_tables_cache_and_head() -> None:
    runtime = (400 << 20, 300 << 20)
    bounds, table = (0, 4, 9), 64 * 1000
    first, last = (SIZES.stage_bytes(bounds, k, 2, 10, head=7) - runtime[k] for k in (0, 1))
    assert first == 2 * (4 * 50_000 + table + 4 * 64 * 10 + 7)
    assert last == 2 * (5 * 50_000 + table + 5 * 64 * 10)
    assert SIZES.stage_bytes((0, 9), 0, 2, 0) - runtime[0] == 2 * (9 * 50_000 + table)


def test_an_estimate_says_so() -> None:
    assert not PROFILE.measured
    assert PROFILE.source == "parameter counts"
