"""Stages and links of given costs on virtual clocks, for the real engine and the real stage loop.

Every rank has a clock of its own, in whole nanoseconds, so equal times are equal. A message carries
the time at which it arrives. All runs in one thread, by one observation: nothing that a stage does
can change before rank 0 has taken the next answer. So stages work only when rank 0 asks for that
answer, what ends first before the rest, and none that ends later than the answer comes; each knows
already which epochs were published meanwhile, and when.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

from ppsd.engine.drafter import DraftState, Given
from ppsd.engine.links import Answer
from ppsd.errors import ConfigError
from ppsd.lab.clocks import Clock, Published, nanoseconds, noise
from ppsd.model.passes import Pass, Piece, Place, Watch
from ppsd.plan.model import CostModel
from ppsd.worker.judge import Judge
from ppsd.worker.messages import Begin, Block, Message, Verdict
from ppsd.worker.recorder import Recorder
from ppsd.worker.wave_messages import Verdicts, Wave

RIGHT, WRONG = 0, 1  # the toy target always says RIGHT; a draft says either
NEVER = 2**62  # nanoseconds; when a cancel that takes for ever arrives
LOGITS = 64  # more than there are toy tokens
SENDING = "send"  # what a recorder calls the time between two blocks
HEAD = -1  # the lane of noise behind those of the stages


class VirtualPipeline:
    """Clocks, messages on their way and published epochs of a pipeline of ``cost``.

    ``jitter`` is the σ of a log-normal factor with mean 1 on every pass and draft.
    """

    def __init__(self, cost: CostModel, *, jitter: float, seed: int, trace: bool) -> None:
        self.cost = cost
        self.clocks = [Clock() for _ in cost.stages]
        self.recorders = [Recorder(trace, clock) for clock in self.clocks]
        self.inboxes: list[deque[tuple[int, Message]]] = [deque() for _ in cost.stages]
        self._ends: list[int | None] = [NEVER for _ in cost.stages]  # None: find it anew
        self.answers: list[tuple[int, int, Answer]] = []  # (arrival, number, …) in this order
        self._answered = 0
        self.judged = 0  # rows of the last stage's newest pass
        self._published: dict[int, Published] = defaultdict(Published)  # by slot
        self._changes: list[int] = []  # when stages see any of them
        self.overhead = nanoseconds(cost.overhead) if cost.size > 1 else 0
        self.cancel = NEVER if math.isinf(cost.cancel) else nanoseconds(cost.cancel)
        self._noise = noise(jitter, seed, cost.size + 1) if jitter else None
        # Caches of this pipeline alone: on the class they would keep every pipeline alive.
        self.hop = functools.cache(self._hop)
        self.layer = functools.cache(self._layer)
        self.lm_head = functools.cache(self._lm_head)
        self.workers: list[Any] = []  # those of ranks 1, 2, …, set by whoever makes them

    def jittered(self, time: int, lane: int, position: int) -> int:
        """Return ``time`` as it turns out at a position: the same in every schedule.

        ``lane`` is a rank, whose layers and LM head are slow together, or HEAD for the exit head.
        """
        if self._noise is None:
            return time
        factors = self._noise[lane]
        return round(time * factors[position % len(factors)])

    def deliver(self, source: int, to: int, message: Message) -> None:
        """Send a message from ``source``, whose clock says when, to ``to``."""
        clock = self.clocks[source]
        delay = 0
        if isinstance(message, Block | Wave | Verdict | Verdicts):
            self.recorders[source].busy_ns[SENDING] += self.overhead
            clock.now += self.overhead
            delay = self.hop(source, rows_in(message))
        if to:
            if not self.inboxes[to]:
                self._ends[to] = None
            self.inboxes[to].append((clock.now + delay, message))
        else:
            self._answered += 1
            assert isinstance(message, Answer)
            insort(self.answers, (clock.now + delay, self._answered, message))

    def _hop(self, source: int, rows: int) -> int:
        """Return nanoseconds on the link that leaves stage ``source``."""
        return nanoseconds(self.cost.links[source].delay(rows * self.cost.row_bytes))

    def _layer(self, rank: int, rows: int) -> int:
        """Return nanoseconds of one layer for ``rows`` rows together."""
        return nanoseconds(self.cost.layer_time(rank, rows))

    def _lm_head(self, rows: int) -> int:
        """Return nanoseconds of the LM head for ``rows`` rows together."""
        return nanoseconds(self.cost.lm_head * self.cost.growth(rows)) if rows else 0

    def newest(self, slot: int) -> int:
        """Return the newest epoch that rank 0 has published of a slot."""
        return self._published[slot].epochs[-1]

    def publish(self, slot: int, epoch: int) -> None:
        """Let stages see a new epoch a moment from now."""
        if epoch > self.newest(slot):
            seen_at = self.clocks[0].now + self.cancel
            self._published[slot].add(seen_at, epoch)
            self._changes.append(seen_at)

    def epoch(self, rank: int, slot: int) -> int:
        """Return the newest epoch that a stage behind the first sees now."""
        return self._published[slot].at(self.clocks[rank].now)

    def next_epoch(self, rank: int) -> int:
        """Return when the stage sees another epoch than now, as far as is decided yet."""
        following = bisect_right(self._changes, self.clocks[rank].now)
        return self._changes[following] if following < len(self._changes) else NEVER

    def next_answer(self) -> int:
        """Return when the next answer is at rank 0: let the stages work for it."""
        while True:
            arrival = self.answers[0][0] if self.answers else NEVER
            if not self.work(arrival):
                return arrival

    def work(self, until: int = NEVER) -> bool:
        """Let the stage work that is done first; return False if none is before ``until``."""
        ends, first, last = self._ends, NEVER, 0
        for worker in self.workers:
            rank = worker.rank
            end = ends[rank]
            if end is None:
                end = ends[rank] = self._end(rank)
            if end <= first:
                first, last = end, rank
        if first >= until:
            return False
        ends[last] = None
        return bool(self.workers[last - 1].step(0.0))

    def _end(self, rank: int) -> int:
        """Return when a stage will be done with its oldest message, unless rows of it die."""
        if not self.inboxes[rank]:
            return NEVER
        arrival, message = self.inboxes[rank][0]
        end = max(arrival, self.clocks[rank].now)
        if isinstance(message, Block) and message.joins:
            return end
        joining = self.workers[rank - 1].joining
        first = joining or message
        rows = rows_in(message) + rows_in(joining)
        if rows and isinstance(first, Block | Wave):
            position = first.rows[0].position if isinstance(first, Wave) else first.position
            layer = self.jittered(self.layer(rank, rows), rank, position)
            end += layer * self.cost.stages[rank].layers
            if rank == self.cost.size - 1:
                end += self.jittered(self.lm_head(1), rank, position)
        return end


class VirtualWatch(Watch):
    """Knows when what a pass looks at will change next."""

    def __init__(self, pipeline: VirtualPipeline, rank: int) -> None:
        super().__init__(())
        self._pipeline = pipeline
        self._rank = rank

    def look(self) -> None:
        """Need nothing: the clock says what has been seen."""

    def next_change(self) -> int:
        """Return the time of the next change."""
        if self._rank == 0:
            return self._pipeline.next_answer()
        return self._pipeline.next_epoch(self._rank)


class VirtualStage:
    """A stage whose layers take time and compute nothing."""

    def __init__(self, pipeline: VirtualPipeline, rank: int) -> None:
        self.is_last = rank == pipeline.cost.size - 1
        self._pipeline = pipeline
        self._rank = rank
        self._watch = VirtualWatch(pipeline, rank)

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        return self._pass(inputs.shape[0], position)

    def _pass(self, rows: int, position: int) -> VirtualPass:
        pipeline, rank = self._pipeline, self._rank
        if self.is_last:
            pipeline.judged = 0
        layer = pipeline.layer(rank, rows)
        layer = pipeline.jittered(layer, rank, position)
        layers = pipeline.cost.stages[rank].layers
        return VirtualPass(self._watch, pipeline.clocks[rank], layer, layers, rows)

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return self.start(inputs, places[0].position)

    def start_joined(self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return self._pass(len(piece.inputs) + len(inputs), piece.position)

    def share(self, source: int, slot: int, length: int) -> None:
        """Need nothing."""

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Keep nothing."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits by which RIGHT is the token, as a judge of waves asks for."""
        self._judge(hidden)
        return torch.zeros(hidden.shape[0], LOGITS)

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the same: all are equal."""
        return self.logits(hidden)

    def _judge(self, hidden: torch.Tensor) -> None:
        """Take the time of the LM head: for all rows of a pass together, however they come."""
        pipeline = self._pipeline
        before, pipeline.judged = pipeline.judged, pipeline.judged + hidden.shape[0]
        more = pipeline.lm_head(pipeline.judged) - pipeline.lm_head(before)
        pipeline.clocks[self._rank].now += more


class VirtualPass:
    """A pass of rows: it ends, or stops before the first layer that begins after a change.

    It knows by itself what changes, and when.
    """

    def __init__(
        self, watch: VirtualWatch, clock: Clock, layer: int, layers: int, rows: int
    ) -> None:
        self.hidden = _rows(rows)
        self._watch = watch
        self._clock = clock
        self._layer = layer
        self._layers = layers
        self._start = clock.now

    def advance(self, watch: Watch | None = None) -> bool:
        change = self._watch.next_change()
        if change < self._start + (self._layers - 1) * self._layer + 1:
            begun = max(0, -((self._start - change) // self._layer))
            self._clock.now = self._start + begun * self._layer
            return False
        self._clock.now = self._start + self._layers * self._layer
        return True


class VirtualJudge(Judge):
    """The last stage's LM head, which takes time and always says RIGHT."""

    def __init__(self, pipeline: VirtualPipeline, max_context: int = 1) -> None:
        self._last = pipeline.cost.size - 1
        super().__init__(VirtualStage(pipeline, self._last), self._last, max_context)
        self._pipeline = pipeline

    def verdict(self, block: Block, hidden: torch.Tensor) -> Verdict:
        pipeline, rows = self._pipeline, len(block.tokens)
        lm_head = pipeline.lm_head(block.judge)
        lm_head = pipeline.jittered(lm_head, self._last, block.position)
        pipeline.clocks[self._last].now += lm_head
        tokens = (RIGHT,) * block.judge
        if block.judge:
            slot = self._slot(block.slot)
            slot.node, slot.token = block.epoch, RIGHT
        return Verdict(block.slot, block.epoch, self._last, block.position, rows, tokens)


class VirtualDrafter:
    """An exit head that takes time and is right where ``hits`` says so, from ``first`` on."""

    feedback = False

    def __init__(self, pipeline: VirtualPipeline, hits: bytes, first: int) -> None:
        self._pipeline = pipeline
        self._hits = hits
        self._first = first
        self._time = nanoseconds(pipeline.cost.head)

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        """Need nothing."""

    def draft(self, state: DraftState, given: Given) -> int:
        position = given.history.shape[0]
        self._pipeline.clocks[0].now += self._pipeline.jittered(self._time, HEAD, position)
        return RIGHT if self._hits[position - self._first] else WRONG


class VirtualLinks:
    """Rank 0's links to virtual stages (engine.links.Links)."""

    def __init__(self, pipeline: VirtualPipeline) -> None:
        self.size = pipeline.cost.size
        self.asked = 0
        self._pipeline = pipeline
        self._clock = pipeline.clocks[0]
        self._watch = VirtualWatch(pipeline, 0)

    def epoch(self, slot: int) -> int:
        return self._pipeline.newest(slot)

    def publish(self, slot: int, epoch: int) -> None:
        self._pipeline.publish(slot, epoch)

    def watch(self) -> VirtualWatch:
        return self._watch

    def send(self, message: Begin | Block | Wave) -> None:
        self._pipeline.deliver(0, 1, message)

    def poll(self) -> Answer | None:
        return self._take() if self._pipeline.next_answer() <= self._clock.now else None

    def wait(self) -> Answer:
        self._clock.now = max(self._clock.now, self._pipeline.next_answer())
        return self._take()

    def report(self) -> list[dict[str, Any]]:
        """Let the stages finish what is on its way; return what each did."""
        while self._pipeline.work():
            pass
        return [recorder.take() for recorder in self._pipeline.recorders[1:]]

    @property
    def busy_ns(self) -> list[int]:
        return [recorder.total_ns for recorder in self._pipeline.recorders[1:]]

    def ask(self) -> None:
        pass

    def close(self) -> None:
        """Need nothing."""

    def _take(self) -> Answer:
        if not self._pipeline.answers:
            raise ConfigError(
                "simulated time", "over 146 years", "shorter: fewer tokens, or faster"
            )
        return self._pipeline.answers.pop(0)[2]


class VirtualLink:
    """The link of a stage behind the first (worker.link.Link)."""

    def __init__(self, pipeline: VirtualPipeline, rank: int) -> None:
        self._pipeline = pipeline
        self._rank = rank
        self._clock = pipeline.clocks[rank]
        self._watch = VirtualWatch(pipeline, rank)

    def receive(self, timeout: float) -> Message | None:
        inbox = self._pipeline.inboxes[self._rank]
        if not inbox:
            return None
        arrival, message = inbox.popleft()
        self._clock.now = max(self._clock.now, arrival)
        return message

    def send(self, to: int, message: Message) -> None:
        self._pipeline.deliver(self._rank, to, message)

    def epoch(self, slot: int) -> int:
        return self._pipeline.epoch(self._rank, slot)

    def watch(self, *slots: int) -> VirtualWatch:
        return self._watch


@functools.cache
def _rows(count: int) -> torch.Tensor:
    return torch.zeros(count, 1)


def rows_in(message: Message | None) -> int:
    """Return how many rows of hidden states a message carries."""
    return message.hidden.shape[0] if isinstance(message, Block | Wave) else 0
