"""How fast the server's answers grow, and what the newest told of the pipeline."""

from __future__ import annotations

import time
from collections import deque

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.stats import StageStats

RECENT_S = 2.0  # whose tokens make the speed of now
OVER_S = 1.0  # without a token nothing is growing


class Pulse:
    """Sees all that choices bring. ``plain``: tokens/s without speculation, where it was measured.

    ``stages`` are those of the newest request that was alone when it ended; ``paused``: speculation
    was switched off at its end, because it did not pay.
    """

    def __init__(self) -> None:
        self.generated = self.drafted = self.judged = self.accepted = 0
        self.paused = False
        self.plain: float | None = None
        self.stages: tuple[StageStats, ...] = ()
        self._recent: deque[tuple[float, int]] = deque(maxlen=512)

    def see(self, part: Chunk | Completion) -> None:
        """Count a part of a choice."""
        if isinstance(part, Chunk):
            self.generated += len(part.token_ids)
            self._recent.append((time.monotonic(), len(part.token_ids)))
            return
        stats = part.stats
        self.drafted += stats.counts.drafted
        self.judged += stats.counts.judged
        self.accepted += stats.counts.accepted
        self.stages = stats.stages or self.stages
        if stats.gate is not None:
            self.paused = any(paused for _, paused in stats.gate.times[-1:])
            self.plain = 1.0 / stats.gate.plain if stats.gate.plain else self.plain

    @property
    def speed(self) -> float | None:
        """Return tokens per second of all choices now, None while none grows."""
        now = time.monotonic()
        recent = [(at, count) for at, count in self._recent if now - at < RECENT_S]
        if len(recent) < 2 or now - recent[-1][0] > OVER_S:
            return None
        seconds = recent[-1][0] - recent[0][0]
        return sum(count for _, count in recent[1:]) / seconds if seconds > 0 else None
