"""The engine over oracle stages: what it takes over, tells and counts, and whom it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch

from ppsd.engine.engine import Engine
from ppsd.engine.events import FedBlock, FedRows, Left, Made
from ppsd.engine.sequence import HeldRows, Request, _common_prefix, begin_message, collect_logits
from ppsd.errors import ConfigError, RequestError
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Emit, Finish, Schedule
from ppsd.speculation.sampling import Stream
from ppsd.types import SamplingParams
from ppsd.worker.messages import Block
from ppsd.worker.recorder import Recorder
from ppsd.worker.scores import UNSCORED
from tests.support.hash_model import last_rows
from tests.support.rig import VOCAB, Rig
from tests.support.wave_rig import WaveRig

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


@pytest.mark.parametrize("kind", ["chains", "trees"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_request_that_cannot_begin_takes_no_slot(kind, gated, monkeypatch) -> None:
    rig = engine_of(kind)
    rig.engine.gate = Gate(rig.engine.schedule) if gated else None

    def fail(message: object) -> None:
        raise ValueError("mine")

    answer(rig, LONG)
    for prompt, refused in (((), ConfigError), (LONG, ValueError)):
        request = Request(tuple(prompt), PARAMS, frozenset(), VOCAB)
        with monkeypatch.context() as patch:
            patch.setattr(rig.links, "send", fail)
            with pytest.raises(refused):
                rig.engine.add(request)
        assert rig.engine.has_room
        assert not rig.engine.busy
        assert answer(rig, LONG).cached == 0, "nobody knows what the slot holds"
        assert answer(rig, LONG).cached == 8


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


@pytest.mark.parametrize("kind", ["chains", "trees"])
def test_rows_of_a_part_of_a_chunk_are_not_taken_for_a_whole_one(kind) -> None:
    rig = engine_of(kind)
    other = [*LONG[:7], 3, 3, 4, 5, 6]
    answer(rig, LONG)
    assert answer(rig, other, reuse=True).cached == 7
    assert answer(rig, other).cached == 4, "the second chunk's last row was computed alone"
    assert answer(rig, other).cached == 8, "now it was not"


@pytest.mark.parametrize("reuse", [False, True])
def test_copied_rows_are_whole_where_they_were_taken_as_such(reuse: bool) -> None:
    held = HeldRows(0, 64, 4)
    request = Request(tuple(LONG), PARAMS, frozenset(), VOCAB, reuse=reuse)
    held.take(request, 8, own=False)
    again = Request(tuple(LONG), PARAMS, frozenset(), VOCAB)
    assert held.overlap(again) == (0 if reuse else 8)


def test_a_request_does_not_inherit_what_drafts_were_drawn_from() -> None:
    held = HeldRows(0, 64, 4)
    held.draft.drawn[3] = torch.zeros(VOCAB)
    held.take(Request(tuple(LONG), PARAMS, frozenset(), VOCAB), 0, own=True)
    assert not held.draft.drawn


@pytest.mark.parametrize("kind", ["chains", "trees"])
def test_the_rest_of_a_prompt_is_fed_under_new_numbers(kind) -> None:
    """Answers to what ran in the slot before are old."""
    rig = engine_of(kind)
    answer(rig, LONG)
    before, events = rig.links.epoch(0), []
    rig.stage.recorder.observer = events.append
    sequence = answer(rig, LONG)
    fed = [event.feed for event in events if isinstance(event, FedBlock)]
    assert (fed[0].position, sequence.cached) == (8, 8)
    assert 1 < before <= fed[0].epoch


def test_rows_of_a_prompt_answered_with_one_token_stay() -> None:
    rig = engine_of("trees")
    one = Request(tuple(LONG), SamplingParams(max_tokens=1), frozenset(), VOCAB)
    assert [output for _, output in steps(rig, rig.engine.add(one))]
    assert answer(rig, LONG).cached == 8


def test_what_ends_a_text_is_not_told_to_the_last_stage() -> None:
    params = SamplingParams(stop=("end",), stop_token_ids=(3,), seed=5)
    begin = begin_message(
        2, Request((1, 2), params, frozenset({3}), VOCAB), feedback=True, logits=False
    )
    assert (begin.params, begin.stop_ids) == (SamplingParams(seed=5), (3,))
    assert (begin.slot, begin.prompt_length, begin.scores) == (2, 2, UNSCORED)
    assert (begin.want_feedback, begin.want_logits) == (True, False)


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
    assert running.finish_reason == "abort"
    assert rig.engine._held[copied.slot].overlap(copied.request) == 8, "as good as computed"
    assert answer(rig, [3, 3]).slot == copied.slot, "free for the longest"
    assert answer(rig, [3, 4]).slot == first.slot
    rig = engine_of("trees", slots=2)
    running = rig.engine.add(request)
    next(steps(rig, running))
    assert answer(rig, LONG).cached == 8, "of a prompt whose own answer has just begun"


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


def masks(answered: tuple[int, ...]) -> bytes:
    return bytes([(0b01010101, 0b10101110, 0b00111000)[len(answered) % 3]])


@pytest.mark.parametrize("block", [1, 3])
def test_chains_follow_a_grammar(block) -> None:
    rig = impatient(Rig(STAGES, Schedule(block, STAGES)))
    rig.decode([7], SamplingParams(max_tokens=1))
    blocks: list[Block] = []
    send = rig.links.send
    rig.links.send = lambda message: (blocks.append(message), send(message))[1]
    request = Request((1, 2, 3), PARAMS, frozenset(), VOCAB, masks=masks)
    sequence, tokens = rig.engine.add(request), []
    for _, output in steps(rig, sequence):
        tokens += output.tokens if isinstance(output, Emit) else ()
    assert all(masks(tuple(tokens[:i]))[0] >> token & 1 for i, token in enumerate(tokens))
    judged = [block for block in blocks if isinstance(block, Block) and block.judge]
    assert max(each.judge for each in judged) == block
    for each in judged:
        end = each.position + len(each.tokens)
        assert each.masks == tuple(masks((0,) * (p - 2)) for p in range(end - each.judge, end))
    assert rig.engine._slots == {}


@pytest.mark.parametrize("length", range(9))
def test_a_common_beginning_is_found_whole(length) -> None:
    whole = tuple(range(9))
    assert _common_prefix((*whole[:length], 99, 98), whole) == length
    assert _common_prefix(whole, whole[:length]) == length


def test_what_is_drafted_and_with_which_noise() -> None:
    rig = engine_of("chains")
    settings: dict[str, Any] = {"max_context": 96}
    for schedule, drafter, drafting in (
        (Schedule(1, STAGES), OracleDrafter([0], 1.0, VOCAB), True),
        (Schedule(1, STAGES), None, False),
        (Schedule(1, 1), OracleDrafter([0], 1.0, VOCAB), False),
    ):
        rig.stage.drafter = drafter
        Engine(rig.stage, rig.links, schedule, **settings)
        assert rig.stage.drafting == drafting
        assert rig.stage.draft_stream == Stream.TARGET
    engine = Engine(rig.stage, rig.links, schedule, acceptance="rejection", **settings)
    assert rig.stage.draft_stream == Stream.DRAFT
    request = Request((1, 2), PARAMS, frozenset(), VOCAB)
    assert engine._policy(request, 0)._prefill_in_flight == STAGES
    begun: list[Any] = []
    rig.links.send = begun.append
    engine.add(request)
    assert begun[0].want_logits, "to draw from where a draft is rejected"


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_tokens_are_drawn_anew_under_rejection_alone(monkeypatch, acceptance) -> None:
    monkeypatch.setattr("ppsd.engine.engine.redraw", lambda sequence, verdict: (5,))
    rig = impatient(Rig(STAGES, Schedule(1, 1), acceptance=acceptance))
    plain = rig.plain(LONG, PARAMS, frozenset())
    expected = [5] * PARAMS.max_tokens if acceptance == "rejection" else plain
    assert rig.decode(LONG, PARAMS) == expected


def test_chains_ask_no_heads_on_the_way() -> None:
    chains, trees = engine_of("chains"), engine_of("trees")
    for rig in (chains, trees):
        rig.engine.add(Request(tuple(LONG), PARAMS, frozenset(), VOCAB))
        for _ in range(9):
            rig.engine.step()
    assert not any(worker._heard for worker in chains.workers)
    assert all(worker._heard == {0} for worker in trees.workers)
