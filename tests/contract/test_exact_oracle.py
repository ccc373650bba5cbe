"""L1: real engine, protocol and workers over oracle stages say what plain decoding says.

Hypothesis chooses the split, the schedule, the sampling, which drafts are right, and in which
order the workers move, so verdicts meet stage 0 before, during and after its own work. It also
pauses and resumes speculation at any moment, as a gate may.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd.speculation.policy import Schedule
from ppsd.types import SamplingParams
from tests.support.hurried_gate import Hurried
from tests.support.rig import VOCAB, Rig

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=11)
schedules = st.builds(Schedule, st.integers(1, 4), st.integers(1, 6))
fields = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 3]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.6]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "min_tokens": st.sampled_from([0, 0, 4]),
        "seed": st.integers(0, 3),
        "max_tokens": st.integers(1, 16),
    }
)
samplings = fields.map(lambda f: {**f, "min_tokens": min(f["min_tokens"], f["max_tokens"])})
stops = st.sampled_from([frozenset(), frozenset({3}), frozenset({1, 2, 5, 6})])


@settings(max_examples=120)
@given(
    data=st.data(),
    stages=st.integers(2, 5),
    schedule=schedules,
    requests=st.lists(st.tuples(prompts, samplings, stops), min_size=1, max_size=3),
    alpha=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    chunk=st.integers(1, 5),
    wills=st.lists(st.booleans(), max_size=8),
)
def test_any_order_of_work_gives_the_plain_output(
    data, stages, schedule, requests, alpha, chunk, wills
) -> None:
    rig = Rig(stages, schedule, chunk=chunk)
    turns = data.draw(st.lists(st.integers(0, stages - 1), min_size=1, max_size=12))
    moves = iter(turns * 1000)

    def moved() -> int | None:
        rank = next(moves, 0)
        return rank or None

    rig.order = moved
    rig.move_while_stage_0_computes(turns)
    if wills:
        rig.pause_at_will(wills)
    for prompt, sampling, stop in requests:
        params = SamplingParams(**sampling)
        assert rig.decode(prompt, params, stop, alpha=alpha) == rig.plain(prompt, params, stop)
        counts = rig.sequence.policy.counts
        assert counts.drafted == counts.judged + counts.discarded


@settings(max_examples=60)
@given(
    data=st.data(),
    stages=st.integers(2, 4),
    schedule=schedules.filter(lambda s: s.drafts),
    prompt=prompts,
    sampling=samplings,
    alpha=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_a_draft_rests_on_the_same_verified_row_however_fast_answers_are(
    data, stages, schedule, prompt, sampling, alpha
) -> None:
    params = SamplingParams(**{**sampling, "max_tokens": 16})
    seen = []
    for _ in range(2):
        rig = Rig(stages, schedule)
        turns = data.draw(st.lists(st.integers(0, stages - 1), min_size=1, max_size=12))
        moves = iter(turns * 1000)
        rig.order = lambda moves=moves: next(moves, 0) or None
        rig.move_while_stage_0_computes(turns)
        rig.decode(prompt, params, alpha=alpha)
        seen.append(rig.stage.drafter.seen)
    common = seen[0].keys() & seen[1].keys()
    assert {k: seen[0][k] for k in common} == {k: seen[1][k] for k in common}


def test_a_chain_of_accepted_drafts_rests_on_what_w_blocks_leave_behind() -> None:
    """Of a row p the verdicts up to p - w are in, and none comes before the prompt's last."""
    rig = Rig(3, Schedule(1, 3))
    rig.decode([1, 2, 5], SamplingParams(max_tokens=9), alpha=1.0)
    lags = {len(history) - 1: newest for history, newest in rig.stage.drafter.seen.items()}
    assert lags == {2: -1, 3: -1, 4: -1, 5: 2, 6: 3, 7: 4, 8: 5, 9: 6}


@settings(max_examples=30)
@given(
    stages=st.integers(2, 4),
    schedule=schedules.filter(lambda s: s.drafts),
    asked=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=2),
    times=st.lists(st.sampled_from([0.01, 1.0, 1.1, 30.0]), min_size=1, max_size=9),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_gate_changes_no_token_whatever_it_measures(
    stages, schedule, asked, times, alpha
) -> None:
    rig = Rig(stages, schedule, gate=Hurried(schedule, times))
    for prompt, sampling in asked:
        params = SamplingParams(**{**sampling, "max_tokens": 28})
        assert rig.decode(prompt, params, alpha=alpha) == rig.plain(prompt, params, frozenset())


def test_a_hurried_gate_pauses_and_resumes() -> None:
    """The test above would mean little otherwise."""
    schedule = Schedule(1, 3)
    rig = Rig(3, schedule, gate=Hurried(schedule))
    rig.decode([1, 2], SamplingParams(max_tokens=60), alpha=0.5)
    assert rig.sequence.switches is not None
    switched = [paused for _, paused in rig.sequence.switches.times]
    assert switched.count(True) >= 3
    assert switched.count(False) >= 3
    assert rig.sequence.policy.counts.judged > 10


@settings(max_examples=60)
@given(prompts, samplings, st.integers(1, 4), st.integers(1, 4))
def test_rejection_at_temperature_0_is_plain_decoding(prompt, sampling, stages, window) -> None:
    params = SamplingParams(**{**sampling, "temperature": 0.0})
    schedule = Schedule(1, window if stages > 1 else 1)
    rig = Rig(stages, schedule, acceptance="rejection")
    assert rig.decode(prompt, params) == rig.plain(prompt, params, frozenset())


@settings(max_examples=40)
@given(st.data())
def test_a_request_left_early_does_not_touch_the_next(data) -> None:
    stages = data.draw(st.integers(2, 4))
    rig = Rig(stages, Schedule(1, stages))
    prompt = data.draw(prompts)
    params = SamplingParams(max_tokens=12)
    rig.decode(prompt, params)
    for leave_after in data.draw(st.lists(st.integers(0, 6), max_size=3)):
        rig.decode(prompt, params, most=leave_after)
        assert rig.decode(prompt, params) == rig.plain(prompt, params, frozenset())


@settings(max_examples=40)
@given(prompts, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), st.integers(2, 4))
def test_rows_kept_from_the_last_turn_are_the_ones_a_fresh_run_computes(
    prompt, addition, stages
) -> None:
    rig = Rig(stages, Schedule(1, stages))
    params = SamplingParams(max_tokens=5)
    answer = rig.decode(prompt, params)
    turn = [*prompt, *answer, *addition]
    kept = len(prompt) + len(answer) - 1
    assert rig.decode(turn, params, reuse=True) == rig.plain(turn, params, frozenset())
    assert rig.sequence.cached == kept


def test_right_drafts_flow_without_a_single_resync() -> None:
    rig = Rig(4, Schedule(1, 4))
    params = SamplingParams(max_tokens=40)
    assert rig.decode([1, 2], params, alpha=1.0) == rig.plain([1, 2], params, frozenset())
    counts = rig.sequence.policy.counts
    assert (counts.resyncs, counts.accepted, counts.discarded) == (0, 39, 0)
