"""Choose the last layer's rows that a head reads in training, as far behind as at run time.

Text is taken as decoded by PPSD: the draft after position p can rest on the verdicts of all
positions up to p - w, with w blocks in flight, and of those before the newest token that a verdict
had to correct (speculation/policy.py, ``Feed.verified``). So is a prompt that is to be guessed:
without verified rows it teaches a head what decoding has no use for.
"""

from __future__ import annotations

import torch

from ppsd.speculation.policy import UNVERIFIED
from ppsd.train.data import Batch

IN_FLIGHT = (2, 3, 4, 6, 8, 12)  # each example is decoded with one of these
MISSES = 0.45  # share of drafts that are wrong


def newest_verified(corrected: torch.Tensor, start: int, in_flight: int) -> torch.Tensor:
    """Return the newest position whose verdict a draft after each of L positions can rest on.

    ``corrected`` [L] (bool): tokens that replaced a draft. No verdict comes before the one of
    position ``start`` - 1; UNVERIFIED where that is still on its way.
    """
    positions = torch.arange(len(corrected))
    restarts = torch.where(corrected, positions, 0).cummax(0).values
    newest = torch.maximum(restarts - 1, positions - in_flight)
    return torch.where(newest >= start - 1, newest, UNVERIFIED)


def sample_verified(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Draw the flattened row of the newest verified position, or UNVERIFIED, per batch row."""
    length = batch.tokens.shape[1]
    found = []
    for i, example in enumerate(batch.examples):
        count = len(example.tokens)
        choice = int(torch.randint(len(IN_FLIGHT), (1,), generator=generator))
        corrected = torch.rand(count, generator=generator) < MISSES
        corrected[: example.start] = False
        newest = newest_verified(corrected, example.start, IN_FLIGHT[choice])
        newest = newest[example.start - 1 : -1]
        found.append(torch.where(newest == UNVERIFIED, UNVERIFIED, newest + i * length))
    return torch.cat(found).to(batch.rows.device)


def take_verified(last: torch.Tensor, verified: torch.Tensor) -> torch.Tensor:
    """Take the rows of ``last`` [B·T, C] that ``verified`` [n] names; zeros for UNVERIFIED."""
    return last[verified.clamp(min=0)] * (verified > UNVERIFIED)[:, None]
