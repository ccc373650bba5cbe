"""The engine: events go to the policies of its sequences, their commands go to the pipeline.

It knows token ids only, no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

import torch

from ppsd.engine.events import FedBlock, Left, Made
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.links import Answer, Links
from ppsd.engine.rejection import redraw
from ppsd.engine.sequence import HeldRows, Request, Sequence, begin_message
from ppsd.errors import RequestError
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Command, Emit, Feed, Finish, Judged, Policy, Schedule
from ppsd.speculation.sampling import Stream
from ppsd.speculation.waves import WavePolicy
from ppsd.worker.messages import Block, Refusal, Verdict
from ppsd.worker.scores import Scores
from ppsd.worker.slot import sampler_of

Output = Emit | Finish


class Engine:
    """Decodes requests under one schedule. ``step`` is the whole loop.

    Requests wait until a slot is free; there are as many ``slots`` as sequences can be under way.
    ``gate`` pauses speculation while it does not pay; without one it is never paused.
    """

    def __init__(
        self,
        stage: FirstStage,
        links: Links,
        schedule: Schedule,
        *,
        max_context: int,
        acceptance: str = "coupled",
        prefill_chunk: int = 128,
        gate: Gate | None = None,
        slots: int = 1,
    ) -> None:
        self.stage = stage
        self.links = links
        self.schedule = schedule
        self.gate = gate
        self._rejection = acceptance == "rejection"
        stage.draft_stream = Stream.DRAFT if self._rejection else Stream.TARGET
        stage.drafting = schedule.drafts and stage.drafter is not None
        self._prefill_chunk = prefill_chunk
        self._held = [HeldRows(slot, max_context, prefill_chunk) for slot in range(slots)]
        self._free = list(range(slots))
        self._running: deque[Sequence] = deque()  # rotated, so that all get their turn
        self._slots: dict[int, Sequence] = {}  # the same, by slot
        self._max_context = max_context
        self.opinions = False  # whether heads on later boundaries are to speak

    @property
    def has_room(self) -> bool:
        """Tell if a request could begin at once."""
        return bool(self._free)

    @property
    def busy(self) -> bool:
        """Tell if a sequence is under way, so that ``step`` has something to do."""
        return bool(self._running)

    @property
    def cache_used(self) -> float:
        """Return the share of all positions that hold sequences at work; asked on any thread."""
        held = sum(sequence.length for sequence in list(self._slots.values()))
        return held / (len(self._held) * self._max_context)

    def add(self, request: Request) -> Sequence:
        """Begin a request in a free slot; ``has_room`` says that there is one."""
        stage = self.stage
        slot, source = self._slots_for(request)
        held = self._held[slot]
        feedback, logits = stage.wants_feedback, self._rejection
        begin = replace(
            begin_message(slot, request, feedback=feedback, logits=logits),
            want_opinions=self.opinions,
            source=source,
            shared=self._held[source].overlap(request),
        )
        sampler = sampler_of(begin)  # which may refuse the request: nothing has changed yet
        policy = self._policy(request, slot)
        switches = None if self.gate is None else self.gate.begin(policy, self.now())
        try:
            commands = policy.start(request.prompt, begin.shared)
            if source != slot:
                stage.share(source, slot, begin.shared)
            cached = held.take(request, begin.shared, own=source == slot)
            self.links.publish(slot, policy.epoch)
            self.links.send(begin)
            if stage.head is not None:
                stage.head.begin(begin)
        except BaseException:  # the slot stays free for the next request, with nothing to reuse
            held.tokens = ()
            if self.gate is not None:
                self.gate.end(policy)
            raise
        sequence = Sequence(request, slot, cached, policy, held.history, sampler, held.draft)
        sequence.commands.extend(commands)
        sequence.switches = switches
        self._free.remove(slot)
        self._running.append(sequence)
        self._slots[slot] = sequence
        return sequence

    def _slots_for(self, request: Request) -> tuple[int, int]:
        """Return a free slot, and the slot whose rows begin as the request does.

        That may be the same; of others' rows, whole prompt chunks are copied. The free slot that
        has been so for the longest is written over first.
        """
        overlaps = [held.overlap(request) for held in self._held]
        own = max(self._free, key=lambda slot: overlaps[slot])
        most = max(overlaps)
        if request.reuse or overlaps[own] >= most:
            return own, own
        return self._free[0], overlaps.index(most)

    def _policy(self, request: Request, slot: int) -> Policy | WavePolicy:
        return Policy(
            self.schedule,
            max_tokens=request.params.max_tokens,
            stop_ids=request.stop_ids,
            epoch=self.links.epoch(slot),
            prefill_chunk=self._prefill_chunk,
            prefill_in_flight=self.links.size,
        )

    def step(self) -> list[tuple[Sequence, Output]]:
        """Carry out one command, or wait for one answer when there is nothing to do.

        Return what it made final: tokens of a sequence, or its end.
        """
        for _ in range(len(self._running)):
            sequence = self._running[0]
            self._running.rotate(-1)
            if sequence.commands:
                return self._carry_out(sequence)
        self._take(self.links.wait())
        return []

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence with ``reason``; what has not been returned yet is dropped."""
        if not sequence.finish_reason:
            sequence.policy.stop(reason)
            self._release(sequence, reason)

    def _carry_out(self, sequence: Sequence) -> list[tuple[Sequence, Output]]:
        command = sequence.commands.popleft()
        if isinstance(command, Feed):
            if command.epoch == sequence.policy.epoch:
                self._feed(sequence, command)
            return []
        if isinstance(command, Finish):
            self._release(sequence, command.reason)
        elif sequence.policy.emitted == len(command.tokens):  # the prompt is there for others, too
            self._held[sequence.slot].keep(sequence)
        return [(sequence, command)]

    def _release(self, sequence: Sequence, reason: str) -> None:
        """Give the slot of a sequence that is over to the next one."""
        sequence.finish_reason = reason
        sequence.commands.clear()
        self._running.remove(sequence)
        del self._slots[sequence.slot]
        if self.gate is not None:
            self.gate.end(sequence.policy)
        self._held[sequence.slot].keep(sequence)
        self._free.append(sequence.slot)
        self.links.publish(sequence.slot, sequence.policy.epoch)
        if self.stage.recorder.observer is not None:
            self.stage.recorder.tell(Left(sequence.slot))

    def _feed(self, sequence: Sequence, feed: Feed) -> None:
        """Run rows through stage 0, ship a complete block, then draft if asked to."""
        stage = self.stage
        hidden, _ = self._ship(sequence, feed)
        if hidden is None:
            return
        stage.observe(sequence, feed, hidden)
        if feed.draft and stage.drafting and self._still_wanted(sequence, feed):
            self._note(sequence, sequence.chain.on(stage.draft(sequence, feed)))

    def _ship(self, sequence: Sequence, feed: Feed) -> tuple[torch.Tensor | None, Block | None]:
        """Run rows through stage 0 and send the block that they complete.

        Return the rows, None once an answer has made them pointless, and the block if there is one.
        """
        stage = self.stage
        start = stage.recorder.now()
        if stage.recorder.observer is not None:
            stage.recorder.tell(FedBlock(start, sequence.slot, feed))
        hidden = self._run(sequence, feed)
        return hidden, self._send_block(sequence, feed, hidden, start)

    def _send_block(
        self,
        sequence: Sequence,
        feed: Feed,
        hidden: torch.Tensor | None,
        start: int,
        *,
        joins: bool = False,
    ) -> Block | None:
        """Record a pass; send the block that its rows complete, which may join a wave."""
        stage, rows = self.stage, len(feed.tokens)
        kind = "cancelled" if hidden is None else "forward" if feed.judge else "prefill"
        stage.recorder.add(start, kind, feed.epoch, feed.position, rows, joined=joins)
        if kind == "forward" and feed.judge == rows and not joins:  # else the end of a prompt
            stage.recorder.count(rows)
        block = None if hidden is None else stage.finish(sequence, feed, hidden)
        if block is not None:  # before drafting, so that a miss never pays for the draft
            self.links.send(block._replace(joins=joins) if joins else block)
        return block

    def _run(self, sequence: Sequence, feed: Feed) -> torch.Tensor | None:
        """Return the rows of a pass, or None once an answer has made it pointless.

        The pass stops by itself when an answer comes. What the answer means is looked at here,
        between two stretches of the pass, never inside it.
        """
        work = self.stage.start(sequence, feed)
        watch = self.links.watch()
        while True:
            watch.look()  # before asking: what comes after this stops the pass
            if not self._still_wanted(sequence, feed):
                return None
            if work.advance(watch):
                return work.hidden

    def _still_wanted(self, sequence: Sequence, feed: Feed) -> bool:
        """Take the answers that are there; return False if they made ``feed`` pointless."""
        self._take_answers()
        return sequence.policy.epoch == feed.epoch

    def _take_answers(self) -> None:
        while (answer := self.links.poll()) is not None:
            self._take(answer)

    def _take(self, answer: Answer) -> None:
        """Act on an answer of the stages; of old work it means nothing."""
        if not isinstance(answer, Verdict | Refusal | Scores):
            return  # late, to the waves of an engine before this one
        sequence = self._slots.get(answer.slot)
        if sequence is None or sequence.policy.epoch != answer.epoch:
            return
        if isinstance(answer, Refusal):
            self._fail(sequence, RequestError(answer.message))
        elif isinstance(answer, Scores):
            if sequence.request.scores is not None:
                self._hand(sequence, sequence.request.scores, answer)
        else:
            self._judge(sequence, answer)

    def _hand(self, sequence: Sequence, sink: Callable[..., object], *told: object) -> bool:
        """Give a sink of the request's own what it asked for; False if it raised.

        Then its request ends with what it raised, and others go on.
        """
        try:
            sink(*told)
        except Exception as error:  # the caller's own, which may be anything
            self._fail(sequence, error)
            return False
        return True

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """Let the next step end a sequence that cannot go on, unless it has reached its end."""
        if sequence.policy.finished:
            return
        sequence.error = error
        sequence.commands.clear()
        sequence.commands.extend(sequence.policy.stop("error"))
        self.links.publish(sequence.slot, sequence.policy.epoch)

    def _judge(self, sequence: Sequence, verdict: Verdict) -> None:
        self.stage.keep(sequence, verdict)
        sink = sequence.request.logits
        if sink is not None and verdict.logits is not None:
            first = verdict.position + verdict.rows - verdict.logits.shape[0] + 1
            for i, row in enumerate(verdict.logits):
                if not self._hand(sequence, sink, first + i, row):
                    return
        first = verdict.position + verdict.rows - len(verdict.tokens) + 1
        tokens = redraw(sequence, verdict) if self._rejection and verdict.tokens else verdict.tokens
        said = verdict.epoch, verdict.position, first, tokens, verdict.source
        self._obey(sequence, sequence.policy.on(Judged(*said)))

    def _obey(self, sequence: Sequence, commands: Items[Command]) -> None:
        """Note what a verdict has made final, and let the gate see it."""
        recorder = self.stage.recorder
        if recorder.observer is not None:
            place = recorder.now(), sequence.slot, sequence.policy.committed
            for emit in commands:
                if isinstance(emit, Emit):
                    recorder.tell(Made(*place, *emit))
        self._note(sequence, commands)
        if self.gate is not None:
            self.gate.watch(sequence.policy, self.now())

    def _note(self, sequence: Sequence, commands: Iterable[Command]) -> None:
        sequence.commands.extend(commands)
        if sequence.policy.epoch > self.links.epoch(sequence.slot):
            self.links.publish(sequence.slot, sequence.policy.epoch)

    def now(self) -> float:
        """Return the time in seconds by stage 0's clock."""
        return self.stage.recorder.now() / 1e9
