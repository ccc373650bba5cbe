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

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ppsd.errors import ConfigError
from ppsd.lab.times import Sent, Times, nanoseconds, noise
from ppsd.plan.model import CostModel
from ppsd.speculation.gate import Gate
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
REPEATABLE = ("prompt_tokens", "prefill_chunk", "seed")  # options that leave a run repetitive
REPLAY_FROM = 10_000  # tokens from which on looking for repetition pays

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


class Simulator:
    """One request of ``len(hits)`` tokens under ``schedule``; ``run`` may be called once.

    ``hits``: see ``acceptance``. ``jitter`` is the σ of a log-normal factor with mean 1 on every
    forward pass and draft, drawn from ``seed``.
    """

    _due: Feed  # the one whose draft is due

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
        gate: Gate | None = None,
    ) -> None:
        self._cost = cost
        self._gate = gate
        self._hits = hits
        self._prompt = prompt_tokens
        self.policy = Policy(
            schedule,
            max_tokens=len(hits),
            stop_ids=frozenset(),
            prefill_chunk=prefill_chunk,
            prefill_in_flight=cost.size,
        )
        self._epoch = self.policy.epoch
        self._commands: deque[Command] = deque()
        self._sent: deque[Sent] = deque()  # blocks of this epoch whose verdicts are awaited
        self._arrival = NEVER  # of the oldest one's verdict at rank 0
        self.now = 0
        self._free = [0] * (cost.size - 1)  # when a later stage has served all it was sent
        self.busy = [0] * cost.size
        self.cancelled = [0] * cost.size
        self._slices: list[list[Slice]] | None = [[] for _ in range(cost.size)] if trace else None
        self._noise = noise(jitter, seed) if jitter else None
        self.first = self.tokens = 0  # when the first token came; how many have come
        self._times: dict[tuple[int, int], Times] = {}
        self._layer, self._layers = nanoseconds(cost.layer_time(0, 1)), cost.exit_layer
        self._draft_time, self._overhead = nanoseconds(cost.head), nanoseconds(cost.overhead)
        self._cancel = NEVER if math.isinf(cost.cancel) else nanoseconds(cost.cancel)

    def run(self) -> Simulated:
        """Decode to the end of the request."""
        self.start()
        while (position := self.until_draft()) is not None:
            self.draft(RIGHT if self._hits[position - self._prompt] else WRONG)
        return self.result()

    def start(self) -> None:
        """Begin with a prompt of zeros."""
        if self._gate is not None:
            self._gate.begin(self.policy, 0.0)
        self._commands.extend(self.policy.start([RIGHT] * self._prompt))

    def until_draft(self) -> int | None:
        """Go on until a draft is due; return its position, None at the end of the request."""
        commands, policy = self._commands, self.policy
        while commands or not policy.finished:
            if not commands:
                self._wait()
                continue
            command = commands.popleft()
            if isinstance(command, Feed):
                if command.epoch == policy.epoch and self._feed(command):
                    self._due = command
                    return command.position + len(command.tokens)
            elif isinstance(command, Emit):
                self.first = self.first if self.tokens else self.now
                self.tokens += len(command.tokens)
        return None

    def _wait(self) -> None:
        self.now = max(self.now, self._arrival)
        self._take()

    def _take(self) -> None:
        """Give the policy the oldest verdict, now."""
        verdict = self._sent.popleft().verdict
        self._arrival = NEVER
        self._commands.extend(self.policy.on(verdict))
        if self._gate is not None:
            self._gate.watch(self.policy, self.now / 1e9)
        if self.policy.epoch != self._epoch:
            self._publish()
        elif self._sent:
            self._arrival = self._serve(self._sent[0])

    def _feed(self, feed: Feed) -> bool:
        """Run rows through stage 0 and ship a complete block; whether a draft is due then."""
        rows = len(feed.tokens)
        layer = self._layer if rows == 1 else self._times_for(rows, feed.judge).first_layer
        if self._noise is not None:
            layer = round(layer * next(self._noise))
        start = self.now
        self.now = end = start + layer * self._layers
        if self._arrival <= end - layer and self._interrupted(feed, start, layer):
            return False
        self._record(start, "forward" if feed.judge else "prefill", feed, rows)
        if feed.ship:
            self._ship(feed)
        return feed.draft and not self._overtaken(feed.epoch)

    def _interrupted(self, feed: Feed, start: int, layer: int) -> bool:
        """Take verdicts before each layer of a forward pass begun at ``start``, as they come."""
        end = self.now
        while self._arrival <= end - layer:
            self.now = start + max(0, -((start - self._arrival) // layer)) * layer
            self._take()
            if self.policy.epoch != feed.epoch:
                self._record(start, "cancelled", feed, len(feed.tokens))
                return True
        self.now = end
        return False

    def _overtaken(self, epoch: int) -> bool:
        """Take the verdicts that have come by now; whether work of ``epoch`` is pointless."""
        while self._arrival <= self.now:
            self._take()
        return self.policy.epoch != epoch

    def draft(self, token: int) -> None:
        """Let the exit head say ``token`` where a draft is due."""
        start, feed = self.now, self._due
        factor = 1.0 if self._noise is None else next(self._noise)
        self.now += self._draft_time if factor == 1.0 else round(self._draft_time * factor)
        self._record(start, "draft", feed, 1)
        event = Drafted(feed.epoch, feed.position + len(feed.tokens), token)
        self._commands.extend(self.policy.on(event))

    def _ship(self, feed: Feed) -> None:
        """Send the block on; without a stage to send it to, judge it."""
        end = feed.position + len(feed.tokens)
        rows = end - feed.block
        times = self._times_for(rows, feed.judge)
        start = self.now
        if self._cost.size > 1:
            self.now += self._overhead
            self.busy[0] += self._overhead
        else:
            self.now += times.lm_head
            self._record(start, "verify", feed, feed.judge)
        tokens = (RIGHT,) * feed.judge
        verdict = Judged(feed.epoch, feed.block, end - feed.judge + 1, tokens, self._cost.size - 1)
        self._sent.append(Sent(self.now + times.first_hop, verdict, rows, times))
        if len(self._sent) == 1:
            self._arrival = self._serve(self._sent[0])

    def _publish(self) -> None:
        """Make all blocks on their way stale: stages notice it a moment later."""
        self._epoch = self.policy.epoch
        for sent in self._sent:
            self._serve(sent, self.now + self._cancel)
        self._sent.clear()

    def _serve(self, sent: Sent, until: int = NEVER) -> int:
        """Take a block through the later stages; when its verdict is at rank 0.

        From ``until`` on stages know that it is stale: none starts it, and one stops early.
        """
        free, busy, noise, slices = self._free, self.busy, self._noise, self._slices
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
        self.cancelled[k + 1] += begun * layer
        return start + begun * layer

    def _times_for(self, rows: int, judge: int) -> Times:
        times = self._times.get((rows, judge))
        if times is None:
            times = self._times[rows, judge] = Times(self._cost, rows, judge)
        return times

    def _record(self, start: int, kind: str, feed: Feed, rows: int) -> None:
        """Account for rank 0's own work from ``start`` until now."""
        self.busy[0] += self.now - start
        if kind == "cancelled":
            self.cancelled[0] += self.now - start
        if self._slices is not None and self.now > start:
            self._slices[0].append((start, self.now, kind, feed.epoch, feed.position, rows))

    def _draw(self, sent: Sent, stage: int, start: int, end: int, cancelled: bool) -> None:
        assert self._slices is not None
        verdict = sent.verdict
        kind = "cancelled" if cancelled else "verify" if verdict.tokens else "prefill"
        self._slices[stage].append((start, end, kind, verdict.epoch, verdict.block, sent.rows))

    def state(self) -> tuple[object, ...]:
        """All that decides what happens from here, where a draft is due, but the coming drafts.

        Times and positions are relative, so runs in equal states go on alike, however far they
        are. What follows a wrong draft will be dropped whatever it is.
        """
        now, base, drafts = self.now, self.policy.committed, self.policy.drafts
        wrong = drafts.index(WRONG) if WRONG in drafts else len(drafts)
        sent = tuple((s.at - now, s.verdict.block - base, s.rows) for s in self._sent)
        waiting = min([now, *(s.at for s in self._sent)])  # no stage looks at what was earlier
        free = tuple(max(time, waiting) - now for time in self._free)
        commands = tuple(_relative(command, base, self._epoch) for command in self._commands)
        due = _relative(self._due, base, self._epoch)
        policy = self.policy.progress
        arrival = None if self._arrival == NEVER else self._arrival - now
        return wrong, sent, free, arrival, commands, due, policy

    def copy(self) -> Simulator:
        """A simulation that goes on from here by itself; without jitter or trace only."""
        other = copy.copy(self)
        other.policy = copy.deepcopy(self.policy)
        other._commands, other._sent = self._commands.copy(), self._sent.copy()
        other._free = self._free.copy()
        other.busy, other.cancelled = self.busy.copy(), self.cancelled.copy()
        return other

    def figures(self) -> tuple[int, ...]:
        """All that adds up: time, tokens, counts, and each stage's work done and cut short."""
        counts = self.policy.counts
        added = (self.now, self.tokens, *(getattr(counts, f.name) for f in fields(counts)))
        return (*added, *self.busy, *self.cancelled)

    def result(self, figures: Sequence[int] | None = None) -> Simulated:
        """What the run cost; ``figures``, when given, in place of its own."""
        now, tokens, *rest = figures or self.figures()
        size, names = self._cost.size, [f.name for f in fields(Counts)]
        stages = [value / 1e9 for value in rest[len(names) :]]
        return Simulated(
            tokens=tokens,
            counts=Counts(**dict(zip(names, rest, strict=False))),
            seconds=now / 1e9,
            first_token_seconds=self.first / 1e9,
            busy=stages[:size],
            cancelled=stages[size:],
            slices=self._slices or [],
        )


def simulate(cost: CostModel, schedule: Schedule, hits: bytes, **options: Any) -> Simulated:
    """Simulate one request with the ``options`` of Simulator.

    Without jitter or trace a long run is replayed, to the same nanosecond (replay.py).
    """
    from ppsd.lab.replay import replay

    varied = any(value for name, value in options.items() if name not in REPEATABLE)
    if varied or not schedule.drafts or len(hits) < REPLAY_FROM:
        return Simulator(cost, schedule, hits, **options).run()
    return replay(cost, schedule, hits, **options)


def _relative(command: Command, base: int, epoch: int) -> tuple[object, ...]:
    """A command without its place: equal ones do the same."""
    if not isinstance(command, Feed):
        return command
    place = (command.position - base, command.block - base, len(command.tokens))
    return (*place, command.epoch - epoch, command.judge, command.ship, command.draft)
