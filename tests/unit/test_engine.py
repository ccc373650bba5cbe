"""The engine over oracle stages: what it takes over, tells and counts, and whom it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch

from ppsd.engine.events import FedBlock, FedRows, Left, Made
from ppsd.engine.sequence import Request, collect_logits
from ppsd.errors import RequestError
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.policy import Emit, Finish, Schedule
from ppsd.types import SamplingParams
from ppsd.worker.recorder import Recorder
from tests.support.hash_model import last_rows
from tests.support.rig import VOCAB, Rig
from tests.support.wave_rig import Asked, WaveRig

PROMPT = [1, 2]
LONG = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2]  # two whole chunks and a half
PARAMS = SamplingParams(max_tokens=5)
STAGES = 3
R = TypeVar("R", bound=Rig)


@pytest.mark.parametrize("turns", [[0], [2, 1, 0], [1, 2, 2, 0, 1, 0]])
def test_a_refusal_ends_the_request_whenever_it_comes(turns: list[int]) -> None:
    """While stage 0 computes, before it drafts, or when the engine waits."""
    rig = Rig(3, Schedule(1, 3))
    rig.move_while_stage_0_computes(turns)
    every = frozenset(range(VOCAB))
    doomed = SamplingParams(max_tokens=9, min_tokens=4)
    for _ in range(3):
        rig.decode(PROMPT, doomed, every, drafter=OracleDrafter([0] * 20, 1.0, VOCAB))
        assert isinstance(rig.sequence.error, RequestError)
        assert rig.output == Finish("error"), "the one who asked hears of it"
        params = SamplingParams(max_tokens=12)
        assert rig.decode(PROMPT, params) == rig.plain(PROMPT, params, frozenset())


def engine_of(kind: str, slots: int = 1) -> Rig:
    """Return a rig that drafts chains or trees, with its engine made."""
    if kind == "trees":
        return impatient(WaveRig(STAGES, 8, heads={0: 0.7, 1: 0.7}, concurrent=slots))
    rig = impatient(Rig(STAGES, Schedule(1, STAGES)))
    rig.decode([7], SamplingParams(max_tokens=1))
    return rig


def impatient(rig: R) -> R:
    """Let a rig that has come to a stop fail soon."""
    rig.links._timeout = 1.0
    return rig


def steps(rig: Rig, sequence: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what the engine makes final until a request is over."""
    for _ in range(2000):
        if sequence.finish_reason:
            return
        yield from rig.engine.step()
    pytest.fail("the request does not end")


def answer(rig: Rig, prompt: list[int], **more: Any) -> Any:
    """Run a request to its end, beside what is under way; return its sequence."""
    sequence = rig.engine.add(Request(tuple(prompt), PARAMS, frozenset(), VOCAB, **more))
    tokens: list[int] = []
    for other, output in steps(rig, sequence):
        tokens += output.tokens if other is sequence and isinstance(output, Emit) else ()
    assert tokens == rig.plain(prompt, PARAMS, frozenset())
    return sequence


@pytest.mark.parametrize("kind", ["chains", "trees"])
def test_rows_of_whole_chunks_are_taken_over(kind) -> None:
    rig = engine_of(kind)
    assert answer(rig, LONG).cached == 0
    assert answer(rig, LONG).cached == 8
    assert answer(rig, LONG).cached == 8
    assert answer(rig, [*LONG[:7], 3, 3]).cached == 4
    assert answer(rig, [*LONG[:7], 3, 3, 4, 5, 6]).cached == 8
    assert answer(rig, LONG, scores=print, top=1).cached == 0
    assert answer(rig, LONG, reuse=True).cached == len(LONG) - 1
    assert answer(rig, LONG).cached == 8, "computed in whole chunks before"
    plain = rig.plain(LONG, PARAMS, frozenset())
    held = len(LONG) + len(plain) - (2 if kind == "trees" else 1)  # of a tree's, those moved
    assert answer(rig, [*LONG, *plain, 3], reuse=True).cached == held
    assert answer(rig, [*LONG, *plain, 3]).cached == 8, "an answer's rows come one by one"
    assert answer(rig, [2, *LONG]).cached == 0
    assert answer(rig, [3, *LONG], reuse=True).cached == 0


def test_rows_of_a_request_under_way_are_copied() -> None:
    rig = engine_of("trees", slots=2)
    first = answer(rig, LONG)
    request = Request(tuple(LONG), SamplingParams(max_tokens=60), frozenset(), VOCAB)
    running = rig.engine.add(request)
    assert (running.slot, running.cached) == (first.slot, 8), "where its rows are"
    copied = answer(rig, LONG)
    assert (copied.slot, copied.cached) == (1 - first.slot, 8)
    assert not running.finish_reason
    rig.engine.abort(running)
    assert rig.engine._held[copied.slot].overlap(copied.request) == 8, "as good as computed"
    assert answer(rig, [3, 3]).slot == copied.slot, "free for the longest"
    assert answer(rig, [3, 4]).slot == first.slot


@pytest.mark.parametrize("kind", ["chains", "trees"])
def test_logits_come_with_their_positions(kind) -> None:
    rig = engine_of(kind, slots=2)
    if kind == "trees":  # verdicts of another request come in the same waves
        rig.engine.add(Request((3, 1), SamplingParams(max_tokens=40), frozenset(), VOCAB))
    sink, rows = collect_logits()
    answer(rig, LONG, logits=sink)
    plain = rig.plain(LONG, PARAMS, frozenset())
    hidden = last_rows(torch.tensor([*LONG, *plain]), STAGES, VOCAB)
    logits = rig.models[-1].logits(hidden)
    for position in range(len(LONG), len(LONG) + len(plain)):
        assert torch.equal(rows[position], logits[position - 1])


def traced(rig: Rig) -> list[list[tuple[Any, ...]]]:
    """Return what each stage did for a request of eleven tokens: kind, position and rows."""
    recorders = [Recorder(trace=True) for _ in range(STAGES)]
    rig.stage.recorder, *others = recorders
    for worker, recorder in zip(rig.workers, others, strict=True):
        worker._recorder = recorder
    answer(rig, LONG)
    return [[slice[2:6] for slice in r.take()["slices"]] for r in recorders]


def test_passes_of_plain_decoding_are_noted_and_counted() -> None:
    rig = impatient(Rig(STAGES, Schedule(1, 1)))
    rig.decode([7], SamplingParams(max_tokens=1))
    first, *others = traced(rig)
    prompt = [("prefill", 0, 4), ("prefill", 4, 4), ("forward", 8, 2)]
    rows = [*prompt, *(("forward", p, 1) for p in range(10, 14))]
    assert [(kind, *place) for kind, _, *place in first] == rows
    for slices in others:
        kinds = [(kind.replace("verify", "forward"), *place) for kind, _, *place in slices]
        assert kinds == rows
    assert rig.stage.recorder.passes == rig.stage.recorder.rows == 4, "the prompt's are none"


@pytest.mark.parametrize("kind", ["chains", "trees"])
def test_who_looks_on_sees_what_is_fed_and_what_is_final(kind) -> None:
    rig = engine_of(kind)
    events: list[Any] = []
    rig.stage.recorder.observer = events.append
    rig.stage.recorder.now = lambda: 1_500_000_000
    assert rig.engine.now() == 1.5
    answer(rig, LONG)
    made = [event for event in events if isinstance(event, Made)]
    assert [t for event in made for t in event.tokens] == rig.plain(LONG, PARAMS, frozenset())
    assert made[-1].committed == len(LONG) + PARAMS.max_tokens
    assert all((event.time, event.slot) == (1_500_000_000, 0) for event in made)
    assert events[-1] == Left(0)
    fed = [event for event in events if isinstance(event, FedBlock | FedRows)]
    assert all(event.start == 1_500_000_000 for event in fed)
    blocks = [event for event in fed if isinstance(event, FedBlock)]
    assert [(b.slot, b.feed.position) for b in blocks[:3]] == [(0, 0), (0, 4), (0, 8)]
    if kind == "trees":
        rows = [row for event in fed if isinstance(event, FedRows) for row in event.rows]
        assert {row.slot for row in rows} == {0}
        assert len({row.position for row in rows}) >= PARAMS.max_tokens - 1


def test_passes_that_miss_are_noted_as_cancelled() -> None:
    rig = impatient(Rig(STAGES, Schedule(1, STAGES)))
    rig.move_while_stage_0_computes([0, 0, 1, 2, 1, 2, 0])
    recorder = rig.stage.recorder = Recorder(trace=True)
    params = SamplingParams(max_tokens=30)
    assert rig.decode(PROMPT, params, alpha=0.3) == rig.plain(PROMPT, params, frozenset())
    forward = [slice for slice in recorder.slices or () if slice[2] == "forward"]
    assert recorder.blocks["cancelled"] > 0
    assert recorder.blocks["draft"] > 0
    assert recorder.passes == len(forward) - 1, "the prompt's pass is none"


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

    def masks(answered: tuple[int, ...]) -> bytes:
        return bytes([0b01010101 if len(answered) % 2 else 0b10101110])

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
    next(output for each, output in steps(rig, sequence) if each is sequence)
    assert (root, 0) in heard


def test_rows_that_do_not_pay_are_not_fed() -> None:
    for costs, most in (((), 8), ((1.0, *[50.0 * n for n in range(1, 8)]), 1)):
        rig = impatient(WaveRig(STAGES, 8, heads={0: 0.6, 1: 0.9}, costs=costs))
        events: list[Any] = []
        rig.stage.recorder.observer = events.append
        answer(rig, LONG)
        assert max(len(e.rows) for e in events if isinstance(e, FedRows)) == most


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_so_many_waves_are_under_way_as_the_schedule_says(rows) -> None:
    rig = impatient(WaveRig(STAGES, rows, heads={0: 1.0}))
    sequence = rig.engine.add(Request((1, 2), SamplingParams(max_tokens=20), frozenset(), VOCAB))
    under_way: list[int] = []
    feed = rig.engine._feed_wave
    rig.engine._feed_wave = lambda: (feed(), under_way.append(len(sequence.waves.waves)))[0]
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


def test_a_refusal_ends_a_request_of_a_wave_alone() -> None:
    rig = engine_of("trees", slots=2)
    every = frozenset(range(VOCAB))
    doomed = Request((1, 2), SamplingParams(max_tokens=9, min_tokens=4), every, VOCAB)
    for _ in range(3):
        sequence = rig.engine.add(doomed)
        answer(rig, LONG)
        assert sequence.finish_reason == "error"
        assert isinstance(sequence.error, RequestError)


def test_chains_ask_no_heads_on_the_way() -> None:
    chains, trees = engine_of("chains"), engine_of("trees")
    for rig in (chains, trees):
        rig.engine.add(Request(tuple(LONG), PARAMS, frozenset(), VOCAB))
        for _ in range(9):
            rig.engine.step()
    assert not any(worker._heard for worker in chains.workers)
    assert all(worker._heard == {0} for worker in trees.workers)
