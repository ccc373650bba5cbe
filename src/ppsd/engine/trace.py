"""Chrome trace files that Perfetto opens: a lane a stage, a slice a block, arrows along a token.

Slices come from the stages' recorders; what lies between them is written as ``idle``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIN_IDLE_NS = 20_000  # shorter gaps are the loop itself, not waiting
FLOW_KINDS = ("forward", "verify", "prefill")


class TraceLog:
    """Collects reports over a session's requests and writes one file."""

    def __init__(self) -> None:
        self._lanes: dict[int, list[list[Any]]] = {}

    def add(self, reports: list[dict[str, Any]]) -> None:
        """Take the slices of one request's reports, by rank."""
        for rank, report in enumerate(reports):
            self._lanes.setdefault(rank, []).extend(list(s) for s in report.get("slices", []))

    def write(self, path: Path, bounds: tuple[int, ...]) -> None:
        """Write the Chrome trace-event JSON; times in microseconds since the first slice."""
        origin = min((s[0] for lane in self._lanes.values() for s in lane), default=0)
        events: list[dict[str, Any]] = []
        for rank, lane in sorted(self._lanes.items()):
            title = f"stage {rank}: layers {bounds[rank]}–{bounds[rank + 1] - 1}"
            events.append(_meta("thread_name", rank, {"name": title}))
            events.append(_meta("thread_sort_index", rank, {"sort_index": rank}))
            events += _lane_events(rank, sorted(lane), origin)
        events += self._flows(origin)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _flows(self, origin: int) -> list[dict[str, Any]]:
        """Arrows through the stages for every block that reached more than one."""
        paths: dict[tuple[int, int], list[tuple[int, list[Any]]]] = {}
        for rank, lane in sorted(self._lanes.items()):
            for piece in lane:
                if piece[2] in FLOW_KINDS:
                    paths.setdefault((piece[3], piece[4]), []).append((rank, piece))
        flows = []
        for number, path in enumerate(p for p in paths.values() if len(p) > 1):
            for step, (rank, piece) in enumerate(path):
                phase = "s" if step == 0 else "f" if step == len(path) - 1 else "t"
                middle = (piece[0] + piece[1]) // 2
                flow = {"ph": phase, "id": number, "name": "token", "cat": "flow", "bp": "e"}
                flows.append(flow | _place(rank, middle, origin))
        return flows


def _place(rank: int, time_ns: int, origin: int) -> dict[str, Any]:
    return {"pid": 0, "tid": rank, "ts": (time_ns - origin) / 1e3}


def _meta(name: str, rank: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": rank, "name": name, "args": args}


def _lane_events(rank: int, lane: list[list[Any]], origin: int) -> list[dict[str, Any]]:
    events = []
    before = None
    for start, end, kind, epoch, position, rows in lane:
        if before is not None and start - before >= MIN_IDLE_NS:
            events.append(_slice(rank, before, start, origin, "idle", {}))
        args = {"position": position, "rows": rows, "epoch": epoch}
        events.append(_slice(rank, start, end, origin, kind, args))
        before = end
    return events


def _slice(
    rank: int, start: int, end: int, origin: int, kind: str, args: dict[str, Any]
) -> dict[str, Any]:
    event = {"ph": "X", "name": kind, "cat": kind, "dur": (end - start) / 1e3, "args": args}
    return event | _place(rank, start, origin)
