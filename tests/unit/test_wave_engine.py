"""The engine of trees over oracle stages: what heads are given, how many waves are under way."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppsd.engine.events import FedBlock, FedRows
from ppsd.engine.sequence import Request
from ppsd.engine.wave_engine import WaveEngine
from ppsd.errors import NonFiniteError, RequestError
from ppsd.speculation.policy import Emit, Schedule
from ppsd.speculation.waves import Verified
from ppsd.types import SamplingParams
from ppsd.worker.messages import Block
from ppsd.worker.recorder import Recorder
from ppsd.worker.wave_messages import Verdicts
from tests.support.hash_model import last_rows
from tests.support.rig import VOCAB
from tests.support.wave_rig import Asked, WaveRig
from tests.unit.test_engine import (
    LONG,
    PARAMS,
    STAGES,
    answer,
    engine_of,
    impatient,
    masks,
    steps,
    traced,
)


class Spy:
    """Notes what the first head of a rig of trees is asked, and by which rows."""

    def __init__(self, rig: WaveRig) -> None:
        self.asked: list[tuple[list[Any], torch.Tensor | None, tuple[bytes, ...], list[int]]] = []
        self._rig, self._opinion = rig, rig.stage.head.opinion
        rig.stage.head.opinion = self.opinion

    def opinion(self, rank: int, rows: Any, hidden: Any, verified: Any, masks: Any) -> Any:
        known = [self._rig.engine._slots[row.slot].waves.committed for row in rows]
        self.asked.append((rows, verified, masks, known))
        return self._opinion(rank, rows, hidden, verified, masks)


def test_a_head_reads_the_newest_verified_row_of_each_slot() -> None:
    rig = impatient(WaveRig(STAGES, 8, heads={0: 0.5, 1: 0.9}, concurrent=2, feedback=True))
    spy = Spy(rig)
    asked = [Asked([3, 1], SamplingParams(max_tokens=30)), Asked(LONG, PARAMS)]
    texts = [[*each.prompt, *rig.learn(each)] for each in asked]
    rig.engine.add(Request((3, 1), asked[0].params, frozenset(), VOCAB))  # in slot 0
    answer(rig, LONG)
    rows_of = [last_rows(torch.tensor(text), STAGES, VOCAB) for text in texts]
    seen = set()
    for rows, verified, _, known in spy.asked:
        begun = [n > len(asked[row.slot].prompt) for row, n in zip(rows, known, strict=True)]
        assert (verified is not None) == all(begun)
        for i, row in enumerate(rows if all(begun) else ()):
            assert torch.equal(verified[i], rows_of[row.slot][known[i] - 2])
            seen.add((row.slot, known[i]))
    assert len(seen) > PARAMS.max_tokens
    quiet = impatient(WaveRig(STAGES, 8, heads={0: 0.5}))
    spy = Spy(quiet)
    answer(quiet, LONG)
    assert {verified for _, verified, _, _ in spy.asked} == {None}


def test_what_a_grammar_permits_goes_with_each_row() -> None:
    """Requests without a grammar permit everything."""

    rig = impatient(WaveRig(STAGES, 8, heads={0: 0.5, 1: 0.9}, concurrent=2))
    spy = Spy(rig)
    rig.engine.add(Request((3, 1), SamplingParams(max_tokens=30), frozenset(), VOCAB))
    request = Request((1, 2, 3), PARAMS, frozenset(), VOCAB, masks=masks)
    sequence, tokens = rig.engine.add(request), []
    for each, output in steps(rig, sequence):
        tokens += output.tokens if each is sequence and isinstance(output, Emit) else ()
    assert all(masks(tuple(tokens[:i]))[0] >> token & 1 for i, token in enumerate(tokens))
    both = 0
    for rows, _, given, _ in spy.asked:
        slots = {row.slot for row in rows}
        assert len(given) == (len(rows) if sequence.slot in slots else 0)
        both += len(slots) == 2
        for row, mask in zip(rows, given, strict=False):
            own = row.slot == sequence.slot
            assert mask == (masks((0,) * (row.position - 2)) if own else b"\xff")
    assert both > 0


@pytest.mark.parametrize("joined", [False, True])
def test_the_end_of_a_prompt_is_drafted_on(joined) -> None:
    rig = impatient(WaveRig(STAGES, 8, heads={0: 1.0}, concurrent=2, lookup=False))
    if joined:
        rig.engine.add(Request((3, 1), SamplingParams(max_tokens=60), frozenset(), VOCAB))
        for _ in range(20):
            rig.engine.step()
    sequence = rig.engine.add(Request(tuple(LONG), PARAMS, frozenset(), VOCAB))
    heard: list[tuple[int, int]] = []
    hear, root = sequence.waves.hear, sequence.waves.tree.root.id

    def listen(node: int, rank: int, *said: Any) -> None:
        heard.append((node, rank))
        hear(node, rank, *said)

    sequence.waves.hear = listen
    events: list[Any] = []
    sent: list[Any] = []
    rig.stage.recorder.observer = events.append
    send = rig.links.send
    rig.links.send = lambda message: (sent.append(message), send(message))[1]
    rig.stage.recorder.take()
    assert [output for each, output in steps(rig, sequence) if each is sequence]
    assert (root, 0) in heard
    assert {rank for _, rank in heard} == {0}
    report = rig.stage.recorder.take()
    assert report["blocks"]["prefill"] == 2
    assert (report["busy_ns"]["prefill"] == 0) == joined, "its time is the wave's"
    fed = [e.feed for e in events if isinstance(e, FedBlock) and e.slot == sequence.slot]
    assert [feed.position for feed in fed] == [0, 4, 8]
    assert all(block.joins == joined for block in sent if isinstance(block, Block))


def test_rows_that_do_not_pay_are_not_fed() -> None:
    for costs, most in (((), 8), ((1.0, *[50.0 * n for n in range(1, 8)]), 1)):
        rig = impatient(WaveRig(STAGES, 8, heads={0: 0.6, 1: 0.9}, costs=costs))
        events: list[Any] = []
        rig.stage.recorder.observer = events.append
        answer(rig, LONG)
        assert max(len(e.rows) for e in events if isinstance(e, FedRows)) == most


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_so_many_waves_are_under_way_as_the_schedule_says(rows) -> None:
    rig = impatient(WaveRig(STAGES, rows, heads={0: 1.0}, lookup=False))
    sequence = rig.engine.add(Request((1, 2), SamplingParams(max_tokens=20), frozenset(), VOCAB))
    under_way: list[int] = []
    feed = rig.engine._feed_wave

    def fed() -> bool:
        done = feed()
        under_way.append(len(sequence.waves.waves))
        assert max(sequence.waves.waves, default=0) <= rig.engine._wave
        return done

    rig.engine._feed_wave = fed
    assert rig.stage.drafting == (rows > 0)
    assert [output for _, output in steps(rig, sequence)]
    most = max(under_way)
    assert most == (STAGES if rows else 1), "without drafts nothing follows the root"
    assert (sequence.waves.counts.drafted > 0) == (rows > 0)


def test_a_wave_and_the_drafts_behind_it_are_noted_side_by_side() -> None:
    rig = engine_of("trees")
    first, *others = traced(rig)
    kinds = [kind for kind, *_ in first]
    assert kinds[:3] == ["prefill", "prefill", "forward"]
    assert set(kinds[3:]) == {"forward", "draft"}
    for before, after in pairwise(first):
        if after[0] == "draft":
            assert before[0] == "forward"
            assert after[1:] == (0, before[2] + 1, before[3])
    waves = [place for kind, *place in first[3:] if kind == "forward"]
    assert (rig.stage.recorder.passes, rig.stage.recorder.rows) == (
        len(waves),
        sum(rows for *_, rows in waves),
    )
    assert {kind for kind, *_ in others[0]} == {"prefill", "verify", "draft"}
    assert {kind for kind, *_ in others[1]} <= {"prefill", "verify", "cancelled"}


def test_many_requests_without_drafts_fill_the_stages() -> None:
    """Their schedule, that of plain decoding, has one block in flight."""
    rig = engine_of("trees")
    settings: dict[str, Any] = {"max_context": 96, "loose": 0, "slots": 2}
    for rows, most in ((0, STAGES), (2, 1)):
        engine = WaveEngine(rig.stage, rig.links, Schedule(1, 1), rows=rows, **settings)
        assert engine._in_flight == most


def test_a_wave_that_misses_is_noted_as_cancelled() -> None:
    rig = impatient(WaveRig(STAGES, 8, heads={0: 0.3, 1: 0.3}))
    rig.move_while_stage_0_computes([0, 0, 1, 2, 1, 2, 0])
    recorder = rig.stage.recorder = Recorder(trace=True)
    params = SamplingParams(max_tokens=40)
    sequence = rig.engine.add(Request((1, 2), params, frozenset(), VOCAB))
    assert [output for _, output in steps(rig, sequence)]
    kinds = Counter(slice[2] for slice in recorder.slices or ())
    for _, _, kind, _, position, rows, nodes in recorder.slices or ():
        assert len(nodes) == (rows if kind != "draft" and position > 1 else 0)
    assert kinds["cancelled"] > 0
    assert set(kinds) <= {"forward", "draft", "cancelled"}
    assert recorder.passes == kinds["forward"] - 1, "the prompt's pass is none"


def test_rows_that_are_not_finite_are_named() -> None:
    rig = engine_of("trees")
    start = rig.stage.start_rows

    def broken(rows: Any, piece: Any = None) -> Any:
        work = start(rows, piece)
        while not work.advance():
            pass
        return SimpleNamespace(hidden=work.hidden * math.nan, advance=lambda watch: True)

    rig.stage.start_rows = broken
    with pytest.raises(NonFiniteError, match="stage 0 computed NaN or infinity at position 10"):
        answer(rig, LONG)


def test_verdicts_on_a_request_that_is_over_hide_no_others() -> None:
    rig = engine_of("trees", slots=2)
    first = rig.engine.add(Request((3, 1), PARAMS, frozenset(), VOCAB))
    second = rig.engine.add(Request((1, 2), PARAMS, frozenset(), VOCAB))
    root, heard = second.waves.tree.root.id, []
    second.waves.on = lambda said: (heard.append(said), [])[1]
    rig.engine.abort(first)
    rig.engine._verify(Verdicts(2, ((first.slot, 1), (second.slot, root)), (4, 5)))
    assert heard == [Verified((root,), (5,))]


@pytest.mark.parametrize("lookup", [False, True])
def test_text_proposes_tokens_if_it_may(lookup) -> None:
    rig = impatient(WaveRig(STAGES, 4, heads={}, lookup=lookup))
    sequence = answer(rig, [1, 2, 3, 1, 2, 3, 1, 2])
    assert (sequence.waves.counts.drafted > 0) == lookup


def test_a_refusal_ends_a_request_of_a_wave_alone() -> None:
    rig = engine_of("trees", slots=2)
    every = frozenset(range(VOCAB))
    doomed = Request((1, 2), SamplingParams(max_tokens=9, min_tokens=4), every, VOCAB)
    for _ in range(3):
        sequence = rig.engine.add(doomed)
        answer(rig, LONG)
        assert sequence.finish_reason == "error"
        assert isinstance(sequence.error, RequestError)
