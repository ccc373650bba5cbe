"""How likely the model found the tokens it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ppsd.worker.scores import Scores


class TokenLogprob(NamedTuple):
    """The model's log-probability of a token, before any sampling setting, and the likeliest ones.

    ``top`` holds (token, log-probability), the most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Logprobs:
    """Keeps the target's logits of a request (Request.logits) until its tokens are final.

    New tokens follow ``prompt``, whose own come as ``scores``; only ``vocab_size`` logits are of
    tokens.
    """

    def __init__(self, prompt: Sequence[int], vocab_size: int, top: int) -> None:
        self._prompt = prompt
        self._of_prompt: list[TokenLogprob] = []
        self._next = len(prompt)
        self._vocab_size = vocab_size
        self._top = min(top, vocab_size)
        self._rows: dict[int, torch.Tensor] = {}

    def __call__(self, position: int, logits: torch.Tensor) -> None:
        """Take the logits of a position; the last ones count."""
        self._rows[position] = logits

    def hear(self, scores: Scores) -> None:
        """Take what the last stage says of a piece of the prompt (Request.scores)."""
        ids = self._prompt[scores.position :]
        for token, top, (own, *rest) in zip(
            ids, scores.tokens, scores.numbers.tolist(), strict=False
        ):
            self._of_prompt.append(TokenLogprob(token, own, tuple(zip(top, rest, strict=True))))

    def take_prompt(self) -> tuple[TokenLogprob, ...]:
        """Return those of the prompt's tokens but the first, and let them go."""
        taken, self._of_prompt = tuple(self._of_prompt), []
        return taken

    def take(self, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of the next tokens, and let their logits go."""
        return tuple(map(self._of, tokens))

    def _of(self, token: int) -> TokenLogprob:
        row = self._rows.pop(self._next)[: self._vocab_size].cpu().double().log_softmax(0)
        self._next += 1
        likeliest = row.topk(self._top)
        top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return TokenLogprob(token, float(row[token]), tuple(top))
