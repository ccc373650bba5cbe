"""Rank 0's links to the other stages: messages out and in, and whom to blame when none come.

``Links`` says what the engine needs; ``StageLinks`` reaches stages over a transport, ``OwnLinks``
is a pipeline of one stage, which answers itself.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ppsd.engine.blame import raise_failure, raise_if_lost
from ppsd.errors import (
    PipelineTimeoutError,
    PpsdError,
    ProtocolError,
    RequestError,
    StageLostError,
)
from ppsd.model.passes import Watch
from ppsd.transport.base import Endpoint
from ppsd.worker.judge import Judge
from ppsd.worker.messages import (
    Begin,
    Block,
    Control,
    Message,
    Refusal,
    Status,
    Verdict,
    decode,
    encode,
)
from ppsd.worker.recorder import Recorder
from ppsd.worker.scores import Scores
from ppsd.worker.wave_messages import Opinion, Verdicts, Wave

CHECK_S = 0.05  # how often a wait looks after the worker processes
ENDING_S = 0.5  # from a process closing its connections until it counts as ended, at most
ANSWER_S = 1.0  # a stage that works answers a report sooner

Answer = Verdict | Verdicts | Opinion | Scores | Refusal


class Links(Protocol):
    """What the engine asks of the stages behind the first.

    ``asked`` counts answers to ``ask`` that have not come yet.
    """

    size: int
    asked: int

    @property
    def busy_ns(self) -> list[int]:
        """Return each stage's nanoseconds of work in all, as of its newest answer to ``ask``."""

    def epoch(self, slot: int) -> int:
        """Return the slot's newest epoch. It only ever grows: answers of old work stay old."""

    def publish(self, slot: int, epoch: int) -> None:
        """Make ``epoch`` the slot's newest on every stage; it overtakes all work."""

    def watch(self) -> Watch:
        """Return the words that change when an answer comes, for a pass of rank 0 to look at."""

    def send(self, message: Begin | Block | Wave) -> None:
        """Send to the next stage; raises PipelineError when it does not take the message."""

    def poll(self) -> Answer | None:
        """Return an answer that is already there, or None."""

    def wait(self) -> Answer:
        """Return the next answer; raises when a stage is lost, fails or passes the deadline."""

    def report(self) -> list[dict[str, Any]]:
        """Return what every stage but the first did since the last report (Recorder.take)."""

    def ask(self) -> None:
        """Ask every stage how long it has worked, and do not wait."""

    def close(self) -> None:
        """Tell the stages to stop."""


class OwnLinks:
    """A pipeline of one stage: its judge answers at once."""

    size = 1

    def __init__(self, judge: Judge, recorder: Recorder, slots: int = 1) -> None:
        self._judge = judge
        self._recorder = recorder
        self.asked = 0
        self._epochs = [1] * slots
        self._answers: deque[Answer] = deque()
        self._watch = Watch()

    def epoch(self, slot: int) -> int:
        return self._epochs[slot]

    def publish(self, slot: int, epoch: int) -> None:
        self._epochs[slot] = epoch

    def watch(self) -> Watch:
        return self._watch

    def send(self, message: Begin | Block | Wave) -> None:
        if isinstance(message, Begin):
            self._judge.begin(message)
            return
        start = self._recorder.now()
        if isinstance(message, Wave):  # of several requests: one stage has no exit to draft at
            if rows := message.rows:
                self._answers.extend(self._judge.verdicts(rows, message.hidden, message.masks))
                self._recorder.add(start, "verify", rows[0].node, rows[0].position, len(rows))
            return
        try:
            if (scores := self._judge.scores(message, message.hidden)) is not None:
                self._answers.append(scores)
            self._answers.append(self._judge.verdict(message, message.hidden))
        except RequestError as error:
            self._answers.append(Refusal(message.slot, message.epoch, 0, str(error)))
        if message.judge:
            place = message.epoch, message.position, message.judge
            self._recorder.add(start, "verify", *place)

    def poll(self) -> Answer | None:
        return self._answers.popleft() if self._answers else None

    def wait(self) -> Answer:
        return self._answers.popleft()

    @property
    def busy_ns(self) -> list[int]:
        return []

    def report(self) -> list[dict[str, Any]]:
        return []

    def ask(self) -> None:
        pass

    def close(self) -> None:
        pass


class Patience:
    """How long others may take, asked after every wait of CHECK_S.

    A longer gap than two of these means that this host stood still, and the others with it.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._asked = time.monotonic()

    def ended(self) -> bool:
        """Return True once the time is over."""
        before, self._asked = self._asked, time.monotonic()
        self._left -= min(self._asked - before, 2 * CHECK_S)
        return self._left < 0


class StageLinks:
    """The stages behind ``endpoint``.

    ``check`` raises when a worker process is gone; ``timeout`` (seconds) bounds every wait.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        check: Callable[[], None] = lambda: None,
        slots: int = 1,
    ) -> None:
        self.size = endpoint.size
        self.asked = 0
        self._busy_ns = [0] * (endpoint.size - 1)
        self._endpoint = endpoint
        self._timeout = timeout
        self._check = check
        self._epochs = [1] * slots
        self._watch = Watch(endpoint.words(0))
        self._answers: deque[Answer] = deque()  # that came while something else was awaited
        self._closed = False

    def epoch(self, slot: int) -> int:
        return self._epochs[slot]

    def publish(self, slot: int, epoch: int) -> None:
        self._epochs[slot] = epoch
        if not self._closed:  # a request that outlived its pipeline ends now; nobody listens
            self._endpoint.publish(slot, epoch)

    def watch(self) -> Watch:
        return self._watch

    def poll(self) -> Answer | None:
        if self._answers:
            return self._answers.popleft()
        message = self._receive(0.0)
        return None if message is None else _expect_answer(message)

    def wait(self) -> Answer:
        if self._answers:
            return self._answers.popleft()
        return _expect_answer(self._wait_for("a verdict"))

    def send(self, message: Message) -> None:
        parts = encode(message)
        patience = Patience(self._timeout)
        while True:
            try:
                return self._endpoint.send(1, parts, CHECK_S)
            except StageLostError:
                self._await_ending()
                raise
            except PipelineTimeoutError:
                raise_if_lost(self._endpoint, self._check)
                if patience.ended():
                    raise PipelineTimeoutError(
                        f"no room for {self._timeout:g} s; stage 1 does not answer"
                    ) from None

    def report(self) -> list[dict[str, Any]]:
        reports: dict[int, dict[str, Any]] = {rank: {} for rank in range(1, self.size)}
        waiting = set(reports)
        self.send(Control("report"))
        while waiting:
            message = self._wait_for("a report")
            if isinstance(message, Status) and message.kind == "report":
                waiting -= _merge_report(reports[message.source], message)
            elif isinstance(message, Answer):
                self._answers.append(message)
        return list(reports.values())

    @property
    def busy_ns(self) -> list[int]:
        return self._busy_ns

    def ask(self) -> None:
        self.asked += self.size - 1
        self.send(Control("busy"))

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

    def close(self) -> None:
        """Tell the stages to stop and release the transport."""
        with contextlib.suppress(PpsdError):  # a broken pipeline cannot hear it
            self._endpoint.send(1, encode(Control("stop")), CHECK_S)
        self._closed = True
        self._endpoint.close()

    def _wait_for(self, what: str) -> Message:
        patience = Patience(self._timeout)
        while (message := self._receive(CHECK_S)) is None:
            raise_if_lost(self._endpoint, self._check)
            if patience.ended():
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
        while (message := self._receive_any(timeout)) is not None:
            if not (isinstance(message, Status) and message.kind == "busy"):
                return message
            self._busy_ns[message.source - 1] = message.fields["total_ns"]
            self.asked -= 1
        return None

    def _receive_any(self, timeout: float) -> Message | None:
        try:
            received = self._endpoint.receive(timeout)
            if received is None:
                return None
            message = decode(received[1], self._endpoint.rows)
            raise_failure(message)
        except StageLostError:
            self._await_ending()
            raise
        return message

    def _await_ending(self) -> None:
        """Raise the better error for a broken connection if a worker process turns out to end."""
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline:
            raise_if_lost(self._endpoint, self._check)
            time.sleep(CHECK_S / 10)


def _expect_answer(message: Message) -> Answer:
    if not isinstance(message, Answer):
        raise ProtocolError(f"expected a verdict, got {type(message).__name__}")
    return message


def _merge_report(into: dict[str, Any], status: Status) -> set[int]:
    """Append a part of a stage's report; return its rank when it was the last part."""
    slices = into.setdefault("slices", [])
    slices += status.fields["slices"]
    into.update({k: v for k, v in status.fields.items() if k not in ("slices", "last")})
    return {status.source} if status.fields["last"] else set()
