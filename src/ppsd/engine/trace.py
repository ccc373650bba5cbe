"""Chrome trace files that Perfetto opens: a lane a stage, a slice a pass, arrows along rows.

Slices come from the stages' recorders; what lies between them is written as ``idle``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppsd.errors import PpsdError

MIN_IDLE_NS = 20_000  # shorter gaps are the loop itself, not waiting
ROW_KINDS = ("prefill", "forward", "verify", "cancelled")  # what rows of a block go through
NODE = -1  # no epoch
PROCESS = 1  # Perfetto keeps process and thread 0 for the system's idle task

Event = dict[str, Any]


class Piece(NamedTuple):
    """One slice of a lane; times in nanoseconds (see worker.recorder.Slice).

    ``nodes`` are the (slot, node) of a wave's rows.
    """

    start: int
    end: int
    kind: str
    epoch: int
    position: int
    rows: int
    nodes: tuple[tuple[int, ...], ...] = ()

    @property
    def keys(self) -> list[tuple[int, ...]]:
        """Return what names each row in all lanes: its node or, as epochs only grow, its place."""
        if self.nodes:
            return [(NODE, *node) for node in self.nodes]
        return [(self.epoch, self.position + i) for i in range(self.rows)]


class TraceLog:
    """Collects reports over a session's requests and writes one file."""

    def __init__(self) -> None:
        self._lanes: dict[int, list[Piece]] = {}
        self._pauses: list[tuple[int, int]] = []  # of speculation, nanoseconds
        self._verified: set[tuple[int, ...]] = set()  # nodes

    def add(
        self, reports: list[dict[str, Any]], pauses: Sequence[tuple[float, float]] = ()
    ) -> None:
        """Take the slices of one request's reports, by rank, and its pauses in seconds."""
        self._pauses += [(round(start * 1e9), round(end * 1e9)) for start, end in pauses]
        for rank, report in enumerate(reports):
            lane = self._lanes.setdefault(rank, [])
            for *about, nodes in report.get("slices", []):
                lane.append(Piece(*about)._replace(nodes=tuple(map(tuple, nodes))))
            self._verified |= {(NODE, *node) for node in report.get("verified", [])}

    def take(self) -> list[list[Piece]]:
        """Return the slices so far by rank, in order of time, and forget them."""
        lanes, self._lanes = self._lanes, {}
        self._pauses.clear()
        self._verified.clear()
        return [sorted(lanes[rank]) for rank in sorted(lanes)]

    def write(self, path: Path, bounds: tuple[int, ...]) -> None:
        """Write the Chrome trace-event JSON; times in microseconds since the first slice."""
        pieces = [piece for lane in self._lanes.values() for piece in lane]
        origin = min((piece.start for piece in pieces), default=0)
        end = max((piece.end for piece in pieces), default=0)
        events = [_meta("process_name", 0, {"name": "ppsd"})]
        for rank, lane in sorted(self._lanes.items()):
            title = f"stage {rank}: layers {bounds[rank]}–{bounds[rank + 1] - 1}"
            events.append(_meta("thread_name", rank, {"name": title}))
            events.append(_meta("thread_sort_index", rank, {"sort_index": rank}))
            events += self._lane_events(rank, sorted(lane), origin, end)
        events += self._flows(origin)
        events += self._gate_lane(origin)
        try:
            path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise PpsdError(f"cannot write the trace to {path}: {error.strerror}") from error

    def _gate_lane(self, origin: int) -> Iterator[Event]:
        """Yield a lane below the stages that shows when speculation was paused, if it ever was."""
        if self._pauses:
            rank = len(self._lanes)
            yield _meta("thread_name", rank, {"name": "gate"})
            yield _meta("thread_sort_index", rank, {"sort_index": rank})
        for start, end in self._pauses:
            yield _slice(rank, max(start, origin), end, origin, "speculation paused", {})

    def _flows(self, origin: int) -> Iterator[Event]:
        """Yield arrows from rows that entered stage 0 along the passes that carried them.

        Of a block the first row has one. Rows of waves all have, and dead branches are named.
        """
        carriers = {rank: _by_row(lane) for rank, lane in sorted(self._lanes.items()) if rank}
        number = 0
        for piece in sorted(self._lanes.get(0, [])):
            for key in piece.keys if piece.nodes else piece.keys[:1]:
                later = [(rank, rows[key]) for rank, rows in carriers.items() if key in rows]
                if piece.kind not in ("prefill", "forward") or not later:
                    continue
                number += 1
                is_dead = bool(piece.nodes) and key not in self._verified
                name = "dead branch" if is_dead else "token"
                yield _flow("s", number, 0, piece, origin, name)
                for rank, carrier in later[:-1]:
                    yield _flow("t", number, rank, carrier, origin, name)
                yield _flow("f", number, *later[-1], origin, name)

    def _lane_events(self, rank: int, lane: list[Piece], origin: int, end: int) -> Iterator[Event]:
        before = origin
        for piece in lane:
            yield from _idle(rank, before, piece.start, origin)
            args = {"epoch": piece.epoch, "position": piece.position, "rows": piece.rows}
            if piece.nodes:
                args["lit"] = len(self._verified.intersection(piece.keys))
            yield _slice(rank, piece.start, piece.end, origin, piece.kind, args)
            before = piece.end
        yield from _idle(rank, before, end, origin)


def _by_row(lane: list[Piece]) -> dict[tuple[int, ...], Piece]:
    """Return the slice that worked on each row."""
    return {key: piece for piece in lane if piece.kind in ROW_KINDS for key in piece.keys}


def _idle(rank: int, start: int, end: int, origin: int) -> Iterator[Event]:
    if end - start >= MIN_IDLE_NS:
        yield _slice(rank, start, end, origin, "idle", {})


def _slice(rank: int, start: int, end: int, origin: int, kind: str, args: Event) -> Event:
    event = {"ph": "X", "name": kind, "cat": kind, "dur": (end - start) / 1e3, "args": args}
    return event | _place(rank, start, origin)


def _flow(phase: str, number: int, rank: int, piece: Piece, origin: int, name: str) -> Event:
    """Return an arrow's beginning (s), step (t) or end (f), bound to the slice around it."""
    event = {"ph": phase, "id": number, "name": name, "cat": "flow", "bp": "e"}
    return event | _place(rank, (piece.start + piece.end) // 2, origin)


def _meta(name: str, rank: int, args: Event) -> Event:
    return {"ph": "M", "name": name, "args": args} | _lane(rank)


def _place(rank: int, time_ns: int, origin: int) -> Event:
    return {"ts": (time_ns - origin) / 1e3} | _lane(rank)


def _lane(rank: int) -> Event:
    return {"pid": PROCESS, "tid": rank + 1}
