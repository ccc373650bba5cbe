"""The real policy on a virtual clock: what the engine would do with stages of given costs.

Used by sweeps, reports and tests. Time is whole nanoseconds, so equal times are equal, and a
verdict that arrives just when a layer ends is seen there, as in the engine. What is modelled:

* rank 0 carries out one command after the other; between layers, and before it drafts, it takes
  the verdicts that have arrived (Engine._interrupted); it sends before it drafts;
* a later stage serves blocks in order of arrival, so a block's way through all of them follows
  from when it was sent and when each stage is free: no event queue. It is worked out when the
  block has become the oldest one in flight, or when a resync makes it stale;
* a resync publishes an epoch, which stages see ``cancel`` later: from then on they drop stale
  blocks, and one that runs stops before its next layer (Worker._on_block).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ppsd.cost.model import CostModel
from ppsd.errors import ConfigError
from ppsd.speculation.policy import (
    Command,
    Counts,
    Drafted,
    Emit,
    Feed,
    Judged,
    Policy,
    Schedule,
)

RIGHT, WRONG = 0, 1  # the toy target always says RIGHT; a draft says either
NEVER = 2**62  # nanoseconds; when a cancel that takes for ever arrives
NOISE_CHUNK = 4096  # random factors drawn at a time

Slice = tuple[int, int, str, int, int, int]  # start, end, kind, epoch, position, rows


def acceptance(alpha: ArrayLike, tokens: int, seed: int = 0) -> bytes:
    """Whether the draft for each of ``tokens`` positions will be right, one byte each.

    ``alpha`` is one rate, a rate for each position, or a recorded trace of 0 and 1; a sequence
    shorter than ``tokens`` is repeated. The same positions hit in every schedule with one seed.
    """
    rates = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
    if rates.ndim != 1 or not rates.size or not ((rates >= 0) & (rates <= 1)).all():
        raise ConfigError("alpha", alpha, "a rate, or a sequence of rates, in [0, 1]")
    draws = np.random.default_rng(seed).random(tokens)
    return (draws < np.resize(rates, tokens)).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Simulated:
    """What a simulated request cost; times in seconds, lists by stage.

    ``cancelled`` is work that a resync cut short, part of ``busy``. ``slices`` are there when
    tracing, in nanoseconds, for ``engine.trace.TraceLog``.
    """

    tokens: int
    counts: Counts
    seconds: float
    first_token_seconds: float
    busy: list[float]
    cancelled: list[float]
    slices: list[list[Slice]]

    @property
    def token_time(self) -> float:
        """Mean seconds per token after the first."""
        return (self.seconds - self.first_token_seconds) / max(1, self.tokens - 1)

    @property
    def idle(self) -> list[float]:
        """Seconds each stage did nothing."""
        return [self.seconds - busy for busy in self.busy]

    def reports(self) -> list[dict[str, Any]]:
        """The slices as the stages of a real pipeline report them."""
        return [{"slices": lane} for lane in self.slices]


class Times:
    """Nanoseconds of everything for a block of ``rows`` rows, of which ``judge`` are judged.

    Lists hold one entry for each stage behind the first.
    """

    def __init__(self, cost: CostModel, rows: int, judge: int) -> None:
        later = range(1, cost.size)
        self.first_layer = _ns(cost.layer_time(0, rows))
        self.layers = [_ns(cost.layer_time(k, rows)) for k in later]
        self.lm_head = _ns(cost.lm_head * cost.growth(judge)) if judge else 0
        services = [cost.stages[k].layers * self.layers[k - 1] + _ns(cost.overhead) for k in later]
        if services:
            services[-1] += self.lm_head
        hops = [_ns(link.delay(rows * cost.row_bytes)) for link in cost.links[:-1]]
        hops += [_ns(link.delay(0)) for link in cost.links[-1:]]  # a verdict is a few bytes
        self.first_hop = hops[0] if hops else 0
        self.later = list(zip(services, hops[1:], strict=False))


class Sent(NamedTuple):
    """A block on its way; ``at`` is when it reaches stage 1 (or is judged, without a stage 1)."""

    at: int
    verdict: Judged
    rows: int
    times: Times


class Simulator:
    """One request of ``len(hits)`` tokens under ``schedule``; ``run`` may be called once.

    ``hits``: see ``acceptance``. ``jitter`` is the σ of a log-normal factor with mean 1 on every
    forward pass and draft, drawn from ``seed``.
    """

    def __init__(
        self,
        cost: CostModel,
        schedule: Schedule,
        hits: bytes,
        *,
        prompt_tokens: int = 1,
        prefill_chunk: int = 128,
        jitter: float = 0.0,
        seed: int = 0,
        trace: bool = False,
    ) -> None:
        self._cost = cost
        self._hits = hits
        self._prompt = prompt_tokens
        self._policy = Policy(
            schedule,
            max_tokens=len(hits),
            stop_ids=frozenset(),
            prefill_chunk=prefill_chunk,
            prefill_in_flight=cost.size,
        )
        self._epoch = self._policy.epoch
        self._commands: deque[Command] = deque()
        self._sent: deque[Sent] = deque()  # blocks of this epoch whose verdicts are awaited
        self._arrival = NEVER  # of the oldest one's verdict at rank 0
        self._now = 0
        self._free = [0] * (cost.size - 1)  # when a later stage has served all it was sent
        self._busy = [0] * cost.size
        self._cancelled = [0] * cost.size
        self._slices: list[list[Slice]] | None = [[] for _ in range(cost.size)] if trace else None
        self._noise = _noise(jitter, seed) if jitter else None
        self._times: dict[tuple[int, int], Times] = {}
        self._layer, self._layers = _ns(cost.layer_time(0, 1)), cost.exit_layer
        self._draft_time, self._overhead = _ns(cost.head), _ns(cost.overhead)
        self._cancel = NEVER if math.isinf(cost.cancel) else _ns(cost.cancel)

    def run(self) -> Simulated:
        """Decode to the end of the request."""
        first = tokens = 0
        commands, policy = self._commands, self._policy
        commands.extend(policy.start([RIGHT] * self._prompt))
        while commands or not policy.finished:
            if not commands:
                self._wait()
                continue
            command = commands.popleft()
            if isinstance(command, Feed):
                if command.epoch == policy.epoch:
                    self._feed(command)
            elif isinstance(command, Emit):
                first = first if tokens else self._now
                tokens += len(command.tokens)
        return self._result(tokens, first)

    def _wait(self) -> None:
        self._now = max(self._now, self._arrival)
        self._take()

    def _take(self) -> None:
        """Give the policy the oldest verdict, now."""
        verdict = self._sent.popleft().verdict
        self._arrival = NEVER
        self._commands.extend(self._policy.on(verdict))
        if self._policy.epoch != self._epoch:
            self._publish()
        elif self._sent:
            self._arrival = self._serve(self._sent[0])

    def _feed(self, feed: Feed) -> None:
        """Run rows through stage 0, ship a complete block, then draft if asked to."""
        rows = len(feed.tokens)
        layer = self._layer if rows == 1 else self._times_for(rows, feed.judge).first_layer
        if self._noise is not None:
            layer = round(layer * next(self._noise))
        start = self._now
        self._now = end = start + layer * self._layers
        if self._arrival <= end - layer and self._interrupted(feed, start, layer):
            return
        self._record(start, "forward" if feed.judge else "prefill", feed, rows)
        if feed.ship:
            self._ship(feed)
        if feed.draft and not self._overtaken(feed.epoch):
            self._draft(feed)

    def _interrupted(self, feed: Feed, start: int, layer: int) -> bool:
        """Take verdicts before each layer of a forward pass begun at ``start``, as they come."""
        end = self._now
        while self._arrival <= end - layer:
            self._now = start + max(0, -((start - self._arrival) // layer)) * layer
            self._take()
            if self._policy.epoch != feed.epoch:
                self._record(start, "cancelled", feed, len(feed.tokens))
                return True
        self._now = end
        return False

    def _overtaken(self, epoch: int) -> bool:
        """Take the verdicts that have come by now; whether work of ``epoch`` is pointless."""
        while self._arrival <= self._now:
            self._take()
        return self._policy.epoch != epoch

    def _draft(self, feed: Feed) -> None:
        start, position = self._now, feed.position + len(feed.tokens)
        factor = 1.0 if self._noise is None else next(self._noise)
        self._now += self._draft_time if factor == 1.0 else round(self._draft_time * factor)
        self._record(start, "draft", feed, 1)
        token = RIGHT if self._hits[position - self._prompt] else WRONG
        self._commands.extend(self._policy.on(Drafted(feed.epoch, position, token)))

    def _ship(self, feed: Feed) -> None:
        """Send the block on; without a stage to send it to, judge it."""
        end = feed.position + len(feed.tokens)
        rows = end - feed.block
        times = self._times_for(rows, feed.judge)
        start = self._now
        if self._cost.size > 1:
            self._now += self._overhead
            self._busy[0] += self._overhead
        else:
            self._now += times.lm_head
            self._record(start, "verify", feed, feed.judge)
        tokens = (RIGHT,) * feed.judge
        verdict = Judged(feed.epoch, feed.block, end - feed.judge + 1, tokens, self._cost.size - 1)
        self._sent.append(Sent(self._now + times.first_hop, verdict, rows, times))
        if len(self._sent) == 1:
            self._arrival = self._serve(self._sent[0])

    def _publish(self) -> None:
        """Make all blocks on their way stale: stages notice it a moment later."""
        self._epoch = self._policy.epoch
        for sent in self._sent:
            self._serve(sent, self._now + self._cancel)
        self._sent.clear()

    def _serve(self, sent: Sent, until: int = NEVER) -> int:
        """Take a block through the later stages; when its verdict is at rank 0.

        From ``until`` on stages know that it is stale: none starts it, and one stops early.
        """
        free, busy, noise, slices = self._free, self._busy, self._noise, self._slices
        arrival = sent.at
        for k, (service, hop) in enumerate(sent.times.later):
            if noise is not None:
                service = round(service * next(noise))
            start = arrival if arrival > free[k] else free[k]
            end = start + service
            if end > until:
                if start >= until:
                    break
                end = self._stop(sent, k, start, service, until)
            free[k] = end
            busy[k + 1] += end - start
            if slices is not None:
                self._draw(sent, k + 1, start, end, end < start + service)
            arrival = end + hop
        return arrival

    def _stop(self, sent: Sent, k: int, start: int, service: int, until: int) -> int:
        """When the k-th later stage stops the stale block it began at ``start``: before a layer."""
        layer = sent.times.layers[k] * service // sent.times.later[k][0]
        begun = -((start - until) // layer)  # layers begun when the stage can know
        if begun >= self._cost.stages[k + 1].layers:
            return start + service
        self._cancelled[k + 1] += begun * layer
        return start + begun * layer

    def _times_for(self, rows: int, judge: int) -> Times:
        times = self._times.get((rows, judge))
        if times is None:
            times = self._times[rows, judge] = Times(self._cost, rows, judge)
        return times

    def _record(self, start: int, kind: str, feed: Feed, rows: int) -> None:
        """Account for rank 0's own work from ``start`` until now."""
        self._busy[0] += self._now - start
        if kind == "cancelled":
            self._cancelled[0] += self._now - start
        if self._slices is not None and self._now > start:
            self._slices[0].append((start, self._now, kind, feed.epoch, feed.position, rows))

    def _draw(self, sent: Sent, stage: int, start: int, end: int, cancelled: bool) -> None:
        assert self._slices is not None
        verdict = sent.verdict
        kind = "cancelled" if cancelled else "verify" if verdict.tokens else "prefill"
        self._slices[stage].append((start, end, kind, verdict.epoch, verdict.block, sent.rows))

    def _result(self, tokens: int, first: int) -> Simulated:
        return Simulated(
            tokens=tokens,
            counts=self._policy.counts,
            seconds=self._now / 1e9,
            first_token_seconds=first / 1e9,
            busy=[busy / 1e9 for busy in self._busy],
            cancelled=[cancelled / 1e9 for cancelled in self._cancelled],
            slices=self._slices or [],
        )


def simulate(cost: CostModel, schedule: Schedule, hits: bytes, **options: Any) -> Simulated:
    """Run a Simulator with its ``options`` once."""
    return Simulator(cost, schedule, hits, **options).run()


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _noise(sigma: float, seed: int) -> Iterator[float]:
    """Log-normal factors with mean 1."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.lognormal(-(sigma**2) / 2, sigma, NOISE_CHUNK).tolist()
