"""Prompt lookup: text repeats itself, so what followed these tokens before may follow again.

The idea of prompt lookup decoding (Saxena 2023), here one token at a time and as a second opinion
on an exit head's draft. Pure functions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppsd.errors import NonFiniteError

# Repetitions are told apart by how many tokens agree: so many, but fewer than the next. Trained
# copy gates have a row for each, so this is part of their format.
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
LONGEST = LENGTHS[-1]
# How often the copied token is right, by length: in 537 answers that SmolLM2-135M-Instruct wrote to
# training prompts, 74,501 tokens.
CONFIDENCE = (0.22, 0.55, 0.63, 0.69, 0.75, 0.77, 0.80, 0.84, 0.89, 0.92, 0.95, 0.99)
ODDS = torch.tensor(CONFIDENCE).log()
WORD = 8  # bytes of a token id

Array = np.ndarray[Any, Any]


class Match(NamedTuple):
    """The token that came next where the last ``length`` tokens stood before."""

    token: int
    length: int

    @property
    def slot(self) -> int:
        """Return the index of the length in LENGTHS."""
        return bisect_right(LENGTHS, self.length) - 1


def find(history: Tensor, longest: int = LONGEST) -> Match | None:
    """Return the longest repetition of the end of ``history`` (int64 [L]), the newest among equals.

    None when the last token is new. Lengths above ``longest`` are not told apart.
    """
    tokens = history.numpy()
    text = tokens.tobytes()  # searched as bytes: C, and hardly any Python
    size = len(text)

    def before(length: int) -> int:
        """Return the newest place where the last ``length`` tokens stood before, or -1."""
        end, wanted = size - WORD, text[size - WORD * length :]
        while (at := text.rfind(wanted, 0, end)) >= 0 and at % WORD:
            end = at + len(wanted) - 1
        return at

    length, place = 0, -1
    beyond = min(longest, size // WORD - 1) + 1
    while beyond - length > 1:  # what repeats a longer end repeats a shorter one
        middle = (length + beyond) // 2 if length else 1
        if (at := before(middle)) < 0:
            beyond = middle
        else:
            length, place = middle, at
    after = place // WORD + length
    return Match(int(tokens[after]), length) if length else None


def mixed(logits: Tensor, match: Match, odds: Tensor = ODDS) -> Tensor:
    """Give the copied token a share of the probability in a draft's ``logits`` [V].

    The mixture is (softmax(logits) + c·[copied]) / (1 + c). ``odds`` holds log c by LENGTHS; by
    default c is the CONFIDENCE, so the most likely token is the copy unless the head is surer of
    another than copies are right. A token without a logit of its own (-inf) can be copied too.
    In float32 or wider; ``logits`` of such types are changed.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # logsumexp, which alone would take five times as long where most are -inf
    total = wide.amax() - wide.log_softmax(0).amax()
    copied = total + odds[match.slot].to(wide.dtype)
    wide[match.token] = wide[match.token].logaddexp(copied)
    return wide


def likeliest(scores: Array, ids: Array, match: Match | None, odds: Tensor = ODDS) -> int:
    """Return the token that ``mixed`` logits have their maximum at, the lowest among equals.

    ``scores`` [n] are the logits of the tokens ``ids`` [n], which ascend; all others are -inf.
    ``odds``: see ``mixed``. Without rows as long as the vocabulary, in little code: it
    runs between two passes over a stage's weights, and has left the caches by then. Raises
    NonFiniteError like Sampler.
    """
    best = int(scores.argmax())
    top, token = scores[best], int(ids[best])
    if not math.isfinite(top):  # NaN and +inf win
        raise NonFiniteError(f"draft logits must have a finite maximum, got {top}")
    if match is None or token == match.token:  # a copy adds to its own token only
        return token
    copied = top + np.log(np.exp(scores - top).sum()) + float(odds[match.slot])
    at = int(ids.searchsorted(match.token))
    if at < len(ids) and ids[at] == match.token:
        copied = np.logaddexp(scores[at], copied)
    ahead = (copied, -match.token) > (top, -token)
    return match.token if ahead else token
