"""The engine with text on top: chunks and completions, and what is told of times and stages."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.sequence import Request
from ppsd.engine.stats import StageStats, Totals, stage_stats
from ppsd.engine.text_engine import TextEngine, Ticket
from ppsd.errors import PipelineError, RequestError
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Schedule
from ppsd.types import SamplingParams
from tests.support.rig import CONTEXT, VOCAB, Rig

STAGES, BOUNDS = 3, (0, 2, 5, 6)
PROMPT = (1, 2, 3)
S = 1_000_000_000


class Letters:
    """A decoder that has a letter for each token, the last one late."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_ids: list[int]) -> str:
        said, self._held = self._held, "".join(chr(97 + token) for token in token_ids)
        return said

    def finish(self) -> str:
        return self._held


class Clocked:
    """A text engine over oracle stages, whose clock goes on by a second with every step."""

    def __init__(self, **settings: Any) -> None:
        self.rig = Rig(STAGES, Schedule(1, STAGES), **settings)
        self.rig.links._timeout = 1.0
        self.rig.decode([7], SamplingParams(max_tokens=1))
        self.rig.stage.drafter = OracleDrafter([0] * CONTEXT, 1.0, VOCAB)
        self.time = 100 * S
        self.rig.stage.recorder.now = lambda: self.time
        self.rig.stage.recorder.total_ns = 0
        self.text = TextEngine(BOUNDS)
        self.text.engine = self.rig.engine

    def begin(self, *, silent: bool = False, **params: Any) -> Ticket:
        request = Request(PROMPT, SamplingParams(**{"max_tokens": 6} | params), frozenset(), VOCAB)
        ticket = Ticket(self.text, request, Letters(), silent=silent)
        assert ticket.can_begin()
        ticket.begin()
        return ticket

    def step(self) -> None:
        self.time += S
        self.text.step()

    def run(self, ticket: Ticket) -> tuple[list[Chunk], list[int], Any]:
        """Return chunks, the times at which they came, and the outcome."""
        chunks, times = [], []
        while True:
            while (taken := ticket.take_now()) is None:
                self.step()
                assert self.time < 10_000 * S, "the request does not end"
            if taken[0] != "chunk":
                return chunks, times, taken
            chunks.append(taken[1])
            times.append(self.time)

    @property
    def plain(self) -> list[int]:
        return self.rig.plain(PROMPT, SamplingParams(max_tokens=6), frozenset())

    @property
    def letters(self) -> str:
        return "".join(chr(97 + token) for token in self.plain)


def test_chunks_add_up_and_times_are_the_engines() -> None:
    engine = Clocked()
    assert not engine.text.busy
    ticket = engine.begin()
    assert engine.text.busy
    assert not ticket.can_begin()
    chunks, times, (kind, completion) = engine.run(ticket)
    assert kind == "result"
    assert [t for chunk in chunks for t in chunk.token_ids] == engine.plain
    assert "".join(chunk.text for chunk in chunks) == completion.text == engine.letters
    assert (chunks[-1].token_ids, chunks[-1].text) == ((), engine.letters[-1])
    assert completion.finish_reason == "length"
    stats = completion.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.cached_tokens) == (3, 6, 0)
    assert stats.prefill_seconds == pytest.approx(times[0] / S - 100)
    assert stats.decode_seconds == pytest.approx((engine.time - times[0]) / S)
    assert stats.gate is None
    assert [stage.layers for stage in stats.stages] == [(0, 2), (2, 5), (5, 6)]
    assert stats.stages[0].blocks["forward"] > 0
    for stage in stats.stages:
        assert stage.busy_share == pytest.approx(stage.busy_seconds / (engine.time / S - 100))
    assert not engine.text.busy


def test_a_silent_ticket_puts_nothing_but_its_completion() -> None:
    engine = Clocked()
    chunks, _, (kind, completion) = engine.run(engine.begin(silent=True))
    assert (chunks, kind, completion.text) == ([], "result", engine.letters)


@pytest.mark.parametrize("least", [0, 5])
def test_a_stop_string_ends_a_request(least) -> None:
    """Once it may: text of the tokens before ``min_tokens`` is no part of it."""
    engine = Clocked()
    letters = engine.letters
    stop = letters[2]
    chunks, _, (_, completion) = engine.run(engine.begin(stop=(stop,), min_tokens=least))
    end = letters.find(stop, max(0, least - 2))
    end = len(letters) if end < 0 else end
    assert isinstance(completion, Completion)
    assert completion.text == "".join(chunk.text for chunk in chunks) == letters[:end]
    assert completion.finish_reason == ("stop" if end < len(letters) else "length")
    assert not engine.rig.engine.busy


def test_a_stop_string_may_come_up_with_the_last_characters() -> None:
    """They are held back until nothing more can come, here at ``max_tokens``."""
    engine = Clocked()
    letters = engine.letters
    length = letters.index(letters[-1]) + 1
    ticket = engine.begin(stop=(letters[-1],), max_tokens=length)
    _, _, (_, completion) = engine.run(ticket)
    assert (completion.text, completion.finish_reason) == (letters[: length - 1], "stop")


def test_without_a_trace_none_grows(monkeypatch) -> None:
    engine = Clocked(gate=Gate(Schedule(1, STAGES)))
    monkeypatch.setattr(engine.text.trace, "add", lambda *each: pytest.fail("nobody asked"))
    engine.rig.stage.recorder.slices = None
    assert engine.run(engine.begin())[2][0] == "result"


def test_a_ticket_that_nobody_waits_for_ends() -> None:
    engine = Clocked()
    ticket = engine.begin()
    for _ in range(3):
        engine.step()
    ticket.cancelled = True
    engine.step()
    assert not engine.text.busy
    assert not engine.rig.engine.busy


def test_an_error_ends_what_is_under_way() -> None:
    engine = Clocked()
    for error, kept in ((ValueError("bad"), True), (PipelineError("gone"), False)):
        ticket = engine.begin()
        engine.step()
        engine.text.cancel(error)
        kind, value = ticket.take()
        while kind == "chunk":
            kind, value = ticket.take()
        assert (kind, type(value), str(value)) == ("error", type(error), str(error))
        assert (value is error) == kept
        assert not engine.text.busy


def test_a_stage_lost_at_the_end_of_a_request_leaves_nobody_waiting(monkeypatch) -> None:
    engine = Clocked()
    ticket = engine.begin()
    gone = PipelineError("stage 1 is gone")

    def report() -> list[object]:
        raise gone

    monkeypatch.setattr(engine.text.engine.links, "report", report)
    with pytest.raises(PipelineError, match="stage 1 is gone"):
        engine.run(ticket)
    engine.text.cancel(gone)
    taken = ticket.take_now()
    while taken is not None and taken[0] == "chunk":
        taken = ticket.take_now()
    assert taken is not None, "its caller would wait for ever"
    assert (taken[0], str(taken[1])) == ("error", "stage 1 is gone")
    assert not engine.text.busy


def test_a_request_that_cannot_go_on_fails_with_its_reason() -> None:
    engine = Clocked()
    params = SamplingParams(max_tokens=6, min_tokens=4)
    request = Request(PROMPT, params, frozenset(range(VOCAB)), VOCAB)
    ticket = Ticket(engine.text, request, Letters())
    assert not ticket.silent
    ticket.begin()
    _, _, (kind, error) = engine.run(ticket)
    assert (kind, type(error)) == ("error", RequestError)


def test_totals_are_those_of_the_moment_at_which_all_were_asked() -> None:
    engine = Clocked()
    nothing = Totals(0.0, (0.0,) * STAGES, engine.rig.stage.recorder.passes, 0, 0.0)
    first = engine.text.totals()
    assert (first.seconds, first.busy_seconds) == (nothing.seconds, nothing.busy_seconds)
    ticket = engine.begin()
    start, links = engine.time, engine.rig.links
    engine.step()
    assert links.asked == STAGES - 1, "the totals before had them asked"
    asked = engine.time
    while links.asked:
        engine.step()
    second = engine.text.totals()
    assert second.seconds == pytest.approx((asked - start) / S)
    assert second.busy_seconds[0] == 0.0, "as of then"
    assert second.cache_used > 0
    links.busy_ns[0] = 2 * S
    engine.run(ticket)
    for worker in engine.rig.workers:
        while worker.step(0.0):
            pass
    links.poll()
    links.busy_ns[0] = 2 * S
    third = engine.text.totals()
    assert third.seconds == pytest.approx((engine.time - start) / S)
    assert third.busy_seconds[1] == 2.0
    assert third.rows > 0
    before = third.seconds
    engine.time += 1000 * S  # nothing is under way
    engine.run(engine.begin())
    assert before < engine.text._noted[0] < before + 1000


def test_a_gates_pauses_are_told(monkeypatch) -> None:
    schedule = Schedule(1, STAGES)
    engine = Clocked(gate=Gate(schedule))
    engine.rig.stage.recorder.slices = deque()
    traced: list[Any] = []
    monkeypatch.setattr(engine.text.trace, "add", lambda *each: traced.append(each))
    _, _, (_, completion) = engine.run(engine.begin())
    assert completion.stats.gate is not None
    [(reports, pauses)] = traced
    assert len(reports) == STAGES
    assert list(pauses) == list(completion.stats.gate.pauses_until(engine.time / S))


def test_a_stages_share_is_that_of_the_requests_time() -> None:
    reports = [
        {"busy_ns": {"forward": 2 * S, "draft": S}, "blocks": {"forward": 3}},
        {"busy_ns": {}, "blocks": {}},
    ]
    assert stage_stats(reports, (0, 2, 6), 0.5) == (
        StageStats((0, 2), 3.0, 6.0, {"forward": 3}),
        StageStats((2, 6), 0.0, 0.0, {}),
    )
    assert [stats.busy_share for stats in stage_stats(reports, (0, 2, 6), 0.0)] == [0.0, 0.0]
