"""What a stage holds of one request: its tokens, how it samples, and what it was asked for.

``Slot`` is the last stage's; rank 0 holds a ``Sequence`` (engine/sequence.py) instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppsd.speculation.sampling import Sampler
from ppsd.worker.messages import Begin
from ppsd.worker.scores import UNSCORED


class TokenHistory:
    """The tokens fed so far, addressed by position like the key/value cache."""

    def __init__(self, capacity: int) -> None:
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._tokens = torch.from_numpy(self._ids)  # the same memory

    def write(self, position: int, tokens: Sequence[int]) -> None:
        """Put ``tokens`` at ``position``…"""
        self._ids[position : position + len(tokens)] = tokens

    def ids(self, first: int, end: int) -> tuple[int, ...]:
        """Return the tokens at positions from ``first`` to below ``end``."""
        return tuple(self._ids[first:end].tolist())

    def before(self, position: int, first: int = 0) -> torch.Tensor:
        """Return the tokens at positions from ``first`` to below ``position``; a view."""
        return self._tokens[first:position]


def sampler_of(begin: Begin) -> Sampler:
    """Return the sampler of a request, the same on the rank that drafts and the one that judges."""
    stop_ids = frozenset(begin.stop_ids)
    return Sampler(begin.params, begin.prompt_length, stop_ids, begin.vocab_size)


class Slot:
    """One request on the last stage. ``begin`` takes the next one, over the tokens already there.

    The tokens stay: a request may reuse the rows that the one before it left in the cache.
    ``node`` is the newest node that was judged, and ``token`` what the target said after it.
    ``last`` [1, C] is the newest row of a prompt whose tokens are scored.
    """

    def __init__(self, capacity: int) -> None:
        self.history = TokenHistory(capacity)
        self.node = self.token = -1
        self.sampler: Sampler | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.want_logits = self.want_feedback = False
        self.scores, self.prompt_length = UNSCORED, 0
        self.last: torch.Tensor | None = None

    def begin(self, begin: Begin) -> None:
        """Sample as the request ``begin`` says from now on."""
        self.sampler = sampler_of(begin)
        self.stop_ids = frozenset(begin.stop_ids)
        self.want_logits = begin.want_logits
        self.want_feedback = begin.want_feedback
        self.scores, self.prompt_length = begin.scores, begin.prompt_length
        self.last = None

    def ended(self, first: int, tokens: Sequence[int]) -> bool:
        """Tell if one of the target's ``tokens`` at ``first``… is not the one fed, or the last."""
        fed = self.history.ids(first, first + len(tokens))
        return fed != tuple(tokens) or not self.stop_ids.isdisjoint(tokens)
