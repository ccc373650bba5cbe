"""Traces: lanes without overlap or holes, and arrows that pair up and follow one row."""

from __future__ import annotations

import json
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.trace import MIN_IDLE_NS, TraceLog
from ppsd.errors import PpsdError
from ppsd.worker.recorder import Recorder
from tests.support.passes import ChangedPass
from tests.support.tiny_models import save_perfect_head

MS = 1_000_000
Event = dict[str, Any]


def write(tmp_path: Path, *requests: list[list[tuple]], bounds=(0, 2, 4)) -> list[Event]:
    log = TraceLog()
    for lanes in requests:
        log.add([{"slices": [[*piece, []] for piece in lane]} for lane in lanes])
    return read(log_to(log, tmp_path / "trace.json", bounds))


def log_to(log: TraceLog, path: Path, bounds: tuple[int, ...]) -> Path:
    log.write(path, bounds)
    return path


def read(path: Path) -> list[Event]:
    record = json.loads(path.read_text())
    assert record["displayTimeUnit"] == "ms"
    return record["traceEvents"]


def nanoseconds(event: Event) -> tuple[int, int]:
    return round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)


def lanes(events: list[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["pid"] == 1
            found.setdefault(event["tid"], []).append(event)
    return {tid: sorted(lane, key=lambda e: e["ts"]) for tid, lane in found.items()}


def arrows(events: list[Event]) -> list[list[Event]]:
    """The flow events by id, in file order, checked to be one arrow each."""
    found: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] in "stf":
            found.setdefault(event["id"], []).append(event)
    for path in found.values():
        assert "".join(event["ph"] for event in path) == "s" + "t" * (len(path) - 2) + "f"
        assert [event["tid"] for event in path] == sorted({event["tid"] for event in path})
    return list(found.values())


def slice_under(event: Event, events: list[Event]) -> Event:
    """The slice an arrow's end binds to: the one around it on its lane."""
    at = round(event["ts"] * 1e3)
    [found] = [
        piece
        for piece in lanes(events)[event["tid"]]
        if nanoseconds(piece)[0] <= at < nanoseconds(piece)[1]
    ]
    return found


def check(events: list[Event], stages: int) -> None:
    """Everything that holds in any trace."""
    found = lanes(events)
    paused = found.pop(stages + 1, [])  # the gate's lane
    assert {piece["name"] for piece in paused} <= {"speculation paused"}
    assert sorted(found) == list(range(1, stages + 1))
    ends = {nanoseconds(lane[-1])[1] for lane in found.values()}
    for lane in found.values():
        assert nanoseconds(lane[0])[0] < MIN_IDLE_NS
        assert max(ends) - nanoseconds(lane[-1])[1] < MIN_IDLE_NS
        for one, two in pairwise(lane):
            assert 0 <= nanoseconds(two)[0] - nanoseconds(one)[1] < MIN_IDLE_NS
            assert (one["name"], two["name"]) != ("idle", "idle")
    for path in arrows(events):
        pieces = [slice_under(event, events) for event in path]
        first = pieces[0]["args"]
        assert pieces[0]["name"] in ("prefill", "forward")
        for piece in pieces:
            args = piece["args"]
            assert args["epoch"] == first["epoch"]
            assert 0 <= first["position"] - args["position"] < args["rows"]


def summary(lane: list[Event]) -> list[tuple[str, float, float]]:
    return [(event["name"], event["ts"] / 1e3, event["dur"] / 1e3) for event in lane]


def test_what_lies_between_slices_is_idle(tmp_path) -> None:
    start = 7 * MS
    first = [
        (start, start + MS, "forward", 1, 4, 1),
        (start + 3 * MS, start + 4 * MS, "draft", 1, 5, 1),
    ]
    second = [(start + MS, start + 2 * MS, "verify", 1, 4, 1)]
    events = write(tmp_path, [first, second])
    check(events, 2)
    found = lanes(events)
    assert summary(found[1]) == [("forward", 0, 1), ("idle", 1, 2), ("draft", 3, 1)]
    assert summary(found[2]) == [("idle", 0, 1), ("verify", 1, 1), ("idle", 2, 2)]
    assert found[1][0]["args"] == {"epoch": 1, "position": 4, "rows": 1}


def test_pauses_of_speculation_have_a_lane_below_the_stages(tmp_path) -> None:
    log = TraceLog()
    stages = [{"slices": [(5 * MS, 9 * MS, "forward", 1, 4, 1, ())]}]
    log.add(stages, pauses=[(0.004, 0.006), (0.008, 0.009)])
    events = read(log_to(log, tmp_path / "trace.json", (0, 2)))
    check(events, 1)
    assert summary(lanes(events)[2]) == [("speculation paused", 0, 1), ("speculation paused", 3, 1)]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[2] == "gate"


def test_lanes_are_named_after_their_layers(tmp_path) -> None:
    events = write(tmp_path, [[(0, MS, "forward", 1, 0, 1)], [(MS, 2 * MS, "verify", 1, 0, 1)]])
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {1: "stage 0: layers 0–1", 2: "stage 1: layers 2–3"}


def test_every_row_of_a_block_has_its_arrow_also_into_cancelled_work(tmp_path) -> None:
    rows = [(i * MS, (i + 1) * MS, "forward", 1, 10 + i, 1) for i in range(3)]
    block = [(4 * MS, 5 * MS, "cancelled", 1, 10, 3)]
    events = write(tmp_path, [rows, block])
    check(events, 2)
    assert [slice_under(path[0], events)["args"]["position"] for path in arrows(events)] == [
        10,
        11,
        12,
    ]
    assert {slice_under(path[-1], events)["name"] for path in arrows(events)} == {"cancelled"}


def test_requests_at_the_same_positions_do_not_share_arrows(tmp_path) -> None:
    def request(start: int, epoch: int) -> list[list[tuple]]:
        return [
            [(start, start + MS, "forward", epoch, 4, 1)],
            [(start + MS, start + 2 * MS, "verify", epoch, 4, 1)],
            [(start + 2 * MS, start + 3 * MS, "verify", epoch, 4, 1)],
        ]

    events = write(tmp_path, request(0, 1), request(5 * MS, 2), bounds=(0, 1, 2, 3))
    check(events, 3)
    assert [[e["ts"] / 1e3 for e in path] for path in arrows(events)] == [
        [0.5, 1.5, 2.5],
        [5.5, 6.5, 7.5],
    ]


def test_branches_of_a_tree_are_lit_or_dead(tmp_path) -> None:
    """Node 5 is verified, its sibling 6 dies before the last stage, and 7 in it."""
    nodes = [[0, 5], [0, 6], [0, 7]]
    lanes_ = [
        [(0, MS, "forward", 4, 9, 3, nodes)],
        [(MS, 2 * MS, "verify", 4, 9, 3, nodes)],
        [(2 * MS, 3 * MS, "verify", 4, 9, 2, nodes[::2])],
    ]
    log = TraceLog()
    log.add([{"slices": lane} for lane in lanes_[:1]])
    log.add([{"verified": [[0, 5]]}, *({"slices": lane} for lane in lanes_[1:])])
    events = read(log_to(log, tmp_path / "trace.json", (0, 1, 2, 3)))
    assert [(path[0]["name"], len(path)) for path in arrows(events)] == [
        ("token", 3),
        ("dead branch", 2),
        ("dead branch", 3),
    ]
    working = [e for lane in lanes(events).values() for e in lane if e["name"] != "idle"]
    assert [(e["args"]["rows"], e["args"]["lit"]) for e in working] == [(3, 1), (3, 1), (2, 1)]


def test_a_real_trace_of_a_tree(tiny_model, tmp_path) -> None:
    """Every token after the first is a lit row; the untrained head's branches die."""
    settings = {"dtype": "float64", "transport": "inprocess", "split": (2, 4), "plan": "off"}
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with LLM(
        str(tiny_model()), trace=True, head="untrained", mode="ppsd", rows=6, gate=False, **settings
    ) as llm:
        tokens = llm.run(list(range(3, 23)), params).token_ids
        llm.write_trace(tmp_path / "trace.json")
    events = read(tmp_path / "trace.json")
    names = [path[0]["name"] for path in arrows(events)]
    fed = [e for e in lanes(events)[1] if e["name"] in ("prefill", "forward")]
    chunks = sum("lit" not in e["args"] for e in fed)
    assert names.count("token") == chunks + len(tokens) - 1
    assert names.count("dead branch") > len(tokens)
    last = [e["args"] for e in lanes(events)[3] if "lit" in e["args"]]
    assert sum(args["lit"] for args in last) == len(tokens) - 1


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(
        PpsdError, match=r"cannot write the trace to .*missing/t\.json: No such file"
    ):
        TraceLog().write(tmp_path / "missing" / "t.json", (0, 1))


@pytest.mark.parametrize("block", [1, 3])
def test_a_real_trace_of_wrong_drafts(tiny_model, tmp_path, block) -> None:
    """Two requests and a change of mode in one trace; the head is nearly always wrong."""
    model = tiny_model()
    head = save_perfect_head(tmp_path / "head", model, 2, sign=-1.0)
    settings = {"dtype": "float64", "transport": "inprocess", "split": (2, 4), "head": str(head)}
    gate = block > 1
    with LLM(str(model), trace=True, block=block, prefill_chunk=8, gate=gate, **settings) as llm:
        let_workers_move_while_stage_0_computes(llm)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        results = [llm.run(list(range(3, 23)), params)]
        left_early = llm.stream(list(range(3, 23)), params)
        next(left_early)
        left_early.close()
        llm.use("autoregressive")
        results.append(llm.run(list(range(3, 23)), params))
        llm.write_trace(tmp_path / "trace.json")
    events = read(tmp_path / "trace.json")
    check(events, 3)
    found = lanes(events)
    assert (4 in found) == (block > 1), "a gate measures plain decoding before it runs rounds"
    seen = [piece for lane in found.values() for piece in lane]
    assert {"prefill", "forward", "draft", "verify", "cancelled"} <= {p["name"] for p in seen}
    fed = [
        (piece["args"]["epoch"], piece["args"]["position"])
        for piece in lanes(events)[1]
        if piece["name"] in ("prefill", "forward")
    ]
    assert len(set(fed)) == len(fed), "two rows with one name would share arrows"
    verified = [p for p in lanes(events)[3] if p["name"] == "verify"]
    judged = sum(piece["args"]["rows"] for piece in verified)
    assert judged >= sum(len(result.token_ids) for result in results)


def let_workers_move_while_stage_0_computes(llm: LLM) -> None:
    """Without it an in-process pipeline never learns of a wrong draft in the middle of work."""
    stage, hub = llm._running.stage._model, llm._running.links._endpoint._hub
    start = stage.start

    def move() -> None:
        while hub.on_idle():
            pass

    def starting(inputs, position, slot=0):
        return ChangedPass(start(inputs, position, slot), between=move)

    stage.start = starting


def test_a_recorder_adds_up_what_ends_and_starts_anew_when_taken() -> None:
    clock = iter([105, 117, 130])
    recorder = Recorder(now=lambda: next(clock))
    recorder.add(100, "verify", 1, 0, 1)
    recorder.add(110, "verify", 1, 1, 1)
    recorder.add(120, "draft", 1, 2, 1)
    assert recorder.take() == {
        "busy_ns": {"verify": 12, "draft": 10},
        "blocks": {"verify": 2, "draft": 1},
    }
    assert recorder.take() == {"busy_ns": {}, "blocks": {}}
    assert recorder.total_ns == 22


def test_a_recorder_keeps_the_newest_slices_and_tells_each_to_whoever_looks_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ppsd.worker.recorder.MAX_SLICES", 2)
    clock = count(105, 10)
    recorder, seen = Recorder(trace=True, now=lambda: next(clock)), []
    recorder.observer = seen.append
    for first in (0, 3):
        for position in range(first, first + 3):
            recorder.add(100 + 10 * position, "verify", 1, position, 1)
        kept = [(*slice_, []) for slice_ in seen[first + 1 :]]
        assert recorder.take()["slices"] == kept
    assert seen == [(100 + 10 * p, 105 + 10 * p, "verify", 1, p, 1) for p in range(6)]


def test_the_time_of_a_joined_pass_counts_once_and_each_pass_with_its_rows() -> None:
    clock = count(105, 10)
    recorder = Recorder(now=lambda: next(clock))
    recorder.add(100, "verify", 1, 0, 1, joined=True)
    recorder.add(100, "verify", 1, 0, 1)
    assert (recorder.total_ns, recorder.take()["busy_ns"]) == (15, {"verify": 15})
    recorder.count(3)
    recorder.count(2)
    assert (recorder.passes, recorder.rows) == (2, 5)
