"""Acceptance by rejection: the target's token drawn so that it equals the draft most often.

Without it, coupled noise alone makes draft and target agree (accept.py).
"""

from __future__ import annotations

import torch

from ppsd.engine.sequence import Sequence
from ppsd.speculation.accept import draw_target
from ppsd.speculation.sampling import Stream, uniform
from ppsd.worker.messages import Verdict


def redraw(sequence: Sequence, verdict: Verdict) -> tuple[int, ...]:
    """Return the target's tokens [judge], drawn anew at positions where a draft waits."""
    assert verdict.logits is not None
    tokens = list(verdict.tokens)
    first = verdict.position + verdict.rows - len(tokens) + 1
    for i, logits in enumerate(verdict.logits):
        draft = sequence.chain.draft_at(first + i)
        if draft is not None:
            tokens[i] = _draw(sequence, first + i, draft, logits)
    return tuple(tokens)


def _draw(sequence: Sequence, position: int, draft: int, logits: torch.Tensor) -> int:
    seed, sampler = sequence.request.params.seed, sequence.sampler
    drawn = sequence.draft.drawn.pop(position, None)
    return draw_target(
        draft,
        _certain(draft, sequence.request.vocab_size) if drawn is None else drawn,
        sampler.probabilities(logits, sequence.history.before(position)),
        uniform(seed, position, Stream.ACCEPT),
        uniform(seed, position, Stream.RESIDUAL),
    )


def _certain(token: int, vocab_size: int) -> torch.Tensor:
    """Return the distribution [V] of a draft that could be no other."""
    row = torch.zeros(vocab_size, dtype=torch.float64)
    row[token] = 1.0
    return row
