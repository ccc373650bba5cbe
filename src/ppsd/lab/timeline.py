"""What the slices of one request say: times of stages and links, and the critical path.

Pure functions of the stages' slices (engine.trace.Piece, nanoseconds of one clock). The critical
path is found backwards from the last token: every piece of work began when the later of two things
had happened, and that one comes before it on the path. So the path has no idle time that is not a
message or a hand-over, and its parts add up to the time between the first and the last token.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ppsd.engine.trace import Piece

Lanes = Sequence[Sequence[Piece]]  # by stage, each in order of time
Place = tuple[int, Piece]  # a stage and a piece of its work

NS = 1e-9


@dataclass(frozen=True)
class BlockTimes:
    """Mean seconds of a stage's finished blocks of equal rows."""

    count: int
    mean: float


@dataclass
class Path:
    """The critical path between two moments; seconds.

    ``work`` and ``blocks`` by stage (parts of a block count as such). ``drafting`` is the exit
    head; ``messages`` are gaps between a stage and the next, or rank 0; ``handover`` gaps between
    two pieces of work on one stage (Python: policy, sending, receiving); ``cancel`` the time in
    which needed work waits for stale work to stop; ``other`` what no slice explains.
    """

    work: list[float]
    blocks: list[float]
    drafting: float = 0.0
    messages: float = 0.0
    handover: float = 0.0
    cancel: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        waits = self.messages + self.handover + self.cancel + self.other
        return sum(self.work) + self.drafting + waits


def block_times(lanes: Lanes, begin: int) -> list[dict[int, BlockTimes]]:
    """Return, by stage and rows, the finished decode blocks that began at ``begin`` or later."""
    return [
        {
            rows: _block_times([p for p in pieces if p.rows == rows])
            for rows in sorted({piece.rows for piece in pieces})
        }
        for pieces in ([p for p in lane if _finished(p) and p.start >= begin] for lane in lanes)
    ]


def _block_times(pieces: Sequence[Piece]) -> BlockTimes:
    return BlockTimes(len(pieces), statistics.fmean(p.end - p.start for p in pieces) * NS)


def _finished(piece: Piece) -> bool:
    return piece.kind in ("forward", "verify")


@dataclass
class Gaps:
    """Seconds between pieces of work: each list holds single gaps.

    ``links[k]``: stage k's end to the next stage's start where that one waited (the last: to stage
    0's next start); ``sending``: forward end to draft start on stage 0; ``drafting``: draft start
    to the next forward's, where nothing else was waited for.
    """

    links: list[list[float]] = field(default_factory=list)
    sending: list[float] = field(default_factory=list)
    drafting: list[float] = field(default_factory=list)

    def means(self) -> dict[str, Any]:
        """Return the mean seconds of each; None where there was no such gap."""
        return {
            "links": [_mean(link) for link in self.links],
            "sending": _mean(self.sending),
            "drafting": _mean(self.drafting),
        }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


class Timeline:
    """The slices of one request with at most ``in_flight`` blocks on the way, at least 2 stages."""

    def __init__(self, lanes: Lanes, in_flight: int) -> None:
        self._lanes = lanes
        self._last = len(lanes) - 1
        self._in_flight = in_flight
        self._done = [{_row(p): p for p in lane if _finished(p)} for lane in lanes]
        self._before: dict[Place, Piece] = {}  # the piece of the same epoch before it on its stage
        for rank, lane in enumerate(lanes):
            newest: dict[int, Piece] = {}
            for piece in lane:
                if piece.kind == "cancelled":
                    continue
                if piece.epoch in newest:
                    self._before[rank, piece] = newest[piece.epoch]
                newest[piece.epoch] = piece

    def path(self, first: int, end: int) -> Path:
        """Return the critical path from ``first`` to the verdict that rank 0 heard at ``end``."""
        path = Path([0.0] * len(self._lanes), [0.0] * len(self._lanes))
        heard = [p for p in self._done[self._last].values() if p.end <= end]
        place = (self._last, max(heard, key=lambda p: p.end)) if heard else None
        self._wait(path, (0, end), place, first)
        while place is not None and place[1].end > first:
            rank, piece = place
            self._work(path, rank, piece, first)
            place = self._cause(rank, piece)
            self._wait(path, (rank, piece.start), place, first, piece.epoch)
        return path

    def _work(self, path: Path, rank: int, piece: Piece, first: int) -> None:
        spent = piece.end - max(first, piece.start)
        if piece.kind == "draft":
            path.drafting += spent * NS
        else:
            path.work[rank] += spent * NS
            path.blocks[rank] += spent / (piece.end - piece.start)

    def _wait(
        self,
        path: Path,
        begun: tuple[int, int],
        place: Place | None,
        first: int,
        epoch: int | None = None,
    ) -> None:
        """Account for the time from ``place`` to the work begun on a stage at a time."""
        rank, start = begun
        since = first if place is None else max(first, place[1].end)
        gap = max(0, start - since) * NS
        if place is None:
            path.other += gap
            return
        stale = self._stale(rank, since, start, epoch) * NS
        path.cancel += stale
        if place[0] == rank:
            path.handover += gap - stale
        else:
            path.messages += gap - stale

    def _stale(self, rank: int, since: int, until: int, epoch: int | None) -> int:
        """Return the nanoseconds a stage spent on work older than ``epoch`` between two moments."""
        if epoch is None:
            return 0
        old = [p for p in self._lanes[rank] if p.epoch < epoch and p.end > since]
        return sum(max(0, min(p.end, until) - max(p.start, since)) for p in old)

    def _cause(self, rank: int, piece: Piece) -> Place | None:
        """Return what ended last of all that ``piece`` had to wait for."""
        places = [p for p in self._needed(rank, piece) if p[1].end <= piece.start]
        return max(places, key=lambda place: place[1].end, default=None)

    def _needed(self, rank: int, piece: Piece) -> Iterator[Place]:
        if (before := self._before.get((rank, piece))) is not None:
            yield rank, before
        epoch, row = _row(piece)
        if rank > 0:
            if (sent := self._done[rank - 1].get((epoch, row))) is not None:
                yield rank - 1, sent
        elif piece.kind == "forward":
            yield from ((self._last, verdict) for verdict in self._verdicts(epoch, row))

    def _verdicts(self, epoch: int, row: int) -> Iterator[Piece]:
        """Return the verdicts that stage 0's ``row`` may wait for: for room, or for its token."""
        judged = self._done[self._last]
        if (room := judged.get((epoch, row - self._in_flight))) is not None:
            yield room
        known = [p for (e, r), p in judged.items() if p.position < row <= r + 1 and e <= epoch]
        if known:
            yield max(known, key=lambda p: p.epoch)

    def gaps(self, begin: int) -> Gaps:
        """Return the gaps around work that began at ``begin`` or later."""
        gaps = Gaps([[] for _ in self._lanes])
        for rank, lane in enumerate(self._lanes):
            for piece in (p for p in lane if p.kind in ("forward", "verify", "draft")):
                cause = self._cause(rank, piece) if piece.start >= begin else None
                if cause is not None:
                    self._gap(gaps, rank, piece, cause)
        return gaps

    def _gap(self, gaps: Gaps, rank: int, piece: Piece, cause: Place) -> None:
        source, before = cause
        gap = (piece.start - before.end) * NS
        if source != rank:
            if not self._stale(rank, before.end, piece.start, piece.epoch):
                gaps.links[source].append(gap)
        elif piece.kind == "draft":
            gaps.sending.append(gap)
        elif before.kind == "draft":
            gaps.drafting.append((piece.start - before.start) * NS)


def _row(piece: Piece) -> tuple[int, int]:
    """Return epoch and position of a piece's last row; a draft's is the row it was made from."""
    rows = 0 if piece.kind == "draft" else piece.rows
    return piece.epoch, piece.position + rows - 1
