"""How likely the model found the tokens it said. Used by llm.py for requests that ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class TokenLogprob(NamedTuple):
    """The model's log-probability of a token, before any sampling setting, and the likeliest ones.

    ``top`` holds (token, log-probability), the most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Logprobs:
    """Keeps the target's logits of a request (Request.logits) until its tokens are final.

    ``first`` is the position of the first new token; only ``vocab_size`` logits are of tokens.
    """

    def __init__(self, first: int, vocab_size: int, top: int) -> None:
        self._next = first
        self._vocab_size = vocab_size
        self._top = min(top, vocab_size)
        self._rows: dict[int, torch.Tensor] = {}

    def __call__(self, position: int, logits: torch.Tensor) -> None:
        """Take the logits of a position; the last ones count."""
        self._rows[position] = logits

    def take(self, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of the next tokens, and let their logits go."""
        return tuple(map(self._of, tokens))

    def _of(self, token: int) -> TokenLogprob:
        row = self._rows.pop(self._next)[: self._vocab_size].cpu().double().log_softmax(0)
        self._next += 1
        likeliest = row.topk(self._top)
        top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return TokenLogprob(token, float(row[token]), tuple(top))
