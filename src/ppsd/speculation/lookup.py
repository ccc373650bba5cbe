"""Prompt lookup: text repeats itself, so what followed these tokens before may follow again.

The idea of prompt lookup decoding (Saxena 2023), here one token at a time and as a second opinion
on an exit head's draft. Pure functions; used by engine/ and bench/.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# How often a copied token is right, by how many tokens agree before it (1, 2, …; the last for all
# longer): in 500 answers that SmolLM2-135M-Instruct wrote to training prompts, 71,755 tokens.
CONFIDENCE = (0.27, 0.57, 0.61, 0.67, 0.71, 0.75, 0.76, 0.90)


class Match(NamedTuple):
    """The token that came next where the last ``length`` tokens stood before."""

    token: int
    length: int


def find(history: Tensor, longest: int = len(CONFIDENCE)) -> Match | None:
    """The longest repetition of the end of ``history`` (int64 [L]), the newest among equals.

    None when the last token is new. Lengths above ``longest`` are not told apart.
    """
    tokens = history.numpy()
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:-1] == tokens[last]) if last > 0 else np.empty(0, np.int64)
    length = 0
    while len(ends) > 0:
        length += 1
        newest = int(ends[-1])
        if length == longest:
            break
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[last - length]]
    return Match(int(tokens[newest + 1]), length) if length else None


def mixed(logits: Tensor, history: Tensor) -> Tensor:
    """``logits`` [V] of a draft, with a share of the probability given to the copied token.

    The mixture is (softmax(logits) + c·[copied]) / (1 + c), with c its CONFIDENCE; so the most
    likely token is the copy unless the head is surer of another than copies are right. A token
    without a logit of its own (-inf) can be copied too. ``logits`` are changed.
    """
    match = find(history)
    if match is None:
        return logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # logsumexp, which alone would take five times as long where most are -inf
    total = wide.amax() - wide.log_softmax(0).amax()
    copied = total + math.log(CONFIDENCE[match.length - 1])
    logits[match.token] = wide[match.token].logaddexp(copied)
    return logits
