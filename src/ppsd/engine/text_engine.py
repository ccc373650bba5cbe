"""The engine with text on top: tickets in, chunks and completions out."""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import copy
from typing import Any

from ppsd.engine.answer import Answer, Chunk, Completion
from ppsd.engine.engine import Engine
from ppsd.engine.sequence import Request, Sequence
from ppsd.engine.stats import RequestStats, Totals, stage_stats
from ppsd.engine.text import Decoder, Transcript
from ppsd.engine.thread import Job
from ppsd.engine.trace import TraceLog
from ppsd.errors import PipelineError, RequestError
from ppsd.speculation.policy import Emit


class TextEngine:
    """Lets tickets through ``engine``, which may be another one whenever nothing is under way.

    ``bounds`` are the layers at which stages begin and end. The slices of all requests are
    gathered in ``trace``.
    """

    def __init__(self, bounds: Items[int]) -> None:
        self.engine: Engine
        self.trace = TraceLog()
        self._bounds = tuple(bounds)
        self._tickets: dict[Sequence, Ticket] = {}
        self._seconds = self._since = 0.0  # with tickets under way, up to ``_since``
        self._noted = (0.0, 0)  # these seconds and stage 0's busy time when the others were asked
        self._told = (0.0, (0.0,) * (len(bounds) - 1))  # the same once all had answered
        self._asked = False

    @property
    def busy(self) -> bool:
        return bool(self._tickets)

    @property
    def has_room(self) -> bool:
        """Tell if a ticket could begin at once."""
        return not self._tickets or self.engine.has_room

    def now(self) -> float:
        """Return the time in seconds by the engine's clock."""
        return self.engine.now()

    def begin(self, ticket: Ticket) -> None:
        """Let the engine begin with a ticket's request."""
        ticket.answer.start = self.now()
        if not self._tickets:
            self._since = ticket.answer.start
        self._tickets[self.engine.add(ticket.request)] = ticket
        if len(self._tickets) > 1:
            for other in self._tickets.values():
                other.alone = False

    def step(self) -> None:
        """Do a step of the engine, and hand on what it made final."""
        if self._asked:
            self._ask()
        for sequence, ticket in self._tickets.items():
            if ticket.cancelled:
                self.engine.abort(sequence)
                self._settle(sequence)
                del self._tickets[sequence]
                return
        for sequence, output in self.engine.step():
            ticket = self._tickets[sequence]
            if isinstance(output, Emit):
                self._take(sequence, ticket, output)
            else:
                self._finish(sequence, ticket)

    def totals(self) -> Totals:
        """Return what the stages did so far, and ask them for next time; on any thread."""
        recorder, links = self.engine.stage.recorder, self.engine.links
        seconds, first = self._noted
        busy = tuple(ns / 1e9 for ns in (first, *links.busy_ns))
        if not links.asked:
            self._told = seconds, busy
            self._asked = True
        return Totals(*self._told, recorder.passes, recorder.rows, self.engine.cache_used)

    def _ask(self) -> None:
        """Ask the stages how busy they were, and note the time that this is a share of."""
        self._asked = False
        self.engine.links.ask()  # first: what is noted waits for their answers
        now = self.now()
        self._seconds += now - self._since
        self._since = now
        self._noted = self._seconds, self.engine.stage.recorder.total_ns

    def cancel(self, error: BaseException) -> None:
        """End all that is under way with ``error``; of a working pipeline note what was done.

        Where several are, nothing tells whose fault it was, and each has an error of its own.
        """
        several = len(self._tickets) > 1
        for sequence, ticket in list(self._tickets.items()):
            if isinstance(error, PipelineError):
                del self._tickets[sequence]
                ticket.fail(copy(error))  # what is raised gathers frames, and with them the LLM
            else:
                self.engine.abort(sequence)
                self._settle(sequence)
                del self._tickets[sequence]
                told = f"a request that was under way at the same time failed: {error!r}"
                ticket.fail(RequestError(told) if several else error)

    def _take(self, sequence: Sequence, ticket: Ticket, emit: Emit) -> None:
        chunk = ticket.answer.take(emit, self.now())
        if not ticket.silent:
            ticket.put(chunk)
        if ticket.answer.transcript.stopped:
            self.engine.abort(sequence, "stop")
            self._finish(sequence, ticket)

    def _finish(self, sequence: Sequence, ticket: Ticket) -> None:
        """Complete the answer of a sequence that is over."""
        answer, end = ticket.answer, self.now()
        if sequence.error is not None:
            self._settle(sequence)
            del self._tickets[sequence]
            ticket.fail(sequence.error)
            return
        if (rest := answer.transcript.finish()) and not ticket.silent:
            ticket.put(Chunk(tuple(rest), time=end))
        completion = Completion(
            text=answer.transcript.text,
            token_ids=tuple(answer.token_ids),
            accepted=tuple(answer.accepted),
            finish_reason="stop" if answer.transcript.stopped else sequence.finish_reason,
            stats=self._settle(sequence, end),
        )
        del self._tickets[sequence]
        ticket.finish(completion)

    def _settle(self, sequence: Sequence, end: float | None = None) -> RequestStats:
        """Collect what the stages did for a sequence that is over, also one left early.

        Its ticket goes only after this: if a stage is lost meanwhile, ``cancel`` tells it.
        """
        ticket = self._tickets[sequence]
        answer = ticket.answer
        # Asking makes the stages wait, so what they do for several requests at once stays untold.
        reports = []
        if len(self._tickets) == 1:
            self._ask()
            reports = self._report()
        end = end or self.now()
        switches = sequence.switches
        if self.engine.stage.recorder.slices is not None:
            self.trace.add(reports, switches.pauses_until(end) if switches else [])
        first = answer.first or end
        return RequestStats(
            prompt_tokens=len(sequence.request.prompt),
            cached_tokens=sequence.cached,
            new_tokens=len(answer.token_ids),
            counts=sequence.policy.counts,
            prefill_seconds=first - answer.start,
            decode_seconds=end - first,
            # what is told since the last time may be of others' work, too
            stages=stage_stats(reports if ticket.alone else [], self._bounds, end - answer.start),
            gate=switches,
        )

    def _report(self) -> list[dict[str, Any]]:
        return [self.engine.stage.recorder.take(), *self.engine.links.report()]


class Ticket(Job[Completion]):
    """A request on its way through the engine, and its answer as it grows.

    A ``silent`` one puts no chunks: only the completion counts. It is ``alone`` until another is
    under way at the same time.
    """

    def __init__(
        self,
        engine: TextEngine,
        request: Request,
        decoder: Decoder,
        *,
        silent: bool = False,
    ) -> None:
        super().__init__()
        params = request.params
        self.request = request
        self.answer = Answer(Transcript(decoder, params.stop, params.min_tokens))
        self.silent = silent
        self.alone = True
        self._engine = engine

    def can_begin(self) -> bool:
        return self._engine.has_room

    def begin(self) -> None:
        self._engine.begin(self)
