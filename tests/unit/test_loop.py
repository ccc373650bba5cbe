"""A stage behind the first on its own: what it passes on, what it answers, what it counts."""

from __future__ import annotations

import json
import traceback

import pytest
import torch

from ppsd.errors import PipelineError
from ppsd.model.passes import Watch
from ppsd.speculation.waves import Part, Row
from ppsd.types import SamplingParams
from ppsd.worker.frame import CONTROL_BYTES
from ppsd.worker.judge import Judge
from ppsd.worker.link import TransportLink
from ppsd.worker.loop import Worker, failure_status
from ppsd.worker.messages import Begin, Block, Control, Message, Refusal, Status, encode
from ppsd.worker.recorder import Recorder
from ppsd.worker.wave_messages import Opinion, Wave
from tests.support.hash_model import CAPACITY, HashStage, pack

VOCAB = 8
PART = Part(1, 1, 2, ())
MOVING = Part(1, 1, 3, ((CAPACITY, 2),))


class Line:
    """A link that notes what is sent; ``epochs`` are those of the slots."""

    def __init__(self, *epochs: int) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.epochs = list(epochs)
        self.passing = Watch()

    def send(self, to: int, message: Message) -> None:
        self.sent.append((to, message))

    def epoch(self, slot: int) -> int:
        return self.epochs[slot]

    def watch(self, *slots: int) -> Watch:
        return self.passing


class Head:
    """A head that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def begin(self, begin: Begin) -> None:
        self.asked.append(("begin", begin.slot))

    def share(self, source: int, slot: int, length: int) -> None:
        self.asked.append(("share", source, slot, length))

    def commit(self, slot: int, length: int, moves: object) -> None:
        self.asked.append(("commit", slot, length, moves))

    def observe(self, rank: int, block: Block, hidden: torch.Tensor) -> Opinion | None:
        node = ((block.slot, block.epoch),)
        return Opinion(rank, node, ((1,),), hidden[-1:]) if block.judge else None

    def opinion(self, rank, rows, hidden, verified=None, masks=()) -> Opinion:
        self.asked.append(("opinion", [row.node for row in rows], hidden.tolist(), masks))
        return Opinion(rank, tuple((row.slot, row.node) for row in rows), (), hidden)


def middle(*epochs: int) -> tuple[Worker, Line, Head, Recorder]:
    """Return the second of three stages, which holds two rows of slot 1."""
    line, head, recorder = Line(*epochs), Head(), Recorder(trace=True)
    stage = HashStage(1, 3, VOCAB, slots=2, loose=8)
    stage.start(pack([5, 9]), 0, 1).advance()
    return Worker(1, stage, line, None, recorder, head), line, head, recorder  # type: ignore[arg-type]  # doubles


def last(*epochs: int, **params: object) -> tuple[Worker, Line]:
    """Return the last of two stages, with a request in slot 0."""
    line, stage = Line(*epochs), HashStage(1, 2, VOCAB)
    worker = Worker(1, stage, line, Judge(stage, 1, CAPACITY))  # type: ignore[arg-type]  # doubles
    stops = tuple(range(VOCAB))
    worker.handle(Begin(0, SamplingParams(**params), 2, stops, VOCAB))  # type: ignore[arg-type]  # any
    return worker, line


def begin(slot: int, **more: object) -> Begin:
    return Begin(slot, SamplingParams(), 2, (), VOCAB, **more)  # type: ignore[arg-type]  # any


def block(slot: int, judge: int, position: int = 0) -> Block:
    return Block(slot, 1, position, position - 1, judge, (3, 4), pack([11, 12]))


def wave(*nodes: int, masks: tuple[bytes, ...] = (), part: Part = PART) -> Wave:
    rows = tuple(Row(1, n, 1, 2, 7, CAPACITY + i, (), ()) for i, n in enumerate(nodes))
    return Wave((part,), rows, pack(range(len(nodes))), masks)


def kinds(recorder: Recorder) -> list[tuple[str, int, int, int]]:
    """Return kind, epoch, position and rows of what was done."""
    return [slice[2:6] for slice in recorder.take()["slices"]]


def test_a_head_speaks_of_prompts_that_want_it() -> None:
    worker, line, head, recorder = middle(1, 1)
    worker.handle(begin(0, want_opinions=True))
    worker.handle(block(0, judge=1))
    (_, (_, sent), (to, said)) = line.sent
    assert isinstance(sent, Block)
    assert isinstance(said, Opinion)
    assert (to, said.source, said.nodes) == (0, 1, ((0, 1),))
    assert torch.equal(said.numbers, sent.hidden[-1:])
    worker.handle(block(0, judge=0, position=2))
    worker.handle(begin(0))
    worker.handle(block(0, judge=1))
    assert [to for to, _ in line.sent] == [2, 2, 0, 2, 2, 2]
    assert head.asked == [("begin", 0), ("begin", 0)]
    assert recorder.busy_ns["verify"] > 0
    assert kinds(recorder) == [("verify", 1, 0, 2), ("prefill", 1, 2, 2), ("verify", 1, 0, 2)]


def test_rows_that_are_shared_are_copied_for_the_head_too() -> None:
    worker, line, head, _ = middle(1, 1)
    worker.handle(begin(0, source=1, shared=2))
    assert head.asked == [("share", 1, 0, 2), ("begin", 0)]
    assert worker._stage.cache.lengths == [2, 2]
    worker.handle(begin(1, source=1, shared=2))
    assert head.asked[2:] == [("begin", 1)]
    assert [to for to, _ in line.sent] == [2, 2]


def test_a_wave_goes_on_with_the_rows_that_live_and_their_masks() -> None:
    worker, line, head, recorder = middle(1, 3)
    worker.handle(wave(2, 3, masks=(b"\x01", b"\x02")))
    (to, sent), (back, said) = line.sent
    assert isinstance(sent, Wave)
    assert isinstance(said, Opinion)
    assert (to, [row.node for row in sent.rows], sent.masks) == (2, [3], (b"\x02",))
    assert (back, said.nodes) == (0, ((1, 3),))
    assert head.asked == [
        ("commit", 1, 2, ()),
        ("opinion", [3], sent.hidden.tolist(), (b"\x02",)),
    ]
    assert kinds(recorder) == [("verify", 1, 2, 1), ("draft", 1, 2, 1)]


@pytest.mark.parametrize(("part", "told"), [(PART, []), (MOVING, [(2, (MOVING,), ())])])
def test_a_dead_wave_goes_on_if_it_has_moves_to_tell(part, told) -> None:
    worker, line, _, recorder = middle(1, 9)
    worker.handle(wave(2, 3, part=part))
    assert [(to, sent.parts, sent.rows) for to, sent in line.sent] == told
    worker.handle(wave(2, 3))
    assert recorder.blocks == {"dropped": 2}


def test_a_wave_that_dies_on_the_way_is_cancelled() -> None:
    worker, line, _, recorder = middle(1, 1)
    line.passing.look = lambda: line.epochs.__setitem__(1, 9)
    worker.handle(wave(2, 3))
    assert line.sent == []
    assert kinds(recorder) == [("cancelled", 1, 2, 2)]


def test_a_block_that_dies_on_the_way_is_cancelled() -> None:
    worker, line, _, recorder = middle(1, 1)
    line.passing.look = lambda: line.epochs.__setitem__(0, 9)
    for _ in range(3):  # the second is stale when it comes
        worker.handle(block(0, judge=1))
    assert line.sent == []
    assert recorder.blocks == {"cancelled": 1, "dropped": 2}
    assert kinds(recorder) == [("cancelled", 1, 0, 2)]


def test_what_rank_0_asks_for_is_passed_on_and_answered() -> None:
    worker, line, _, recorder = middle(1, 1)
    recorder.total_ns = 5
    for verb in ("busy", "report", "other"):
        worker.handle(Control(verb))
    assert not worker.stopped
    worker.handle(Control("stop"))
    assert worker.stopped
    asked = [message.verb for to, message in line.sent if to == 2]
    assert asked == ["busy", "report", "other", "stop"]
    busy, report = (message for to, message in line.sent if to == 0)
    assert busy == Status(1, "busy", {"total_ns": 5})
    assert isinstance(report, Status)
    assert (report.source, report.kind, report.fields["last"]) == (1, "report", True)


def test_a_long_report_comes_in_parts() -> None:
    worker, line, _, recorder = middle(1, 1)
    lots = CONTROL_BYTES // 200
    rows = wave(*range(2, 10)).rows
    for number in range(lots):
        recorder.add(0, "verify", number, 0, 8, rows)
    worker.handle(Control("report"))
    reports = [message for to, message in line.sent if to == 0]
    assert [report.fields["last"] for report in reports] == [False] * (len(reports) - 1) + [True]
    assert all(0 < len(json.dumps(report.fields)) < CONTROL_BYTES for report in reports)
    assert 2 < len(reports) < 12
    assert {report.kind for report in reports} == {"report"}
    slices = [slice for report in reports for slice in report.fields["slices"]]
    assert [slice[3] for slice in slices] == list(range(lots))
    assert reports[-1].fields["blocks"] == {"verify": lots}


class Apart:
    """An end of a transport on which a block's rows travel apart from its frame, GPU to GPU."""

    def __init__(self) -> None:
        front, hidden = encode(block(0, judge=1))
        assert isinstance(front, bytes)
        assert isinstance(hidden, torch.Tensor)
        self.front, self.rows = memoryview(front), hidden.view(torch.uint8).flatten()

    def receive(self, timeout: float) -> tuple[int, memoryview]:
        return 0, self.front

    def words(self, slot: int) -> tuple[int, ...]:
        return ()


def test_rows_may_travel_apart() -> None:
    link = TransportLink(Apart(), 1.0)  # type: ignore[arg-type]  # as one
    message = link.receive(1.0)
    assert isinstance(message, Block)
    assert torch.equal(message.hidden, pack([11, 12]))
    assert link.watch(0) is link.watch(0)
    assert link.watch(0) is not link.watch(1)
    assert isinstance(link.watch(0, 1), Watch)


def test_a_request_that_cannot_go_on_is_refused() -> None:
    worker, line = last(1, min_tokens=3)  # any token would end it
    worker.handle(block(0, judge=1))
    [(to, refusal)] = line.sent
    assert isinstance(refusal, Refusal)
    assert (to, refusal.slot, refusal.epoch, refusal.source) == (0, 0, 1, 1)
    assert "must leave a finite largest logit" in refusal.message


def test_a_failure_keeps_the_end_of_its_traceback() -> None:
    def fail(depth: int) -> None:
        if not depth:
            raise PipelineError("x" * 5000 + "end")
        fail(depth - 1)

    with pytest.raises(PipelineError) as caught:
        fail(2)
    status = failure_status(2, caught.value)
    assert (status.source, status.kind) == (2, "failed")
    assert status.fields["error"] == "PipelineError"
    assert status.fields["message"] == "x" * 4096
    assert status.fields["pipeline"] is True
    assert status.fields["traceback"] == "".join(traceback.format_exception(caught.value))
    long = failure_status(2, ValueError("y" * CONTROL_BYTES + "end"))
    assert long.fields["pipeline"] is False
    assert long.fields["traceback"].endswith("yend\n")
    kept = len(json.dumps(long.fields))
    assert CONTROL_BYTES // 8 < kept <= CONTROL_BYTES // 2
    assert failure_status(1, ValueError("😀" * CONTROL_BYTES)).fields["message"].startswith("😀")
