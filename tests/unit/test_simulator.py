"""The simulator against closed forms, hand-made timelines and a tick-by-tick reference."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd.errors import ConfigError
from ppsd.lab import closed_forms
from ppsd.lab.pipelines import even_split, paper_split, uniform
from ppsd.lab.simulator import acceptance, simulate
from ppsd.lab.sweep import Scenario, sweep
from ppsd.plan import theory
from ppsd.plan.model import CostModel, Link, StageCost
from ppsd.speculation.policy import Drafted, Feed, Judged, Policy, Schedule

MS = 1e-3
TOKENS = 4000


def typical(alpha: float, seed: int) -> bytes:
    """Hits whose runs are as long as a rate of ``alpha`` makes them, without the noise of chance.

    Each run of right drafts ends with a wrong one; only the order of the runs is random.
    """
    misses = round(TOKENS * (1 - alpha))
    lengths = np.floor(np.log((np.arange(misses) + 0.5) / misses) / math.log(alpha)).astype(int)
    np.random.default_rng(seed).shuffle(lengths)
    return b"".join(b"\x01" * length + b"\x00" for length in lengths.tolist())


@pytest.mark.parametrize(("exit_layer", "alpha"), [(4, 0.9), (8, 0.6), (8, 0.95), (16, 0.3)])
def test_lockstep_stages_reach_the_papers_formula(exit_layer: int, alpha: float) -> None:
    cost = uniform((exit_layer,) * (32 // exit_layer), MS)
    run = simulate(cost, Schedule(1, cost.size), typical(alpha, 3))
    speedup = cost.latency() / run.token_time
    assert speedup == pytest.approx(theory.paper_speedup(alpha, 32, exit_layer), rel=0.01)


@pytest.mark.parametrize("block", [2, 4, 8])
def test_draft_then_verify_reaches_its_closed_form(block: int) -> None:
    cost = uniform((8, 24), MS, head=2 * MS, row_cost=0.1)
    run = simulate(cost, Schedule(block, 1), typical(0.7, 1))
    expected = closed_forms.draft_then_verify_speedup(0.7, block, 32, 8, head=2, row_cost=0.1)
    assert cost.latency() / run.token_time == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("schedule", [Schedule(1, 4), Schedule(1, 9), Schedule(3, 2)])
def test_heads_hops_and_uneven_stages_follow_the_model(schedule: Schedule) -> None:
    costs = {"head": 2.5 * MS, "lm_head": 3 * MS, "overhead": 0.1 * MS, "row_bytes": 1000}
    cost = uniform((8, 7, 9, 8), MS, Link(1.7 * MS, 1e7), **costs)
    run = simulate(cost, schedule, typical(0.8, 2))
    assert run.token_time == pytest.approx(float(cost.token_time(0.8, schedule)), rel=0.01)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_plain_decoding_takes_one_latency_a_token(stages: int) -> None:
    cost = uniform(even_split(10, stages), MS, Link(0.5 * MS), head=MS, lm_head=2 * MS)
    run = simulate(cost, Schedule(1, 1), acceptance(0.8, 50))
    assert run.token_time == pytest.approx(cost.latency(), rel=1e-9)
    assert cost.latency() == pytest.approx((12 + (stages > 1) * stages * 0.5) * MS)
    assert run.counts.drafted == 0


@pytest.mark.parametrize(
    ("cancel", "ms_per_token", "cancelled_per_miss"),
    [(0.0, 4, 0), (1.5 * MS, 5, 2), (math.inf, 6, 0)],
)
def test_a_miss_waits_for_stale_work_until_the_stage_can_know(
    cancel: float, ms_per_token: int, cancelled_per_miss: int
) -> None:
    """Stages of 1 and 3 layers, all drafts wrong: the second stage always has a stale block next.

    Seen at once, it is never begun; 1.5 ms late, it is stopped after 2 layers; never, it runs 3 ms.
    """
    cost = uniform((1, 3), MS, cancel=cancel)
    run = simulate(cost, Schedule(1, 2), acceptance(0.0, 11))
    assert run.token_time == pytest.approx(ms_per_token * MS)
    assert run.cancelled[1] == pytest.approx(10 * cancelled_per_miss * MS)  # no draft for the last


def test_prompt_chunks_overlap_and_cost_by_their_rows() -> None:
    cost = uniform((2, 2), MS, row_cost=0.5)
    run = simulate(cost, Schedule(1, 1), acceptance(0, 2), prompt_tokens=6, prefill_chunk=3)
    assert run.first_token_seconds == pytest.approx(3 * 4 * MS)  # 2 chunks of 3 rows, 2 stages
    assert run.seconds == pytest.approx((12 + 4) * MS)


def test_accounts_add_up_and_no_stage_does_two_things_at_once() -> None:
    cost = uniform((3, 5, 2), MS, Link(0.3 * MS), head=0.7 * MS, cancel=0.9 * MS)
    run = simulate(cost, Schedule(1, 3), acceptance(0.6, 200, 4), jitter=0.2, seed=4, trace=True)
    for lane, busy, cancelled in zip(run.slices, run.busy, run.cancelled, strict=True):
        ordered = sorted(lane)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))
        assert sum(end - start for start, end, *_ in lane) / 1e9 == pytest.approx(busy)
        stopped = sum(end - start for start, end, kind, *_ in lane if kind == "cancelled")
        assert stopped / 1e9 == pytest.approx(cancelled)
        assert cancelled > 0
    assert [b + i for b, i in zip(run.busy, run.idle, strict=True)] == [run.seconds] * 3
    counts = run.counts
    assert counts.drafted == counts.judged + counts.discarded


def test_jitter_is_seeded_and_keeps_the_mean() -> None:
    cost = uniform((4, 4), MS)

    def seconds(seed: int) -> float:
        hits = acceptance(0.5, 5000)
        return simulate(cost, Schedule(1, 1), hits, jitter=0.3, seed=seed).seconds

    assert seconds(1) == seconds(1) != seconds(2)
    assert seconds(1) == pytest.approx(5000 * cost.latency(), rel=0.01)


def test_acceptance_is_a_rate_rates_by_position_or_a_trace() -> None:
    assert np.mean(list(acceptance(0.7, 20_000, 1))) == pytest.approx(0.7, abs=0.01)
    assert acceptance(0.7, 50, 1) == acceptance(0.7, 80, 1)[:50] != acceptance(0.7, 50, 2)
    assert list(acceptance([1, 0, 0], 7)) == [1, 0, 0, 1, 0, 0, 1]
    by_position = np.frombuffer(acceptance([0.9, 0.1], 20_000, 5), np.uint8).reshape(-1, 2)
    assert by_position.mean(0) == pytest.approx([0.9, 0.1], abs=0.01)
    for wrong in (1.2, -0.1, [], [0.5, 2]):
        with pytest.raises(ConfigError, match="alpha"):
            acceptance(wrong, 5)


def test_splits_cover_every_layer_once() -> None:
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            split = even_split(layers, stages)
            assert (sum(split), len(split), min(split) >= 1) == (layers, stages, True)
            assert max(split[1:], default=0) - min(split[1:], default=0) <= 1
        for exit_layer in range(1, layers + 1):
            split = paper_split(layers, exit_layer)
            assert sum(split) == layers
            assert split[0] == exit_layer
            assert len(split) == math.ceil(layers / exit_layer)
    assert even_split(32, 4, 5) == (5, 9, 9, 9)
    with pytest.raises(ConfigError, match=r"exit_layer must be in \[1, 29\]"):
        even_split(32, 4, 30)


def test_cost_models_refuse_nonsense() -> None:
    cost = CostModel((StageCost(3, MS), StageCost(4, 2 * MS)), (Link(1e-4, 1e9), Link(2e-4)))
    assert cost.bounds == (0, 3, 7)
    with pytest.raises(ConfigError, match="links must be 2 for 2 stages"):
        replace(cost, links=())
    with pytest.raises(ConfigError, match="head must be a finite number"):
        replace(cost, head=-1.0)


class Ticking:
    """The same pipeline, moved one layer time at a time, every stage polling by itself."""

    def __init__(self, split: tuple[int, ...], head: int, lm_head: int, hop: int, cancel: int):
        self.split, self.head, self.lm_head, self.hop, self.cancel = (
            split, head, lm_head, hop, cancel)  # fmt: skip
        self.now = 0
        self.queues: list[deque] = [deque() for _ in split]  # (arrival, message); [0]: verdicts
        self.published = [(-100, 1)]

    def run(self, schedule: Schedule, hits: bytes) -> tuple[int, Policy]:
        self.policy = Policy(schedule, max_tokens=len(hits), stop_ids=frozenset())
        self.hits = hits
        first, others = self.rank_0(), [self.stage(k) for k in range(1, len(self.split))]
        while True:
            for stage in others:
                next(stage)  # ends a layer, sends
            if next(first, "over") == "over":
                return self.now, self.policy
            for stage in others:
                next(stage)  # looks at the epoch, begins a layer
            self.now += 1

    def newest(self) -> int:
        return max(epoch for time, epoch in self.published if time + self.cancel <= self.now)

    def stage(self, k: int) -> Iterator[None]:
        yield
        while True:
            if not self.queues[k] or self.queues[k][0][0] > self.now:
                yield
                yield
                continue
            message = self.queues[k].popleft()[1]
            for layer in range(self.split[k]):
                if self.newest() > message.epoch:
                    break
                yield
                last = k == len(self.split) - 1
                if layer == self.split[k] - 1:
                    for _ in range(self.lm_head if last else 0):
                        yield
                        yield
                    to = 0 if last else k + 1
                    self.queues[to].append((self.now + self.hop, message))
                yield

    def poll(self) -> None:
        while self.queues[0] and self.queues[0][0][0] <= self.now:
            verdict = self.queues[0].popleft()[1]
            self.commands.extend(self.policy.on(verdict))
            if self.policy.epoch > self.published[-1][1]:
                self.published.append((self.now, self.policy.epoch))

    def rank_0(self) -> Iterator[None]:
        self.commands = deque(self.policy.start([0]))
        while self.commands or not self.policy.finished:
            command = self.commands.popleft() if self.commands else None
            if isinstance(command, Feed) and command.epoch == self.policy.epoch:
                yield from self.feed(command)
            elif command is None:
                self.poll()
                if not self.commands and not self.policy.finished:
                    yield

    def feed(self, feed: Feed) -> Iterator[None]:
        for _ in range(self.split[0]):
            self.poll()
            if self.policy.epoch != feed.epoch:
                return
            yield
        end = feed.position + 1
        if feed.ship:
            answers = (0,) * feed.judge
            verdict = Judged(feed.epoch, feed.block, end - feed.judge + 1, answers, 1)
            self.queues[1].append((self.now + self.hop, verdict))
        if not feed.draft:
            return
        self.poll()
        if self.policy.epoch != feed.epoch:
            return
        for _ in range(self.head):
            yield
        guess = Drafted(feed.epoch, end, 1 - self.hits[end - 1])
        self.commands.extend(self.policy.on(guess))


@settings(deadline=None, max_examples=150)
@given(
    split=st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    extra=st.tuples(*[st.integers(0, 3)] * 4),
    block=st.integers(1, 3),
    in_flight=st.integers(1, 4),
    hits=st.lists(st.booleans(), min_size=2, max_size=25).map(bytes),
)
def test_every_timeline_is_that_of_the_tick_by_tick_pipeline(
    split: tuple[int, ...],
    extra: tuple[int, ...],
    block: int,
    in_flight: int,
    hits: bytes,
) -> None:
    head, lm_head, hop, cancel = extra
    schedule = Schedule(block, in_flight)
    ticks, policy = Ticking(split, *extra).run(schedule, hits)
    cost = uniform(
        split, MS, Link(hop * MS), head=head * MS, lm_head=lm_head * MS, cancel=cancel * MS
    )
    run = simulate(cost, schedule, hits)
    assert round(run.seconds / MS, 6) == ticks
    assert run.counts == policy.counts


def test_recorded_drafts_count_as_far_as_they_are_simulated() -> None:
    recorded = (1.0,) * 100 + (0.0,) * 100
    scenario = Scenario(
        lambda layers: uniform(layers, 1e-3), 8, 2, 4, ((0, 0.5),), tokens=100, recorded=recorded
    )
    assert scenario.alpha(4) == 1.0
    assert replace(scenario, tokens=401).alpha(4) == 0.5
    with pytest.raises(ConfigError, match="another axis with recorded drafts"):
        sweep(scenario, "alpha")
