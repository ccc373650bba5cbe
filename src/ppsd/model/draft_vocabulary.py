"""Score what a head may draft: its draft vocabulary, and what else a request's prompt holds.

A draft vocabulary leaves out what is rare in general, but what a prompt holds is not rare in its
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from ppsd.model.kernels import Weight
from ppsd.model.layers import Product
from ppsd.speculation.lookup import Array

NEWEST = 1024  # positions of a prompt whose tokens are scored: they bound what a draft costs
TOGETHER = 64  # columns: rows of scores are as wide as whole blocks of so many

Rows = Callable[[torch.Tensor], torch.Tensor]  # of tokens [k], the LM head's rows [k, C]


def prompt_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens at the ``NEWEST`` positions of a prompt, each once, ascending."""
    return tuple(sorted(set(prompt[-NEWEST:])))


class _Scored(NamedTuple):
    """Tokens scored in a slot: the draft vocabulary and, by ``own``, k more of its prompt.

    ``ids`` [D + k] has the latter last; ``order`` sorts it into ``ascending``. The tensors are on
    the head's device.
    """

    ids: Array
    ascending: Array
    columns: torch.Tensor  # ascending
    order: torch.Tensor
    own: Product | None


class DraftVocabulary:
    """Tokens that a head scores in each slot, by rows of the model's LM head.

    ``ids`` [D] are the draft vocabulary, ascending, and ``lm_head`` [D, C] its rows. ``rows``
    gives those of other tokens; without it no prompt adds any.
    """

    def __init__(
        self, ids: torch.Tensor, lm_head: Weight, rows: Rows | None, device: torch.device
    ) -> None:
        self._common = self._scored(ids.cpu().numpy(), None, device)
        self._score = Product(lm_head)
        self._rows = rows
        self._device = device
        self._prompts: dict[int, Sequence[int]] = {}  # of slots of which nothing was asked yet
        self._slots: dict[int, _Scored] = {}

    @staticmethod
    def _scored(ids: Array, own: Product | None, device: torch.device) -> _Scored:
        order = ids.argsort(kind="stable")
        columns, into = (torch.from_numpy(each).to(device) for each in (ids[order], order))
        return _Scored(ids, ids[order], columns, into, own)

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Score the tokens ``prompt``, each given once, in a slot from now on."""
        self._slots.pop(slot, None)
        self._prompts[slot] = prompt

    def _of(self, slot: int) -> _Scored:
        """Return what is scored in a slot; the rows are read when they are first asked for."""
        if self._prompts and (prompt := self._prompts.pop(slot, ())) and self._rows is not None:
            told, ids = np.asarray(prompt, dtype=np.int64), self._common.ids
            added = told[~np.isin(told, ids)]
            if len(added):
                own = Product(self._rows(torch.from_numpy(added)))
                self._slots[slot] = self._scored(np.concatenate([ids, added]), own, self._device)
        return self._slots.get(slot, self._common)

    def ids(self, slot: int) -> Array:
        """Return the tokens scored in a slot, ascending."""
        return self._of(slot).ascending

    def scores(self, finished: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the scores [n, D + k] of the ``ids`` of a slot for its finished rows [n, C]."""
        scores, scored = self._score(finished), self._of(slot)
        if scored.own is None:
            return scores
        return torch.cat([scores, scored.own(finished)], 1).index_select(1, scored.order)

    def spread(self, scores: torch.Tensor, slot: int, size: int) -> torch.Tensor:
        """Spread ``scores`` of a slot over ``size`` columns, one a token; -inf elsewhere."""
        full = scores.new_full((scores.shape[0], size), -torch.inf)
        return full.index_copy_(1, self._of(slot).columns, scores)

    def scores_of(
        self, finished: torch.Tensor, slots: Sequence[int]
    ) -> tuple[torch.Tensor, list[Array]]:
        """Return the scores [n, W] of finished rows [n, C], and the tokens of each row's columns.

        Row i is of ``slots[i]``, and scored as if it came alone. First come the draft vocabulary's
        columns, then those of its prompt's own tokens; rows with fewer than W end in -inf.
        """
        scores = self._score.by_rows(finished)
        each = [self._of(slot) for slot in slots]
        common = len(self._common.ids)
        most = max(len(scored.ids) for scored in each) - common
        if most:
            beside = scores.new_full((len(each), most - (common + most) % -TOGETHER), -torch.inf)
            for slot, rows in groupby(range(len(slots)), slots.__getitem__):
                first, *others = rows
                scored, end = self._of(slot), first + len(others) + 1
                if scored.own is not None:
                    said = scored.own.by_rows(finished[first:end])
                    beside[first:end, : said.shape[1]] = said
            scores = torch.cat([scores, beside], 1)
        return scores, [scored.ids for scored in each]
