"""What an answer tells of its making: its tokens, its times, and how drafts fared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ppsd.engine.answer import Completion

MAX_POSITIONS = 64  # of drafts in a row that are told apart
Json = dict[str, Any]


def usage(completions: Sequence[Completion], n: int) -> Json:
    """Return the tokens of all choices; a prompt counts once, however many choices it has."""
    firsts = [completion.stats for completion in completions[::n]]
    counts = [completion.stats.counts for completion in completions]
    prompt = sum(stats.prompt_tokens for stats in firsts)
    new = sum(completion.stats.new_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in firsts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(c.accepted for c in counts),
            "rejected_prediction_tokens": sum(c.judged - c.accepted for c in counts),
        },
    }


@dataclass(frozen=True)
class Speculation:
    """How drafts fared.

    A draft here is one in a row: each token of the target's own begins a row, ``rows`` in all, and
    ``by_position`` counts the rows whose first, second, … draft was right.
    """

    rows: int
    drafted: int
    judged: int
    accepted: int
    by_position: list[int]

    def to_json(self) -> Json:
        """Return the counts in vLLM's names."""
        return {
            "num_drafts": self.rows,
            "num_draft_tokens": self.drafted,
            "num_accepted_tokens": self.accepted,
            "acceptance_rate": self.accepted / self.judged if self.judged else None,
            "num_accepted_tokens_per_pos": self.by_position,
        }


def speculation(completions: Iterable[Completion]) -> Speculation:
    """Return how the drafts of completions fared."""
    rows, by_position = 0, Counter[int]()
    counts = []
    for completion in completions:
        counts.append(completion.stats.counts)
        length = 0
        for accepted in completion.accepted:
            length = length + 1 if accepted else 0
            rows += not accepted
            by_position[length] += accepted
    longest = max((n for n, count in by_position.items() if count), default=0)
    return Speculation(
        rows=rows,
        drafted=sum(c.drafted for c in counts),
        judged=sum(c.judged for c in counts),
        accepted=sum(c.accepted for c in counts),
        by_position=[by_position[i] for i in range(1, min(longest, MAX_POSITIONS) + 1)],
    )


def timings(completion: Completion) -> Json:
    """Return how long an answer took, in llama-server's names."""
    stats = completion.stats
    computed = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": 1e3 * stats.prefill_seconds,
        "prompt_per_second": _rate(computed, stats.prefill_seconds),
        "predicted_n": stats.new_tokens,
        "predicted_ms": 1e3 * stats.decode_seconds,
        "predicted_per_second": _rate(max(0, stats.new_tokens - 1), stats.decode_seconds),
        "draft_n": stats.counts.drafted,
        "draft_n_accepted": stats.counts.accepted,
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
