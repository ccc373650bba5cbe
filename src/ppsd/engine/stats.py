"""What a request cost and how its drafts fared; JSON-ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ppsd.speculation.gate import Switches
from ppsd.speculation.policy import Counts
from ppsd.worker.recorder import OVERRUN


@dataclass(frozen=True)
class StageStats:
    """One stage during one request; times in seconds, ``busy_share`` of the whole request."""

    layers: tuple[int, int]
    busy_seconds: float
    busy_share: float
    blocks: dict[str, int]


@dataclass(frozen=True)
class Totals:
    """What a pipeline did since it was loaded, as far as its stages have told.

    ``seconds``: how long requests were under way. ``passes``, and their ``rows``, are those of
    stage 0 that decode. ``cache_used``: the share of all positions that hold requests at work.
    """

    seconds: float
    busy_seconds: tuple[float, ...]
    passes: int
    rows: int
    cache_used: float


@dataclass(frozen=True)
class RequestStats:
    """Counts and times of one request; ``prefill_seconds`` end with the first token.

    ``cached_tokens`` of the prompt were not computed again: their rows were still there.
    ``gate`` says when speculation was paused; None without a gate or without speculation.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    counts: Counts
    prefill_seconds: float
    decode_seconds: float
    stages: tuple[StageStats, ...]
    gate: Switches | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Return decoding speed: tokens after the first over the time after the first, or None."""
        decoded = self.new_tokens - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds > 0 else None

    @property
    def speedup_bounds(self) -> tuple[float, float] | None:
        """Return the least and most speedup over plain decoding on the same workers.

        By what the gate saw: equal where it measured plain decoding; None where it saw nothing, or
        is off.
        """
        bounds = None if self.gate is None else self.gate.plain_bounds
        speed = self.tokens_per_second
        return None if bounds is None or speed is None else (bounds[0] * speed, bounds[1] * speed)

    @property
    def decode_blocks(self) -> int:
        """Count the blocks with verdicts that all stages finished, stale ones included."""
        done = ("forward", "verify")
        return sum(stage.blocks.get(kind, 0) for stage in self.stages for kind in done)

    @property
    def overruns(self) -> int:
        """Count the blocks whose real work outlasted the pace; their times are not the pace's."""
        return sum(stage.blocks.get(OVERRUN, 0) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that ``ppsd generate --json`` prints about a request."""
        counts, gate = self.counts, self.gate
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "counts": {name: n for name, n in asdict(counts).items() if name != "drafted"},
            "acceptance_rate": counts.acceptance_rate,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
            "stage_busy_share": [stage.busy_share for stage in self.stages],
            "overruns": self.overruns,
            "gate": gate and {"pauses": gate.pauses, "paused_tokens": gate.paused_tokens},
            "speedup_bounds": self.speedup_bounds,
        }


def stage_stats(
    reports: list[dict[str, Any]], bounds: tuple[int, ...], seconds: float
) -> tuple[StageStats, ...]:
    """Turn the stages' reports (Recorder.take) of a request that took ``seconds`` into stats."""
    stats = []
    for rank, report in enumerate(reports):
        busy = sum(report["busy_ns"].values()) / 1e9
        share = busy / seconds if seconds > 0 else 0.0
        stats.append(StageStats((bounds[rank], bounds[rank + 1]), busy, share, report["blocks"]))
    return tuple(stats)
