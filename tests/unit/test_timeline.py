"""The critical path of hand-drawn timelines: every part known, and the whole always adds up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.trace import Piece
from ppsd.lab.oracle import OracleDrafter
from ppsd.lab.timeline import Path, Timeline, block_times
from tests.support.tiny_models import VOCAB

MS = 1_000_000
Spans = list[tuple[float, float, str, int, int]]  # start and end in ms, kind, epoch, position


def lanes(*stages: Spans) -> list[list[Piece]]:
    return [
        [Piece(round(a * MS), round(b * MS), kind, e, p, 1) for a, b, kind, e, p in spans]
        for spans in stages
    ]


def milliseconds(path: Path) -> dict[str, Any]:
    times = {name: round(getattr(path, name) * 1e3, 6) for name in WAITS}
    return {name: time for name, time in times.items() if time} | {
        "work": [round(t * 1e3, 6) for t in path.work],
        "blocks": [round(n, 6) for n in path.blocks],
    }


WAITS = ("drafting", "messages", "handover", "cancel", "other")


def test_plain_decoding_is_stages_and_messages_in_turn() -> None:
    timeline = Timeline(
        lanes(
            [(0, 10, "forward", 1, 5), (32, 42, "forward", 1, 6)],
            [(11, 31, "verify", 1, 5), (43, 63, "verify", 1, 6)],
        ),
        in_flight=1,
    )
    path = timeline.path(31.5 * MS, 64 * MS)
    assert milliseconds(path) == {"work": [10, 20], "blocks": [1, 1], "messages": 0.5 + 1 + 1}
    assert math.isclose(path.total, 0.0325)
    assert timeline.gaps(0).means() == {
        "links": [pytest.approx(0.001), pytest.approx(0.001)],
        "sending": None,
        "drafting": None,
    }


def test_right_drafts_leave_the_slowest_stage_and_its_hand_overs_on_the_path() -> None:
    """Stage 1 takes 20 of 22 ms a token; stage 0 waits for room, which is not on the path."""
    timeline = Timeline(
        lanes(
            [
                (0, 10, "forward", 1, 5),
                (10, 11, "draft", 1, 6),
                (12, 22, "forward", 1, 6),
                (22, 23, "draft", 1, 7),
                (33, 43, "forward", 1, 7),
            ],
            [(11, 31, "verify", 1, 5), (33, 53, "verify", 1, 6), (55, 75, "verify", 1, 7)],
        ),
        in_flight=2,
    )
    path = timeline.path(31 * MS, 76 * MS)
    assert milliseconds(path) == {
        "work": [0, 40],
        "blocks": [0, 2],
        "messages": 1,
        "handover": 2 + 2,
    }
    assert timeline.gaps(0).means()["links"] == [pytest.approx(0.001), pytest.approx(0.002)]


def test_drafting_is_on_the_path_where_stage_0_is_the_slowest() -> None:
    stage_0 = [
        piece
        for i in range(4)
        for piece in (
            (i * 30, i * 30 + 20, "forward", 1, 5 + i),
            (i * 30 + 21, i * 30 + 28, "draft", 1, 6 + i),
        )
    ]
    stage_1 = [(i * 30 + 21, i * 30 + 26, "verify", 1, 5 + i) for i in range(4)]
    timeline = Timeline(lanes(stage_0, stage_1), in_flight=2)
    path = timeline.path(30 * MS, 117 * MS)
    assert milliseconds(path) == {
        "work": [60, 5],
        "blocks": [3, 1],
        "drafting": 14,
        "handover": 2 * 3,
        "messages": 1 + 1,
    }
    gaps = timeline.gaps(0)
    assert gaps.sending == pytest.approx([0.001] * 4)
    assert gaps.drafting == pytest.approx([0.009] * 3)


def test_a_miss_pays_for_the_way_and_for_stale_work_that_must_stop() -> None:
    """The verdict on row 5 (at 31) says that the draft for 6 was wrong: stage 0 stops at 34."""
    timeline = Timeline(
        lanes(
            [
                (0, 10, "forward", 1, 5),
                (10, 11, "draft", 1, 6),
                (12, 22, "forward", 1, 6),
                (22, 23, "draft", 1, 7),
                (30, 34, "cancelled", 1, 7),
                (35, 45, "forward", 2, 6),
            ],
            [(11, 31, "verify", 1, 5), (31, 48, "cancelled", 1, 6), (50, 70, "verify", 2, 6)],
        ),
        in_flight=3,
    )
    path = timeline.path(31 * MS, 71 * MS)
    assert milliseconds(path) == {
        "work": [10, 20],
        "blocks": [1, 1],
        "messages": 1 + 1 + (5 - 3),  # to rank 0 twice, and to stage 1 where 3 of 5 are a cancel
        "cancel": 3 + 3,
    }
    assert math.isclose(path.total, 0.040)
    gaps = timeline.gaps(0).means()["links"]
    assert gaps == [pytest.approx(0.001), None], "a wait for stale work says nothing of a link"


def test_work_that_was_under_way_at_the_first_token_counts_in_part() -> None:
    timeline = Timeline(lanes([(0, 10, "forward", 1, 5)], [(10, 30, "verify", 1, 5)]), in_flight=2)
    path = timeline.path(25 * MS, 30 * MS)
    assert milliseconds(path) == {"work": [0, 5], "blocks": [0, 0.25]}


def test_what_nothing_explains_is_called_other() -> None:
    timeline = Timeline(lanes([], [(20, 30, "verify", 1, 5)]), in_flight=2)
    assert milliseconds(timeline.path(5 * MS, 30 * MS)) == {
        "work": [0, 10],
        "blocks": [0, 1],
        "other": 15,
    }
    empty = Timeline(lanes([], []), in_flight=2).path(5 * MS, 30 * MS)
    assert milliseconds(empty) == {"work": [0, 0], "blocks": [0, 0], "other": 25}


def test_block_times_are_by_rows_and_leave_out_stale_and_early_work() -> None:
    [times] = block_times(
        [
            [
                Piece(0, 90 * MS, "verify", 1, 0, 20),
                Piece(100 * MS, 110 * MS, "verify", 1, 20, 1),
                Piece(120 * MS, 140 * MS, "verify", 1, 21, 1),
                Piece(150 * MS, 170 * MS, "verify", 1, 22, 4),
                Piece(180 * MS, 185 * MS, "cancelled", 1, 26, 1),
            ]
        ],
        95 * MS,
    )
    assert (times[1].count, times[1].mean) == (2, pytest.approx(0.015))
    assert (times[4].count, times[4].mean) == (1, pytest.approx(0.020))
    assert set(times) == {1, 4}


@pytest.mark.parametrize("transport", ["inprocess", "shared-memory"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_the_path_of_a_real_request_adds_up_and_explains_itself(
    tiny_model, transport, alpha
) -> None:
    settings = {"dtype": "float64", "split": (2, 4), "transport": transport, "head": "untrained"}
    settings["gate"] = False  # a pause leaves tokens without drafts
    params, prompt = SamplingParams(max_tokens=12, ignore_eos=True), list(range(3, 23))
    with LLM(str(tiny_model()), trace=True, **settings) as llm:
        llm.use("autoregressive")
        plain = llm.run(prompt, params).token_ids
        llm.draft_with(OracleDrafter([*prompt, *plain], alpha, VOCAB))
        llm.use("ppsd")
        llm.trace.take()
        judged = llm.run(prompt, params).stats.counts.judged
        found = llm.trace.take()
    assert llm.trace.take() == []
    verdicts = sorted(p.end for p in found[-1] if p.kind == "verify")
    first, end = verdicts[0], verdicts[-1]
    path = Timeline(found, 3).path(first, end)
    assert math.isclose(path.total, (end - first) / 1e9, rel_tol=1e-9)
    assert path.other == 0
    assert min(*path.work, *(getattr(path, name) for name in WAITS)) >= 0
    if transport == "inprocess":
        assert judged == 11
    # A miss takes a token through all three stages. Not so a token whose verdict came before its
    # draft, as may be on a busy machine: the draft, which is not judged, is what took longest.
    assert sum(path.blocks) >= (11 + 2 * judged if alpha == 0 else 11)
