"""Efficiency and prediction from measurements made up so that every number is known."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest

from ppsd.errors import PpsdError
from ppsd.lab import efficiency, predict
from ppsd.lab.efficiency import budget, ideal_speedup
from ppsd.lab.oracle import Variant
from ppsd.lab.runner import PLAIN, Measurement, Results
from ppsd.plan.model import Link
from ppsd.plan.profile import LayerTime, RowsTime, Timing, estimate
from ppsd.plan.sizes import Sizes
from ppsd.plan.theory import paper_speedup
from ppsd.speculation.policy import Schedule

WAITS = {"drafting": 0.1, "messages": 0.2, "handover": 0.3, "cancel": 0.4, "other": 0.0}
GAPS = {"links": [0.5, 1.5], "sending": None, "drafting": None}


def stage(**means: float) -> dict[str, Any]:
    return {rows.lstrip("r"): {"count": 9, "mean": mean} for rows, mean in means.items()}


def plain(**changes: Any) -> Measurement:
    """Ten tokens of 12 s: stages of 4 and 6 s and 2 s of messages."""
    details = {"stages": [stage(r1=4.0), stage(r1=6.0)], "gaps": GAPS, "overruns": 0}
    counts = {"judged": 0, "accepted": 0}
    one = Measurement(PLAIN, "x", 0, 10, 120.0, 1.0, counts, "0" * 11, details)
    return dataclasses.replace(one, **changes)


def fast(**changes: Any) -> Measurement:
    """Ten tokens, 8 of 10 judged drafts right; 85 s of work and 10 of waits on the path."""
    path = {"work": [20.0, 65.0], "blocks": [4.0, 10.0]}
    details = {
        "stages": [stage(r1=4.5), stage(r1=6.5)],
        "gaps": {"links": [0.5, None], "sending": 0.25, "drafting": 0.125},
        "path": path | {name: 10 * wait for name, wait in WAITS.items()},
        "overruns": 0,
    }
    counts = {"judged": 10, "accepted": 8}
    one = Measurement("ppsd α=0.8", "x", 0, 10, 95.0, 1.0, counts, "11011110110", details)
    return dataclasses.replace(one, **changes)


def test_the_ideal_is_equation_7_for_equal_stages() -> None:
    for stages in (2, 4, 8):
        for alpha in (0.0, 0.4, 1.0):
            paper = paper_speedup(alpha, 32, 32 // stages)
            assert ideal_speedup(alpha, stages) == pytest.approx(float(paper))


def test_efficiency_by_hand() -> None:
    found = efficiency.efficiency(fast(), plain())
    assert (found.alpha, found.speedup) == (0.8, pytest.approx(12 / 9.5))
    assert found.paper == pytest.approx(2 / (0.8 + 0.4))
    assert found.model == pytest.approx(12 / (0.8 * 6 + 0.2 * 12))
    assert found.of_paper == pytest.approx(12 / 9.5 / (2 / 1.2))
    assert found.of_model == pytest.approx(12 / 9.5 / (12 / 7.2))


def test_the_budget_by_hand_adds_up_to_the_measured_time() -> None:
    found = budget(fast(), plain())
    needed = (4 * 4 + 10 * 6) / 10
    assert found.ideal == pytest.approx(10 * 0.6)
    assert found.imbalance == pytest.approx(needed - 6)
    assert found.contention == pytest.approx(8.5 - needed)
    waits = {name: getattr(found, name) for name in WAITS}
    assert waits == pytest.approx(WAITS)
    assert found.total == pytest.approx(9.5) == pytest.approx(fast().token_time)


def test_rows_are_medians_and_budgets_means_over_repeats() -> None:
    results = Results(None, {}, {})
    for repeat, seconds in enumerate((90.0, 95.0, 115.0)):
        results.add(plain(repeat=repeat))
        results.add(fast(repeat=repeat, seconds=seconds))
    results.add(fast(repeat=3))  # its partner is still to come
    [row] = efficiency.summarize(results, ["ppsd α=0.8", "ppsd α=1"])
    assert (row.variant, row.speedup.median, row.speedup.count) == ("ppsd α=0.8", 12 / 9.5, 3)
    assert row.token_time == pytest.approx(sum(row.budget.values())) == pytest.approx(9.5)
    gated = efficiency.gated_speedups(results, ["ppsd α=0.8", "ppsd gated α=0"])
    assert gated == {"ppsd α=0.8": row.speedup}
    summary = efficiency.plain_summary(results)
    assert summary["token_time"]["median"] == 12
    assert [times["median"] for times in summary["stage_times"]] == [4, 6]


def test_too_few_tokens_are_refused() -> None:
    details = plain().details | {"stages": [stage(r1=4.0), {}]}
    with pytest.raises(PpsdError, match="too few tokens"):
        efficiency.alone(plain(details=details))
    with pytest.raises(PpsdError, match="too few tokens"):
        predict.row_times(fast(details=details), plain())


SHAPE = predict.Shape(layers=(2, 3), head_layers=1.0)
OWN = predict.own_times(SHAPE)


def test_the_cost_model_of_a_run() -> None:
    cost = predict.cost_of(fast(), plain(), SHAPE)
    assert [s.layers for s in cost.stages] == [2, 3]
    assert [s.layer for s in cost.stages] == pytest.approx([4.5 / 2, 6.5 / 4])
    assert (cost.lm_head, cost.head) == (pytest.approx(6.5 / 4), 0.125)
    assert [link.latency for link in cost.links] == [0.25, 1.25]
    assert (cost.overhead, cost.row_cost) == (0.25, 0.0)
    assert cost.stage_time(1) == pytest.approx(6.5 + 0.25)


def test_blocks_of_several_rows_are_put_down_to_their_rows() -> None:
    details = fast().details | {"stages": [stage(r1=4.0), stage(r1=1.0, r4=15.0)]}
    details["stages"][1]["4"]["count"] = 20
    times, row_cost = predict.row_times(fast(details=details), plain())
    assert (times, row_cost) == ([4.0, pytest.approx(6.0)], pytest.approx(0.5))


def test_plain_decoding_is_predicted_from_its_own_times() -> None:
    run = plain()
    assert predict.predicted_token_time(run, run, Schedule(1, 1), OWN) == pytest.approx(12.0)


def test_a_profile_prices_a_request_by_its_context_alone() -> None:
    """Layers of 1 ms at context 0 and 3 ms at 100, an LM head of 2 ms, free messages."""
    sizes = Sizes(
        layers=6, hidden=8, inner=2, vocabulary=9, layer=50, cached=8, lm_head=72, tied=True
    )
    layer = (
        LayerTime(0, 1, Timing.computed(1e-3)),
        LayerTime(100, 1, Timing.computed(3e-3)),
    )
    head = (RowsTime(1, Timing.computed(2e-3)),)
    free = Link(bandwidth=1e15)  # a profile on disk has a number
    profile = replace(estimate(sizes, link=free), layer=layer, lm_head=head)
    price = predict.profiled((0, 4, 6), {"x": 50}, (), SHAPE)
    details = plain().details | {"profiles": [profile.to_json()]}
    slow = details | {"stages": [stage(r1=400.0), stage(r1=600.0)]}
    for run in (plain(details=details), plain(details=slow)):
        found = predict.predicted_token_time(run, run, Schedule(1, 1), price)
        assert found == pytest.approx(6 * 2e-3 + 2e-3)
    slower = replace(profile, layer=tuple(replace(t, time=Timing.computed(4e-3)) for t in layer))
    both = plain(details=details | {"profiles": [profile.to_json(), slower.to_json()]})
    found = predict.predicted_token_time(both, both, Schedule(1, 1), price)
    assert found == pytest.approx(6 * (2e-3 + 4e-3) / 2 + 2e-3), "the mean of before and after"
    oracle = details | {"gaps": fast().details["gaps"] | {"drafting": 1e-3}}
    right = fast(hits="1" * 11, details=oracle)
    found = predict.predicted_token_time(right, plain(), Schedule(1, 2), price)
    assert found == pytest.approx(4 * 2e-3 + 1e-3, rel=0.1)  # the first stage is the slowest


def test_of_paced_stages_a_profile_tells_all_but_the_pace() -> None:
    """Stages of 5 and 8 ms whatever their layers take, and messages of 1 ms."""
    sizes = Sizes(
        layers=6, hidden=8, inner=2, vocabulary=9, layer=50, cached=8, lm_head=72, tied=True
    )
    profile = replace(
        estimate(sizes, link=Link(latency=1e-3, bandwidth=1e15)),
        layer=(LayerTime(0, 1, Timing.computed(2e-3)),),
        lm_head=(RowsTime(1, Timing.computed(1e-3)),),
    )
    price = predict.profiled((0, 4, 6), {"x": 50}, (5e-3, 8e-3), SHAPE)
    details = {"profiles": [profile.to_json()], "gaps": {"drafting": 0.0}}
    run = plain(details=details)
    found = predict.predicted_token_time(run, run, Schedule(1, 1), price)
    assert found == pytest.approx(15e-3, rel=1e-3)
    right = fast(hits="1" * 2001, details=details)
    found = predict.predicted_token_time(right, run, Schedule(1, 2), price)
    assert found == pytest.approx(8e-3, rel=0.01)


def test_the_spread_of_a_profile_costs_time_where_stages_wait_for_each_other() -> None:
    """Two stages of 8 ms each: whichever is slower this time decides."""
    sizes = Sizes(
        layers=2, hidden=8, inner=2, vocabulary=9, layer=50, cached=8, lm_head=72, tied=True
    )
    steady = replace(
        estimate(sizes, link=Link(bandwidth=1e15)),
        layer=(LayerTime(0, 1, Timing.computed(7e-3)),),
        lm_head=(RowsTime(1, Timing.computed(1e-3)),),
    )
    unsteady = replace(steady, layer=(LayerTime(0, 1, Timing(7e-3, 6e-3, 8e-3, 9)),))
    assert unsteady.jitter == pytest.approx(math.log(8 / 6) / 2 / 0.67449, rel=1e-4)
    price = predict.profiled((0, 1, 2), {"x": 0}, (), SHAPE)
    expected = []
    for profile in (steady, unsteady):
        details = {"profiles": [profile.to_json()], "gaps": {"drafting": 1e-3}}
        run = fast(hits="1" * 2001, details=details)
        expected.append(predict.predicted_token_time(run, run, Schedule(1, 2), price))
    assert expected[0] == pytest.approx(8e-3, rel=0.01)
    waits = unsteady.jitter / math.sqrt(math.pi)  # E max(X, Y) − E X for equal normals
    assert expected[1] / expected[0] - 1 == pytest.approx(waits, rel=0.3)


def test_a_prediction_by_hand() -> None:
    """α = 1: a token as often as the slowest stage, with its message sent, is through."""
    run = fast(hits="1" * 11)
    predicted = predict.predicted_token_time(run, plain(), Schedule(1, 2), OWN)
    assert predicted == pytest.approx(6.75, rel=0.02)
    results = Results(None, {}, {})
    for repeat, seconds in enumerate((60.0, 67.5, 75.0)):
        results.add(plain(repeat=repeat))
        results.add(fast(repeat=repeat, seconds=seconds, hits="1" * 11))
    [row] = predict.summarize(results, {"ppsd α=0.8": Schedule(1, 2)}, OWN)
    errors = [predicted / seconds - 1 for seconds in (6.0, 6.75, 7.5)]
    assert row.error.median == pytest.approx(errors[1])
    assert row.median_error == pytest.approx(sorted(map(abs, errors))[1])
    plainly = predict.predicted_token_time(plain(), plain(), Schedule(1, 1), OWN)
    speedups = [plainly / predicted * seconds / plain().token_time for seconds in (6.0, 6.75, 7.5)]
    assert row.speedup_error.median == pytest.approx(speedups[1] - 1)


def test_variants_and_their_names() -> None:
    assert [v.name for v in efficiency.variants((1.0, 0.4), 5)] == [
        "plain",
        "ppsd α=1",
        "ppsd α=0.4",
    ]
    assert [v.name for v in efficiency.variants((0.4, 0.2), None)[1:]] == [
        "ppsd α=0.4",
        "ppsd α=0.2",
        "ppsd gated α=0.2",
    ]
    assert efficiency.variants((1.0,), 5)[1] == Variant("ppsd", in_flight=5, alpha=1.0)
    assert [v.name for v in predict.variants((0.5,), 3)] == [
        "plain",
        "draft-then-verify α=0.5",
        "ppsd α=0.5",
    ]
