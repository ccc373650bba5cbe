"""Rank 0's links on their own: what is sent, what answers mean, and whom to blame for silence."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import pytest
import torch

from ppsd.engine import links as linked
from ppsd.engine.blame import raise_if_lost
from ppsd.engine.links import CHECK_S, OwnLinks, Patience, StageLinks
from ppsd.errors import PipelineTimeoutError, ProtocolError, StageFailedError, StageLostError
from ppsd.types import SamplingParams
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
from tests.support.hash_model import CAPACITY, HashStage, pack

BUSY = [Status(rank, "busy", {"total_ns": 7 * rank}) for rank in (1, 2)]
REFUSAL = Refusal(0, 1, 2, "no")


def frame(message: Message) -> memoryview:
    parts = [p if isinstance(p, bytes) else p.numpy().tobytes() for p in encode(message)]
    return memoryview(b"".join(parts))


class Far:
    """An end of a transport between three ranks; ``coming`` is what it receives, None nothing."""

    rank, size, rows = 0, 3, None

    def __init__(self, *coming: Message | None) -> None:
        self.coming: deque[Message | None] = deque(coming)
        self.sent: list[tuple[int, Message]] = []
        self.published: list[tuple[int, int]] = []
        self.timeouts: list[float] = []
        self.full = 0  # times that it has no room
        self.broken = self.closed = False

    def words(self, slot: int) -> tuple[int, ...]:
        return {0: ()}[slot]

    def send(self, to: int, parts, timeout: float) -> None:
        if self.broken:
            raise StageLostError("the connection broke")
        if self.full:
            self.full -= 1
            time.sleep(timeout)
            raise PipelineTimeoutError("full")
        data = b"".join(p if isinstance(p, bytes) else p.numpy().tobytes() for p in parts)
        self.sent.append((to, decode(memoryview(data))))

    def receive(self, timeout: float) -> tuple[int, memoryview] | None:
        self.timeouts.append(timeout)
        if self.broken:
            raise StageLostError("the connection broke")
        message = self.coming.popleft() if self.coming else None
        if message is None:
            time.sleep(timeout)
            return None
        return message.source, frame(message)

    def publish(self, slot: int, epoch: int) -> None:
        self.published.append((slot, epoch))

    def close(self) -> None:
        self.closed = True


def links(*coming: Message | None, **settings: object) -> tuple[StageLinks, Far]:
    far = Far(*coming)
    return StageLinks(far, timeout=0.2, **settings), far  # type: ignore[arg-type]  # as an endpoint


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(linked, "ANSWER_S", 0.2)
    monkeypatch.setattr(linked, "ENDING_S", 0.2)


def test_epochs_are_published_until_the_end() -> None:
    ours, far = links(slots=2)
    assert [ours.epoch(0), ours.epoch(1)] == [1, 1]
    ours.publish(1, 5)
    assert (ours.epoch(1), far.published) == (5, [(1, 5)])
    ours.close()
    assert far.sent == [(1, Control("stop"))]
    assert far.closed
    ours.publish(1, 6)  # of a request that outlived its pipeline
    assert (ours.epoch(1), far.published) == (6, [(1, 5)])
    with pytest.raises(IndexError):
        links()[0].epoch(1)


def test_a_look_does_not_wait() -> None:
    ours, far = links(REFUSAL)
    assert ours.poll() == REFUSAL
    assert ours.poll() is None
    assert set(far.timeouts) == {0.0}


def test_stages_tell_how_long_they_worked_beside_what_they_answer() -> None:
    ours, far = links(BUSY[1], REFUSAL, None, BUSY[0])
    assert (ours.asked, ours.busy_ns) == (0, [0, 0])
    ours.ask()
    assert (ours.asked, far.sent) == (2, [(1, Control("busy"))])
    assert ours.wait() == REFUSAL
    assert (ours.asked, ours.busy_ns) == (1, [0, 14])
    ours.ask()
    assert ours.asked == 3
    assert ours.poll() is None
    assert ours.poll() is None
    assert (ours.asked, ours.busy_ns) == (2, [7, 14])


def test_a_report_has_every_stages_parts_and_keeps_answers() -> None:
    ours, far = links(
        Status(2, "report", {"slices": [[1]], "last": False}),
        REFUSAL,
        Status(1, "report", {"slices": [[9]], "last": True, "blocks": {"verify": 1}}),
        Status(2, "progress", {}),
        Status(2, "report", {"slices": [[2]], "last": True, "blocks": {}}),
    )
    assert ours.report() == [
        {"slices": [[9]], "blocks": {"verify": 1}},
        {"slices": [[1], [2]], "blocks": {}},
    ]
    assert far.sent == [(1, Control("report"))]
    assert ours.poll() == REFUSAL


def test_stages_are_waited_for_until_they_are_loaded() -> None:
    told: list[tuple[int, int, int]] = []
    ready = [Status(rank, "ready", {"pid": rank}) for rank in (1, 2)]
    ours, _ = links(ready[1], Status(1, "progress", {"done": 3, "total": 4}), None, ready[0])
    assert ours.wait_ready(5.0, lambda *each: told.append(each)) == ready
    assert told == [(1, 3, 4)]
    ours, _ = links(ready[1])
    with pytest.raises(PipelineTimeoutError, match=r"^stages \[1\] not ready after 0.1 s"):
        ours.wait_ready(0.1, lambda *each: None)
    ours, _ = links(Status(1, "failed", {"error": "E", "message": "m", "traceback": "t"}))
    with pytest.raises(StageFailedError, match="stage 1 failed: E: m"):
        ours.wait_ready(5.0, lambda *each: None)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], "stage 1 does not answer"),
        ([1], "stage 2 does not answer"),
        ([2], "stage 1 does not answer"),
        ([2, 1], "all stages answer"),
    ],
)
def test_silence_is_blamed_on_the_first_stage_that_does_not_answer(answers, told) -> None:
    ours, far = links()
    reports = [Status(rank, "report", {"slices": [], "last": True}) for rank in answers]

    def send(to: int, parts, timeout: float) -> None:
        Far.send(far, to, parts, timeout)
        far.coming.extend(reports)

    far.send = send  # type: ignore[method-assign]  # the fault
    start = time.monotonic()
    with pytest.raises(PipelineTimeoutError, match=f"^no stage sent a verdict for 0.2 s; {told}$"):
        ours.wait()
    assert time.monotonic() - start > 0.2
    assert far.sent == [(1, Control("report"))]


def test_a_report_that_does_not_come_is_missed() -> None:
    with pytest.raises(PipelineTimeoutError, match=r"^no stage sent a report for 0.2 s; stage 1"):
        links()[0].report()


def test_a_message_waits_for_room() -> None:
    ours, far = links()
    far.full = 2
    ours.send(Control("report"))
    assert far.sent == [(1, Control("report"))]
    far.full = 10**6
    with pytest.raises(PipelineTimeoutError, match=r"^no room for 0.2 s; stage 1 does not answer$"):
        ours.send(Control("report"))


def lost(after: int) -> Callable[[], None]:
    """Return a check of processes that finds one ended, once it was asked so often."""
    asked: list[None] = []

    def check() -> None:
        asked.append(None)
        if len(asked) > after:
            raise StageLostError("stage 2 was killed")

    return check


def test_a_process_that_ends_is_told_rather_than_its_connection() -> None:
    for act in (lambda ours: ours.send(Control("report")), lambda ours: ours.poll()):
        for check, told in ((lost(3), "stage 2 was killed"), (lambda: None, "connection broke")):
            ours, far = links(check=check)
            far.broken = True
            with pytest.raises(StageLostError, match=told):
                act(ours)
    with pytest.raises(StageLostError, match="stage 2 was killed"):
        links(check=lost(0))[0].wait()


def test_rows_may_travel_apart() -> None:
    verdict = Verdict(0, 1, 2, 3, 1, (4,), None, torch.ones(1, 2))
    front, rows = encode(verdict)
    ours, far = links()
    far.receive = lambda timeout: (2, memoryview(front))  # type: ignore[method-assign,arg-type]  # the fault
    far.rows = rows.view(torch.uint8).flatten()  # type: ignore[assignment,union-attr]  # the fault
    found = ours.poll()
    assert isinstance(found, Verdict)
    assert torch.equal(found.feedback, verdict.feedback)
    with pytest.raises(StageLostError, match="stage 2 was killed"):  # what waits may have rows, too
        raise_if_lost(far, lost(0))  # type: ignore[arg-type]  # it too


def test_what_answers_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected a verdict, got Status"):
        links(Status(1, "progress", {}))[0].wait()


def test_a_host_that_stood_still_is_not_held_against_others(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(linked.time, "monotonic", lambda: clock[0])
    patience, ended = Patience(9 * CHECK_S), []
    for _ in range(5):  # each gap counts as two waits at most
        clock[0] += 100.0
        ended.append(patience.ended())
    assert ended == [False] * 4 + [True]
    patience, ended = Patience(2.5 * CHECK_S), []
    for _ in range(3):
        clock[0] += CHECK_S
        ended.append(patience.ended())
    assert ended == [False, False, True]


def test_a_pipeline_of_one_stage_answers_itself() -> None:
    recorder = Recorder(trace=True)
    ours = OwnLinks(Judge(HashStage(0, 1, 8), 0, CAPACITY), recorder)  # type: ignore[arg-type]  # as a stage
    assert (ours.asked, ours.epoch(0), ours.poll()) == (0, 1, None)
    with pytest.raises(IndexError):
        ours.epoch(1)
    stops = tuple(range(8))
    ours.send(Begin(0, SamplingParams(), 2, (), 8))
    hidden = pack([11, 12])
    ours.send(Block(0, 1, 0, -1, 0, (3, 4), hidden))
    ours.send(Block(0, 1, 2, 1, 1, (3, 4), hidden))
    first, second = ours.wait(), ours.poll()
    assert isinstance(first, Verdict)
    assert isinstance(second, Verdict)
    assert (len(first.tokens), len(second.tokens)) == (0, 1)
    assert [slice[2:6] for slice in recorder.take()["slices"]] == [("verify", 1, 2, 1)]
    ours.send(Begin(0, SamplingParams(min_tokens=3), 2, stops, 8))
    ours.send(Block(0, 1, 0, -1, 1, (3, 4), hidden))
    refusal = ours.poll()
    assert isinstance(refusal, Refusal)
    assert (refusal.slot, refusal.epoch, refusal.source) == (0, 1, 0)
    assert "must leave a finite largest logit at position 2" in refusal.message
    assert torch.equal(hidden, pack([11, 12]))
