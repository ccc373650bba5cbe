"""The goodput gate: what it decides on given times, and what that is worth on a virtual clock."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from ppsd.lab.pipelines import even_split, uniform
from ppsd.lab.simulator import Simulated, acceptance, simulate
from ppsd.plan.model import CostModel, Link
from ppsd.speculation.gate import PROBE, SURE, Gate, Switches
from ppsd.speculation.policy import Schedule

MS = 1e-3
TOKENS = 2000
PPSD_2, ROUNDS = Schedule(1, 2), Schedule(4, 1)


class Script:
    """A policy's face: commits tokens as told and notes what the gate asks for."""

    finished = False
    restarted = True

    def __init__(self) -> None:
        self.emitted = 0
        self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Play:
    """A gate before scripted verdicts of a PPSD pipeline; times in plain tokens.

    After a miss the next verdict takes ``latency``, after a hit ``tick``.
    """

    def __init__(self, gate: Gate, latency: float = 1.1, tick: float = 0.6) -> None:
        self.gate, self.latency, self.tick = gate, latency, tick
        self.now, self.scale = 100.0, 1.0
        self.policy: Script | None = None
        self.begin()

    def begin(self, hit: bool = False) -> None:
        if self.policy is not None:
            self.gate.end(self.policy)
        self.policy, self.fed_plainly = Script(), False
        self.switches = self.gate.begin(self.policy, self.now)
        self.verdict(hit)  # the prompt's own

    def verdict(self, hit: bool, extra: float = 0.0) -> bool:
        """Let a verdict come; whether speculation is paused then."""
        spec = self.latency if self.policy.restarted else self.tick
        return self.step(self.scale * (1.0 if self.fed_plainly else spec) + extra, 1, hit)

    def step(self, seconds: float, tokens: int, hit: bool = False) -> bool:
        self.now += seconds
        self.policy.emitted += tokens
        self.policy.restarted = self.policy.paused or not hit
        self.fed_plainly = self.policy.paused  # the gate speaks when the next token is fed
        self.gate.watch(self.policy, self.now)
        return self.policy.paused

    def until(self, paused: bool, every: int = 10**9, most: int = 2000) -> int:
        """Count the verdicts until speculation is paused, or resumed; one in ``every`` misses.

        By default all of them do.
        """
        for count in range(1, most + 1):
            if self.verdict(every < 10**9 and count % every > 0) == paused:
                return count
        return most


def test_misses_alone_lead_to_a_pause_that_measures_plain_decoding() -> None:
    play = Play(Gate(PPSD_2))
    assert play.until(True) < 8
    assert play.gate.plain is None
    for _ in range(2 * PROBE):
        play.verdict(False)
    assert play.gate.plain == pytest.approx(1.0)
    assert play.policy.paused or play.until(True) < 20
    assert play.switches.paused_tokens > 0


def test_clearly_good_drafts_are_never_paused_not_even_to_measure() -> None:
    play = Play(Gate(PPSD_2))
    assert play.until(True, every=5, most=3000) == 3000
    assert play.gate.plain is None
    switches = play.switches
    assert (switches.pauses, switches.times) == (0, [])
    assert switches.plain_bounds == (SURE * switches.latency, switches.latency)
    assert switches.latency == pytest.approx(play.latency)


def test_without_any_miss_plain_decoding_is_measured_once() -> None:
    """Else a pipeline whose stages share one core would never be found out."""
    play = Play(Gate(PPSD_2), tick=1.2)
    play.begin(hit=True)
    assert not any(play.verdict(True) for _ in range(200))
    assert any(play.verdict(True) for _ in range(100))
    assert sum(play.verdict(True) for _ in range(2000)) > 1800, "drafts are right but too dear"


def test_pauses_double_while_retries_fail_and_end_in_a_bound() -> None:
    play = Play(Gate(PPSD_2))
    lengths = []
    for _ in range(10):
        play.until(True)
        lengths.append(play.until(False))
    long = [n for n in lengths if n > 2 * PROBE]
    assert long == sorted(long)
    assert long[1] == pytest.approx(2 * long[0], abs=PROBE + 2)
    assert long[-1] == pytest.approx(long[-2], abs=2), "the bound"
    lost = play.until(True) * (play.latency - 1)
    assert lost / long[-1] < 0.01, "retries cost less than 1 % of the time"


def test_a_retry_goes_on_when_drafts_have_become_good() -> None:
    play = Play(Gate(PPSD_2))
    for _ in range(5):
        play.until(True)
        play.until(False)
    assert play.until(True, every=4, most=900) == 900


def test_slower_tokens_in_a_longer_context_are_not_blamed_on_speculation() -> None:
    """All tokens come to cost three times as much; only the ratio matters."""
    play = Play(Gate(PPSD_2))
    while play.gate.plain is None or play.policy.paused:
        play.verdict(False)
    paused = 0
    for i in range(4000):
        play.scale = 1 + i / 2000
        paused += play.verdict(i % 2 > 0)
    assert play.gate.plain == pytest.approx(play.scale, rel=0.4)
    assert paused < 200


def test_one_disturbance_does_not_pause() -> None:
    play = Play(Gate(PPSD_2))
    while play.gate.plain is None or play.policy.paused:
        play.verdict(False)
    for i in range(400):
        assert not play.verdict(i % 4 > 0, extra=60.0 if i % 100 == 50 else 0.0)


def test_draft_then_verify_is_measured_first_and_judged_by_the_round() -> None:
    play = Play(Gate(ROUNDS))
    assert play.policy.paused, "a round's time says nothing of plain decoding"
    while play.policy.paused:
        play.step(1.0, 1)
    assert play.policy.emitted <= PROBE + 2
    assert not any(play.step(2.0, tokens=3) for _ in range(500))
    assert any(play.step(2.0, tokens=1) for _ in range(60))


@pytest.mark.parametrize("latency", [1.06, 1.13])
def test_a_pause_that_begins_slowly_is_no_reason_to_go_on(latency: float) -> None:
    """Cores that slow each other down leave the first plain tokens slow as well."""
    rng, lost = np.random.default_rng(0), []
    play = Play(Gate(PPSD_2), latency)
    for request in range(400):
        if request % 8 == 0:  # so many share a gate
            play = Play(Gate(PPSD_2), latency)
        play.begin()
        start, plain = play.now, 0
        for _ in range(256):
            plain = plain + 1 if play.fed_plainly else 0
            slow = 0.06 * 0.8 ** (plain - 1) if plain else 0.0
            play.scale = (1 + slow) * rng.lognormal(0, 0.05)
            play.verdict(False)
        lost.append((play.now - start) / 256 - 1)
    assert np.mean(lost) < 0.022


def test_what_is_known_outlives_a_request_and_a_new_text_gets_an_early_retry() -> None:
    play = Play(Gate(PPSD_2))
    while not play.switches.paused_tokens > 4 * PROBE:
        play.verdict(False)
    play.begin()
    assert play.policy.paused, "half of its pause is not over"
    assert play.switches.pauses == 1
    play.begin()
    assert not play.policy.paused
    assert play.gate.plain == pytest.approx(1.0)
    assert (play.switches.pauses, play.switches.times) == (0, [])
    assert play.switches.plain_bounds == (play.gate.plain, play.gate.plain)


@pytest.mark.parametrize("requests", [2, 8])
def test_requests_under_way_are_judged_and_paused_together(requests: int) -> None:
    """None loses more than it may lose alone."""
    gate, policies = Gate(PPSD_2), [Script() for _ in range(requests)]
    begun = [gate.begin(policy, 0.0) for policy in policies]
    alone, verdicts = Play(Gate(PPSD_2)), 0
    while not policies[0].paused:
        verdicts += 1
        for policy in policies:
            policy.emitted += 1
            gate.watch(policy, verdicts * alone.latency)
    assert verdicts <= alone.until(paused=True) + 1
    assert all(policy.paused for policy in policies)
    assert [switches.pauses for switches in begun] == [1] * requests
    late = Script()
    gate.begin(late, verdicts * alone.latency)
    assert late.paused, "it would take the others' time"
    for policy in [*policies, late]:
        gate.end(policy)
    gate.begin(Script(), 1e6)
    with pytest.raises(KeyError):
        gate.end(late)


def test_switches_tell_when_speculation_was_paused() -> None:
    switches = Switches(2, 7, [(1.0, True), (2.5, False), (4.0, True)])
    assert switches.pauses_until(6.0) == [(1.0, 2.5), (4.0, 6.0)]
    assert Switches(1, 3, [(1.0, True), (2.0, False)]).pauses_until(6.0) == [(1.0, 2.0)]
    assert Switches().pauses_until(6.0) == []
    assert Switches().plain_bounds is None


def costs(stages: int, head: float, hop: float, late: float) -> CostModel:
    """Stages of 32 layers of 1 ms in all; a miss waits for stage 0's layer or draft to end."""
    return uniform(
        even_split(32, stages), MS, Link(hop * MS), head=head * MS, cancel=late * MS, row_cost=0.05
    )


def token_times(
    cost: CostModel, schedule: Schedule, hits: bytes, jitter: float = 0.0
) -> tuple[float, float, Simulated]:
    """Seconds per token in plain decoding and without a gate, and the gated run."""
    plain = plain_time(cost, len(hits), jitter)
    free = simulate(cost, schedule, hits, jitter=jitter, seed=1).token_time
    return plain, free, simulate(cost, schedule, hits, jitter=jitter, seed=1, gate=Gate(schedule))


@cache
def plain_time(cost: CostModel, tokens: int, jitter: float) -> float:
    """Seconds per token in plain decoding, which no draft changes."""
    hits = bytes(tokens)
    return simulate(cost, Schedule(1, 1), hits, jitter=jitter, seed=1).token_time


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize(
    ("head", "hop", "late", "jitter"),
    [(0.0, 0.0, 0.0, 0.0), (3.7, 0.3, 1.5, 0.0), (1.3, 2.0, 3.0, 0.1), (2.6, 0.3, math.inf, 0.1)],
)
def test_ppsd_with_the_gate_is_as_fast_as_the_better_of_both(
    stages: int, head: float, hop: float, late: float, jitter: float
) -> None:
    """Within 2 % of plain and of ungated decoding, whichever is faster, at every α."""
    cost, schedule = costs(stages, head, hop, late), Schedule(1, stages)
    # With noise a retry at α = 0.2 costs two stages 2.04 % of 2,000 tokens, less of more.
    tokens = 2 * TOKENS if jitter and stages == 2 else TOKENS
    for alpha in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        plain, free, gated = token_times(cost, schedule, acceptance(alpha, tokens, 7), jitter)
        best = min(plain, free)
        assert gated.token_time < best / 0.98, (alpha, plain, free, gated.token_time)
        if alpha >= 0.6:
            assert gated.token_time < free / (0.99 if alpha < 1 else 0.98), alpha


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_head_that_costs_more_than_the_model_does_not_slow_it_down(stages: int) -> None:
    cost, schedule = costs(stages, 40.0, 0.0, 0.0), Schedule(1, stages)
    for alpha in (0.0, 0.5, 0.9):
        plain, free, gated = token_times(cost, schedule, acceptance(alpha, TOKENS, 7))
        assert free > 1.2 * plain
        assert gated.token_time < plain / 0.98, alpha


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("alphas", [(0.0, 0.8), (0.8, 0.0), (0.0, 0.8, 0.0, 0.8)])
def test_ppsd_follows_when_acceptance_changes(stages: int, alphas: tuple[float, ...]) -> None:
    """At least as fast as plain decoding, and within 3 % of ungated decoding."""
    cost, schedule = costs(stages, 3.7, 0.3, 1.5), Schedule(1, stages)
    hits = acceptance(np.repeat(alphas, TOKENS // len(alphas)), TOKENS, 7)
    plain, free, gated = token_times(cost, schedule, hits)
    assert gated.token_time < plain
    assert gated.token_time < free / 0.97


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_draft_then_verify_with_the_gate_is_never_much_slower_than_the_better(stages: int) -> None:
    """A failed round costs much, and rounds vary much, so this is within 6 %."""
    cost = costs(stages, 1.3, 0.3, 0.0)
    for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        plain, free, gated = token_times(cost, ROUNDS, acceptance(alpha, TOKENS, 7))
        assert gated.token_time < min(plain, free) / 0.94, (alpha, plain, free, gated.token_time)


def test_short_requests_on_the_same_workers_share_what_is_known() -> None:
    """Ten requests of 64 tokens, one gate: within 2 % of plain decoding where drafts fail."""
    cost, gate = costs(2, 3.7, 0.3, 1.5), Gate(PPSD_2)
    hits = [acceptance(0.0, 64, seed) for seed in range(10)]
    plain = sum(simulate(cost, Schedule(1, 1), h).seconds for h in hits)
    gated = sum(simulate(cost, PPSD_2, h, gate=gate).seconds for h in hits)
    assert gated < plain / 0.98
