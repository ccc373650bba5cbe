"""What a stage did and when: busy time always, slices for the trace when asked.

Times are nanoseconds of the monotonic clock, which all processes of one host share.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppsd.speculation.waves import Row

LOG = logging.getLogger(__name__)

MAX_SLICES = 200_000  # bounds a trace's memory; the oldest slices are dropped first
OVERRUN = "overrun"  # counts blocks of a paced stage that took longer than its pace

Slice = tuple[int, int, str, int, int, int]  # start, end, kind, epoch, position, rows


class Recorder:
    """Adds up busy time by kind: ``prefill``, ``forward``, ``draft``, ``verify``, ``cancelled``.

    ``now`` is the clock of the rank, which the simulator replaces by a virtual one. ``observer``,
    if there is one, is told of each slice as it ends; on rank 0 the engine tells it more.
    ``slices`` end with the (slot, node) of each of a wave's rows; ``verified`` are those that the
    target confirmed. ``total_ns``, and the decoding passes and their rows, never start anew.
    """

    def __init__(self, trace: bool = False, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.now = now
        self.observer: Callable[[Any], object] | None = None
        self.busy_ns: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.total_ns = self.passes = self.rows = 0
        self.verified: list[tuple[int, int]] = []
        self.slices: deque[tuple[Any, ...]] | None = deque(maxlen=MAX_SLICES) if trace else None

    def add(
        self,
        start: int,
        kind: str,
        epoch: int,
        position: int,
        rows: int,
        wave: Sequence[Row] = (),
        *,
        joined: bool = False,
    ) -> None:
        """Record work on ``rows`` rows at ``position``…, or of a ``wave``, from ``start`` on.

        The time of a pass that is ``joined`` to another's is counted with that one.
        """
        end = self.now()
        busy = 0 if joined else end - start
        self.busy_ns[kind] += busy
        self.blocks[kind] += 1
        self.total_ns += busy
        if self.slices is not None:
            nodes = [(row.slot, row.node) for row in wave]
            self.slices.append((start, end, kind, epoch, position, rows, nodes))
        if self.observer is not None:
            self.tell((start, end, kind, epoch, position, rows))

    def tell(self, event: object) -> None:
        """Let the observer, if there is one, see an event; one that raises sees nothing more."""
        if (observer := self.observer) is None:  # another thread may have taken it away just now
            return
        try:
            observer(event)
        except Exception:  # its own fault, which no request is to suffer for
            LOG.exception("an observer failed and sees nothing more")
            if self.observer is observer:
                self.observer = None

    def verify(self, slot: int, nodes: Sequence[int]) -> None:
        """Note rows that the target confirmed, for the trace."""
        if self.slices is not None:
            self.verified += [(slot, node) for node in nodes]

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
        verified, self.verified = self.verified, []
        return taken | {"slices": slices, "verified": verified}
