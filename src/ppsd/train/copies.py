"""What prompt lookup would copy at each position that counts: run time, repeated in training.

Within train/ only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppsd.speculation.lookup import find_all
from ppsd.train.data import Batch

NONE = -1


@dataclass(frozen=True)
class Copies:
    """For each of a batch's rows [n] the token to copy, NONE without, and ``Match.slot``."""

    tokens: torch.Tensor
    slots: torch.Tensor


def copies_of(batch: Batch) -> Copies:
    """Look up every row's copy in the text up to it."""
    tokens, slots = [], []
    for example in batch.examples:
        matches = list(find_all(example.tokens[:-1].long()))[example.start - 1 :]
        tokens += [match.token if match else NONE for match in matches]
        slots += [match.slot if match else 0 for match in matches]
    device = batch.rows.device
    return Copies(torch.tensor(tokens, device=device), torch.tensor(slots, device=device))


def no_copies(batch: Batch) -> Copies:
    """As if nothing stood twice, for heads that learn alone."""
    nothing = torch.full_like(batch.rows, NONE)
    return Copies(nothing, torch.zeros_like(nothing))
