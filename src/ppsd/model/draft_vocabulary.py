"""Score what a head may draft: its draft vocabulary, and what else a request's prompt holds.

A draft vocabulary leaves out what is rare in general. What a prompt holds is not rare in its
answer: of tokens outside the vocabulary that no copy says, a third stand in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ppsd.model.kernels import Weight
from ppsd.model.layers import Product
from ppsd.speculation.lookup import Array

NEWEST = 1024  # positions of a prompt whose tokens are scored: they bound a draft's cost

Rows = Callable[[torch.Tensor], torch.Tensor]  # of tokens [k], the LM head's rows [k, C]


def prompt_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens at the ``NEWEST`` positions of a prompt, ascending."""
    return tuple(sorted(set(prompt[-NEWEST:])))


class _Own(NamedTuple):
    """Holds what a slot's prompt adds to the D tokens of the draft vocabulary: k of its own.

    ``ids`` [D + k] are all of them, its own last; ``order`` [D + k] sorts them.
    """

    ids: Array
    ascending: Array
    order: torch.Tensor
    score: Product


class DraftVocabulary:
    """Tokens that a head scores in each slot, by rows of the model's LM head.

    ``ids`` [D] are the draft vocabulary, ascending, and ``lm_head`` [D, C] its rows. ``rows``
    gives those of other tokens; without it no prompt adds any.
    """

    def __init__(self, ids: Array, lm_head: Weight, rows: Rows | None) -> None:
        self._ids = ids
        self._score = Product(lm_head)
        self._rows = rows
        self._own: dict[int, _Own] = {}  # by slot, for those whose prompts add any

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Score the tokens ``prompt``, each given once, in a slot from now on."""
        self._own.pop(slot, None)
        told = np.asarray(prompt, dtype=np.int64)
        added = told[~np.isin(told, self._ids)]
        if self._rows is None or not len(added):
            return
        rows = self._rows(torch.from_numpy(added))
        ids = np.concatenate([self._ids, added])
        order = ids.argsort(kind="stable")
        columns = torch.from_numpy(order).to(rows.device)
        self._own[slot] = _Own(ids, ids[order], columns, Product(rows))

    def ids(self, slot: int) -> Array:
        """Return the tokens scored in a slot, ascending."""
        own = self._own.get(slot)
        return self._ids if own is None else own.ascending

    def scores(self, finished: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the scores [n, D + k] of the ``ids`` of a slot for its finished rows [n, C]."""
        scores, own = self._score(finished), self._own.get(slot)
        if own is None:
            return scores
        return torch.cat([scores, own.score(finished)], 1).index_select(1, own.order)

    def scores_of(
        self, finished: torch.Tensor, slots: Sequence[int]
    ) -> tuple[torch.Tensor, list[Array]]:
        """Return the scores [n, W] of finished rows [n, C] of ``slots`` [n], as if each came alone.

        And the tokens that each row scores: the draft vocabulary and then its prompt's own. Rows
        that score fewer than W end in -inf.
        """
        scores = self._score.by_rows(finished)
        owns = [self._own.get(slot) for slot in slots]
        ids = [self._ids if own is None else own.ids for own in owns]
        common, width = len(self._ids), max(map(len, ids))
        if width == common:
            return scores, ids
        beside = scores.new_full((len(ids), width - common), -torch.inf)
        for slot in {slot for slot, own in zip(slots, owns, strict=True) if own is not None}:
            rows = torch.tensor([i for i, each in enumerate(slots) if each == slot])
            rows = rows.to(scores.device)
            said = self._own[slot].score.by_rows(finished[rows])
            beside[rows, : said.shape[1]] = said
        return torch.cat([scores, beside], 1), ids
