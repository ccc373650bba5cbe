"""What a stage did and when: busy time always, slices for the trace when asked. Used by all ranks.

Times are nanoseconds of the monotonic clock, which all processes of one host share.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

MAX_SLICES = 200_000  # bounds a trace's memory; the oldest slices are dropped first
OVERRUN = "overrun"  # counts blocks of a paced stage that took longer than its pace

Slice = tuple[int, int, str, int, int, int]  # start, end, kind, epoch, position, rows


class Recorder:
    """Adds up busy time by kind: ``prefill``, ``forward``, ``draft``, ``verify``, ``cancelled``.

    ``now`` is the clock of the rank, which the simulator replaces by a virtual one. ``observer``,
    if there is one, is called with each slice as it ends; on rank 0 the engine tells it more.
    ``total_ns``, and the decoding passes and their rows, are counts that never start anew.
    """

    def __init__(self, trace: bool = False, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.now = now
        self.observer: Callable[[Any], object] | None = None
        self.busy_ns: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.total_ns = self.passes = self.rows = 0
        self.slices: deque[Slice] | None = deque(maxlen=MAX_SLICES) if trace else None

    def add(self, start: int, kind: str, epoch: int, position: int, rows: int) -> None:
        """Record work on ``rows`` rows at ``position`` from ``start`` until now."""
        end = self.now()
        self.busy_ns[kind] += end - start
        self.blocks[kind] += 1
        self.total_ns += end - start
        if self.slices is not None:
            self.slices.append((start, end, kind, epoch, position, rows))
        if self.observer is not None:
            self.observer((start, end, kind, epoch, position, rows))

    def count(self, rows: int) -> None:
        """Count a decoding pass and its rows."""
        self.passes += 1
        self.rows += rows

    def take(self) -> dict[str, Any]:
        """Return everything since the last ``take``, JSON-ready, and start anew."""
        taken = {"busy_ns": dict(self.busy_ns), "blocks": dict(self.blocks)}
        self.busy_ns.clear()
        self.blocks.clear()
        if self.slices is None:
            return taken
        slices, self.slices = list(self.slices), deque(maxlen=MAX_SLICES)
        return taken | {"slices": slices}
