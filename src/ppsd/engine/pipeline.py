"""Rank 0's side of the pipeline: stage 0, the drafter, and what goes to and comes from the rest.

Used by the engine only. It carries out ``Feed`` commands and turns verdicts into ``Judged``
events; it decides nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ppsd.engine.drafter import Drafter, Given, single_rows
from ppsd.errors import (
    InsufficientMemoryError,
    KernelError,
    ModelError,
    NonFiniteError,
    PipelineTimeoutError,
    PpsdError,
    ProtocolError,
    RequestError,
    StageFailedError,
    StageLostError,
    UnsupportedModelError,
)
from ppsd.model.passes import Asking
from ppsd.model.stage import StageModel
from ppsd.speculation.policy import UNVERIFIED, Drafted, Feed, Judged
from ppsd.speculation.sampling import Sampler, Stream
from ppsd.transport.base import Endpoint
from ppsd.worker.judge import Judge, TokenHistory, require_finite
from ppsd.worker.messages import Begin, Block, Control, Message, Status, Verdict, decode, encode
from ppsd.worker.recorder import Recorder

CHECK_S = 0.05  # how often a wait looks after the worker processes
ENDING_S = 0.5  # from a process closing its connections until it counts as ended, at most
LAST_FRAMES = 32  # more than may wait, among them a dead worker's account of itself
ANSWER_S = 1.0  # a stage that works answers a report sooner

NAMED_ERRORS = {  # a worker's sentence says it all; other exceptions come with their traceback
    kind.__name__: kind
    for kind in (
        InsufficientMemoryError,
        KernelError,
        ModelError,
        NonFiniteError,
        PipelineTimeoutError,
        ProtocolError,
        StageLostError,
        UnsupportedModelError,
    )
}


def raise_if_lost(endpoint: Endpoint, check: Callable[[], None]) -> None:
    """Raise when a worker process has ended: what it said of that itself, else what ``check`` says.

    Frames that wait at ``endpoint`` are lost then.
    """
    try:
        check()
    except StageLostError:
        for _ in range(LAST_FRAMES):
            with contextlib.suppress(StageLostError):  # which may be but a consequence
                if (received := endpoint.receive(0.0)) is not None:
                    _raise_failure(decode(received[1]))
        raise


class Pipeline:
    """Stage 0 in this process and, through ``endpoint``, the stages behind it.

    ``judge`` is given when stage 0 is also the last one. ``check`` raises when a worker process is
    gone; ``timeout`` (seconds) bounds every wait for a stage.
    """

    def __init__(
        self,
        stage: StageModel,
        endpoint: Endpoint,
        drafter: Drafter | None,
        *,
        max_context: int,
        timeout: float,
        judge: Judge | None = None,
        check: Callable[[], None] = lambda: None,
        recorder: Recorder | None = None,
    ) -> None:
        self.drafter = drafter
        self.draft_stream = Stream.TARGET
        self.drafting = drafter is not None  # plain decoding pays nothing for a head
        self.size = endpoint.size
        self.epoch = 1  # only ever grows, whichever engine drives: answers of old work stay old
        self._closed = False
        self.recorder = recorder or Recorder()
        self._stage = stage
        self._endpoint = endpoint
        self._timeout = timeout
        self._judge = judge
        self._check = check
        self._history = TokenHistory(max_context)
        self._sampler: Sampler | None = None
        self._open: list[torch.Tensor] = []  # stage 0's rows of the block not shipped yet
        self._last_rows: dict[int, torch.Tensor] = {}  # the last layer's, by verified position
        self._verdicts: deque[Verdict] = deque()  # of a pipeline of one stage
        self._ask: Callable[[], bool] = lambda: False
        self._interrupted = Asking(lambda: self._ask(), endpoint.words)

    def begin(self, begin: Begin) -> None:
        """Tell the last stage, and the drafter's sampler, how the next request samples."""
        self._sampler = Sampler(
            begin.params, begin.prompt_length, frozenset(begin.stop_ids), begin.vocab_size
        )
        self._last_rows.clear()
        if self._judge is not None:
            self._judge.begin(begin)
        else:
            self._send(begin)

    def publish(self, epoch: int) -> None:
        """Make ``epoch`` the newest valid one on every stage; overtakes all work."""
        self.epoch = epoch
        if self._closed:  # a request that outlived its pipeline ends now; nobody listens
            return
        self._endpoint.publish(epoch)

    def feed(self, feed: Feed, interrupted: Callable[[], bool]) -> Drafted | None:
        """Run rows through stage 0, ship a complete block, then draft if asked to.

        ``interrupted`` is asked between layers; once it says yes the work is dropped.
        """
        if feed.position == feed.block:
            self._open.clear()
        self._history.write(feed.position, feed.tokens)
        tokens = self._history.before(feed.position + len(feed.tokens), feed.position)
        start = time.monotonic_ns()
        self._ask = interrupted
        hidden = self._stage.forward(tokens, feed.position, self._interrupted)
        kind = "cancelled" if hidden is None else "forward" if feed.judge else "prefill"
        self.recorder.add(start, kind, feed.epoch, feed.position, len(feed.tokens))
        if hidden is None:
            return None
        require_finite(hidden, 0, feed.position)
        self._open.append(hidden)
        if feed.ship:  # before drafting, so that a miss never pays for the draft
            self._ship(feed)
        if self.drafter is None or not self.drafting:
            return None
        self._last_rows = {p: row for p, row in self._last_rows.items() if p >= feed.verified}
        self.drafter.observe(feed.position, hidden)
        return self._draft(feed) if feed.draft and not interrupted() else None

    def _ship(self, feed: Feed) -> None:
        hidden = torch.cat(self._open) if len(self._open) > 1 else self._open[0]
        self._open.clear()
        end = feed.position + len(feed.tokens)
        tokens = self._history.ids(feed.block, end)
        block = Block(0, feed.epoch, feed.block, feed.block - 1, feed.judge, tokens, hidden)
        if self._judge is None:
            self._send(block)
            return
        start = time.monotonic_ns()
        self._verdicts.append(self._judge.verdict(block, hidden))
        if feed.judge:
            self.recorder.add(start, "verify", feed.epoch, feed.block, feed.judge)

    def _draft(self, feed: Feed) -> Drafted:
        assert self.drafter is not None
        assert self._sampler is not None
        start = time.monotonic_ns()
        position = feed.position + len(feed.tokens)
        history = self._history.before(position)
        known = self.wants_last_rows and feed.verified != UNVERIFIED
        verified = self._last_rows[feed.verified] if known else None
        try:
            token = self.drafter.draft(Given(self._sampler, history, self.draft_stream, verified))
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (exit head, position {position})") from error
        self.recorder.add(start, "draft", feed.epoch, position, 1)
        return Drafted(feed.epoch, position, token)

    def keep(self, verdict: Verdict) -> None:
        """Hold the rows of a valid verdict for drafts to come; raises ProtocolError."""
        if verdict.hidden is None:
            if self.wants_last_rows and len(verdict.tokens):
                raise ProtocolError(f"a verdict at {verdict.position} lacks the last layer's rows")
            return
        first = verdict.position + verdict.rows - verdict.hidden.shape[0]
        self._last_rows |= {first + i: row for i, row in enumerate(single_rows(verdict.hidden))}

    @property
    def wants_last_rows(self) -> bool:
        """Whether drafts are better with the last layer's rows."""
        return self.drafting and self.drafter is not None and self.drafter.feedback

    def history(self, position: int) -> torch.Tensor:
        """Return the tokens fed at positions below ``position``; a view."""
        return self._history.before(position)

    def poll(self) -> Verdict | None:
        """Return a verdict that is already there, or None."""
        if self._verdicts:
            return self._verdicts.popleft()
        message = self._receive(0.0)
        return None if message is None else _expect_verdict(message)

    def wait(self) -> Verdict:
        """Return the next verdict; raises when a stage is lost, fails or passes the deadline."""
        if self._verdicts:
            return self._verdicts.popleft()
        return _expect_verdict(self._wait_for("a verdict"))

    def _wait_for(self, what: str) -> Message:
        deadline = time.monotonic() + self._timeout
        while (message := self._receive(CHECK_S)) is None:
            raise_if_lost(self._endpoint, self._check)
            if time.monotonic() > deadline:
                silent = self._first_silent_stage()
                raise PipelineTimeoutError(
                    f"no stage sent {what} for {self._timeout:g} s; {silent}"
                )
        return message

    def _first_silent_stage(self) -> str:
        """Ask all stages for a report, which each passes on before it answers."""
        waiting = set(range(1, self.size))
        deadline = time.monotonic() + ANSWER_S
        with contextlib.suppress(PipelineTimeoutError):  # silence is the answer sought
            self._endpoint.send(1, encode(Control("report")), CHECK_S)
            while waiting and time.monotonic() < deadline:
                message = self._receive(CHECK_S)
                if isinstance(message, Status):
                    waiting.discard(message.source)
        return f"stage {min(waiting)} does not answer" if waiting else "all stages answer"

    def _receive(self, timeout: float) -> Message | None:
        try:
            received = self._endpoint.receive(timeout)
            if received is None:
                return None
            message = decode(received[1], self._endpoint.rows)
            _raise_failure(message)
        except StageLostError:
            self._await_ending()
            raise
        if isinstance(message, Status) and message.kind == "refused":
            if message.fields["epoch"] == self.epoch:
                raise RequestError(message.fields["message"])
            return None  # of work that is over
        return message

    def _await_ending(self) -> None:
        """After a connection broke: raise the better error if a worker process turns out to end."""
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline:
            raise_if_lost(self._endpoint, self._check)
            time.sleep(CHECK_S / 10)

    def _send(self, message: Message) -> None:
        parts = encode(message)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self._endpoint.send(1, parts, CHECK_S)
            except StageLostError:
                self._await_ending()
                raise
            except PipelineTimeoutError:
                raise_if_lost(self._endpoint, self._check)
                if time.monotonic() > deadline:
                    silent = "stage 1 does not answer"
                    raise PipelineTimeoutError(
                        f"no room for {self._timeout:g} s; {silent}"
                    ) from None

    def wait_ready(self, timeout: float, progress: Callable[[int, int, int], None]) -> list[Status]:
        """Wait until every further stage is loaded; ``progress(rank, done, total)`` meanwhile."""
        ready: dict[int, Status] = {}
        deadline = time.monotonic() + timeout
        while len(ready) < self.size - 1:
            message = self._receive(CHECK_S)
            if message is None:
                raise_if_lost(self._endpoint, self._check)
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.size)) - set(ready))
                    raise PipelineTimeoutError(f"stages {missing} not ready after {timeout:g} s")
            elif isinstance(message, Status) and message.kind == "progress":
                progress(message.source, message.fields["done"], message.fields["total"])
            elif isinstance(message, Status) and message.kind == "ready":
                ready[message.source] = message
        return [ready[rank] for rank in sorted(ready)]

    def report(self) -> list[dict[str, Any]]:
        """What every stage did since the last report, by rank (see Recorder.take)."""
        reports = [self.recorder.take()] + [{} for _ in range(1, self.size)]
        waiting = set(range(1, self.size))
        if waiting:
            self._send(Control("report"))
        while waiting:
            message = self._wait_for("a report")
            if isinstance(message, Status) and message.kind == "report":
                waiting -= _merge_report(reports[message.source], message)
        return reports

    def close(self) -> None:
        """Tell the stages to stop and release the transport."""
        if self._judge is None:
            with contextlib.suppress(PpsdError):  # a broken pipeline cannot hear it
                self._endpoint.send(1, encode(Control("stop")), CHECK_S)
        self._closed = True
        self._endpoint.close()


def _expect_verdict(message: Message) -> Verdict:
    if not isinstance(message, Verdict):
        raise ProtocolError(f"expected a verdict, got {type(message).__name__}")
    return message


def _raise_failure(message: Message) -> None:
    """Raise here what a worker raised there; its pipeline errors name their stage themselves."""
    if not isinstance(message, Status) or message.kind != "failed":
        return
    fields, stage = message.fields, f"stage {message.source}"
    kind = NAMED_ERRORS.get(fields["error"])
    if kind is None:
        text = f"{stage} failed: {fields['error']}: {fields['message']}"
        raise StageFailedError(text, fields["traceback"])
    raise kind(fields["message"] if fields["pipeline"] else f"{stage}: {fields['message']}")


def _merge_report(into: dict[str, Any], status: Status) -> set[int]:
    """Append a part of a stage's report; the rank when it was the last part."""
    slices = into.setdefault("slices", [])
    slices += status.fields["slices"]
    into.update({k: v for k, v in status.fields.items() if k not in ("slices", "last")})
    return {status.source} if status.fields["last"] else set()


def judged(verdict: Verdict, tokens: tuple[int, ...]) -> Judged:
    """The policy's event for a verdict that says ``tokens``."""
    first = verdict.position + verdict.rows - len(tokens) + 1
    return Judged(verdict.epoch, verdict.position, first, tokens, verdict.source)
