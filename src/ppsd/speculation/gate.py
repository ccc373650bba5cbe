"""The goodput gate: pauses speculation while it does not pay, and tries it again later.

A pure object beside the policy: time is an argument, so the engine (wall clock) and the simulator
(virtual clock) drive the same one. It sees no tokens. What it compares is the time per committed
token while speculating with that of plain decoding, A, on the same workers:

* A is measured in pauses, from tokens that entered an empty pipeline. Until then the latency after
  a miss stands for it: A is that latency less the wait for stage 0, at least ``SURE`` of it. So
  where drafts are clearly good, no pause is needed to measure A.
* Speculation is paused once it has lost more than one perfect step would gain, so the proof costs
  no more than it may be worth (as in ski rental); less is enough as evidence grows to ``WINDOW``.
* A pause begins with ``PROBE`` plain tokens. If they show that speculation gains, it is over.
* While prompts of other requests pass through the stages, all takes longer. What was measured then
  stands for A until there is better, and is soon measured again.
* Pauses double while retries fail, up to the length at which retries lose ``BUDGET`` of the time.

Requests that are under way together are judged together: drafts of one make the rows of others
wait, so one that pauses alone gains nothing. Their times per token are pooled, and all pause. As
much of each counts as of one alone, or chance would decide as many times as often; what they may
lose together grows as chance does, with the root of their number.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple, Protocol

from ppsd.speculation.policy import Schedule

# Of each request under way:
WINDOW, KEPT = 32, 8  # verdicts that count, and those that count in the next request
SAMPLES, PROBE = 16, 3  # plain tokens that count, and those that are enough to decide
CLIP = 3.0  # what took longer than so many usual times was a disturbance, and is cut to that
SURE = 0.8  # A over the latency after a miss, at least
NO_MISS = 256  # verdicts without a miss, hence without a bound on A, after which it is measured
RECHECKS = ((0.95, 64), (0.7, 1024))  # where speculation takes more than (share of A), A may be
# (tokens) old; the first doubles each time it turns out right
FIRST, SHORTEST = 20, 32  # a pause's tokens: for each token lost, and at least
BUDGET = 0.005  # share of the time that retries may lose


class Policy(Protocol):
    """What a gate sees of a policy, of chains or of waves, and does to it."""

    @property
    def emitted(self) -> int: ...

    @property
    def finished(self) -> bool: ...

    @property
    def restarted(self) -> bool: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Step(NamedTuple):
    """From one verdict to the next: seconds, tokens committed, whether it began empty.

    ``crowded``: prompts of other requests passed meanwhile.
    """

    seconds: float
    tokens: int
    fresh: bool
    crowded: bool


@dataclass
class Switches:
    """What the gate did in one request: ``(time, paused)`` of every switch, and counts.

    ``plain`` is the time of a plain token as measured in pauses, ``latency`` that of a token after
    a miss; None where there was none yet.
    """

    pauses: int = 0
    paused_tokens: int = 0
    times: list[tuple[float, bool]] = field(default_factory=list)
    plain: float | None = None
    latency: float | None = None

    @property
    def plain_bounds(self) -> tuple[float, float] | None:
        """Return a plain token's least and most time: equal if measured, None if nothing was."""
        if self.plain is not None:
            return self.plain, self.plain
        return None if self.latency is None else (SURE * self.latency, self.latency)

    def note(self, now: float, *, paused: bool) -> None:
        """Note a switch."""
        self.pauses += paused
        self.times.append((now, paused))

    def pauses_until(self, end: float) -> list[tuple[float, float]]:
        """Return from when to when speculation was paused, in a request that ended at ``end``."""
        ends = [time for time, paused in self.times if not paused]
        starts = [time for time, paused in self.times if paused]
        return list(zip(starts, [*ends, end], strict=False))


@dataclass
class Watched:
    """A request under way: tokens so far, its last verdict's time; paused, empty, crowded then."""

    switches: Switches
    emitted: int = 0
    last: tuple[float, bool, bool, bool] | None = None


class Gate:
    """Decides for one schedule on one set of workers; what it learns outlives a request.

    ``begin`` before a request starts, ``watch`` after each verdict that the policy has taken, and
    ``end`` when it is over. Times are seconds of any clock that only goes forward.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.plain: float | None = None  # A
        self._long = schedule.block > 1
        self._perfect = schedule.block - 1 / schedule.in_flight  # gain of a step, plain tokens
        self._steps: deque[Step] = deque()
        self._latency: float | None = None  # after a miss
        self._samples: deque[float] = deque()
        self._crowded = False  # the samples are, for want of others
        self._age = 0  # tokens since the last of them
        self._trust = RECHECKS[0][1]  # how old A may be where the margin is thin
        self.paused = self._long  # a long block's latency says little of A: it is measured first
        self._probing = self._long
        self._length = self._left = 0  # tokens of this pause, in all and to come
        self._failed = 0  # pauses in a row
        self._running: dict[Policy, Watched] = {}
        self._size = 0  # of them have had a verdict

    def begin(self, policy: Policy, now: float) -> Switches:
        """Start with a new request; return what will be noted of it.

        Where no other is under way, a new text is worth a retry after half the pause.
        """
        switches = Switches(plain=self.plain, latency=self._latency)
        if not self._running:
            while len(self._steps) > KEPT:
                self._steps.popleft()
            self._left -= self._length // 2
            if self.paused and not self._probing and self._left <= 0:
                self.paused = False
                self._steps.clear()
        self._running[policy] = Watched(switches)
        if self.paused:
            policy.pause()
            switches.note(now, paused=True)
        return switches

    def end(self, policy: Policy) -> None:
        """Forget a request that is over."""
        self._size -= self._running.pop(policy).last is not None

    def watch(self, policy: Policy, now: float) -> None:
        """Take the time of a verdict that ``policy`` has acted upon; pause or resume it."""
        one = self._running[policy]
        tokens = policy.emitted - one.emitted
        if not tokens or policy.finished:
            return
        one.emitted += tokens
        last = one.last
        self._size += last is None
        crowded = self._size < len(self._running)
        one.last = now, self.paused, policy.restarted, crowded
        if last is not None:
            time, was_paused, empty, was_crowded = last
            self._measure(Step(now - time, tokens, empty, was_crowded or crowded), was_paused)
            one.switches.plain, one.switches.latency = self.plain, self._latency
        if self.paused:
            one.switches.paused_tokens += tokens
            self._left -= tokens
            if self._pause_is_over():
                self._switch(now, paused=False)
        elif self._loses() or self._doubtful():
            self._probing = True
            self._samples.clear()
            self._switch(now, paused=True)

    def _switch(self, now: float, *, paused: bool) -> None:
        self.paused = paused
        for policy, one in self._running.items():
            (policy.pause if paused else policy.resume)()
            one.switches.note(now, paused=paused)

    def _measure(self, step: Step, was_paused: bool) -> None:
        self._age += step.tokens
        if not was_paused:
            self._steps.append(step)
            while len(self._steps) > WINDOW * self._size:
                self._steps.popleft()
            if not self._long and (fresh := self._fresh()):
                self._latency = median(fresh)
        elif step.fresh and not (step.crowded and self._samples and not self._crowded):
            if self._crowded and not step.crowded:
                self._samples.clear()
            self._age, self._crowded = 0, step.crowded
            self._samples.append(step.seconds)
            while len(self._samples) > SAMPLES * self._size:
                self._samples.popleft()
            most = CLIP * median(self._samples)
            self.plain = fmean(min(sample, most) for sample in self._samples)

    def _fresh(self) -> list[float]:
        return [step.seconds for step in self._steps if step.fresh]

    def _reference(self) -> float | None:
        """Return A as far as known: never above the latency seen lately, which ages less."""
        if self._latency is None or self.plain is None:
            return self.plain if self._latency is None else SURE * self._latency
        return min(self.plain, self._latency) if self._fresh() else self.plain

    def _share(self, plain: float) -> float:
        """Return the time per token while speculating over ``plain``."""
        most = CLIP * max(plain, median(step.seconds for step in self._steps))
        return sum(min(step.seconds, most) for step in self._steps) / (plain * self._tokens())

    def _tokens(self) -> int:
        return sum(step.tokens for step in self._steps)

    def _loses(self) -> bool:
        plain, seen = self._reference(), len(self._steps)
        if plain is None or not seen:
            return False
        allowed = self._perfect * math.sqrt(self._size)
        return self._lost(plain) > allowed * (1 - seen / (WINDOW * self._size))

    def _lost(self, plain: float) -> float:
        """Return what speculation has cost, in plain tokens."""
        return (self._share(plain) - 1) * self._tokens()

    def _doubtful(self) -> bool:
        """Return True if A is to be measured though speculation seems to pay."""
        if self.plain is None:
            return self._latency is None and self._age >= NO_MISS * self._size
        if len(self._steps) < KEPT * self._size:
            return False
        share = self._share(self._reference() or self.plain)
        (thin, _), (clear, late) = RECHECKS
        trust = self._trust if share > thin or self._crowded else late
        return share > clear and self._age > trust * self._size

    def _pause_is_over(self) -> bool:
        if self._probing and len(self._samples) < PROBE * self._size:
            return False
        if self._probing:
            self._probing = False
            return not self._stays()
        if self._left <= 0:
            self._steps.clear()
        return self._left <= 0

    def _stays(self) -> bool:
        """Decide, with A just measured, whether to stay paused and for how long."""
        lost = self._lost(self._reference() or 0) if self._steps else -1.0
        if lost < 0:  # a gain: that no loss is certain would not be enough to go on
            self._failed = 0
            if not self._crowded:
                self._trust = min(2 * self._trust, RECHECKS[1][1])
            return False
        shortest = SHORTEST * self._size
        longest = max(shortest, round(lost / BUDGET))
        self._length = min(max(shortest, round(lost * FIRST)) << self._failed, longest)
        self._left = self._length
        self._failed += 1
        self._trust = RECHECKS[0][1]
        return True
