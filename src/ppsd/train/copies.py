"""Find what prompt lookup would copy at each position that counts, as at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppsd.speculation.lookup import LENGTHS, LONGEST
from ppsd.train.data import Batch

NONE = -1


@dataclass(frozen=True)
class Copies:
    """For each of a batch's rows [n] the token to copy, NONE without, and ``Match.slot``."""

    tokens: torch.Tensor
    slots: torch.Tensor


def copies_of(batch: Batch) -> Copies:
    """Look up every row's copy in the text up to it, as ``lookup.find`` does for one row.

    Memory: some 32 bytes for each pair of positions of a text.
    """
    tokens = batch.tokens
    agree = _agreement(tokens)
    # Rank the places by length, then by how new they are; place 0 of length 0 is no match.
    places = torch.arange(tokens.shape[1], device=tokens.device)
    best = (agree * len(places) + places[:, None] * (agree > 0)).amax(1).flatten()[batch.rows]
    length, place = best // len(places), best % len(places)
    sequence = batch.rows // len(places)
    following = tokens[sequence, (place + 1).clamp(max=len(places) - 1)]
    bounds = torch.tensor(LENGTHS, device=tokens.device)
    slots = torch.bucketize(length, bounds, right=True) - 1
    return Copies(following.where(length > 0, NONE), slots.clamp(min=0))


def _agreement(tokens: torch.Tensor) -> torch.Tensor:
    """Count tokens that agree up to places i < j of a text, at most LONGEST: [B, i, j] int32.

    Doubling: ends of 2·n tokens agree if those of n do, here and n tokens before.
    """
    size = tokens.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=tokens.device).triu(1)
    agree = ((tokens[:, :, None] == tokens[:, None, :]) & earlier).to(torch.int32)
    span = 1
    while span < LONGEST:
        longer = (agree[:, span:, span:] == span) * agree[:, :-span, :-span]
        agree[:, span:, span:] += longer
        span *= 2
    return agree


def no_copies(batch: Batch) -> Copies:
    """Return copies as if nothing stood twice, for heads that learn alone."""
    nothing = torch.full_like(batch.rows, NONE)
    return Copies(nothing, torch.zeros_like(nothing))
