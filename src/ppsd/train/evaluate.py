"""Measure a head's agreement with the model on held-out text.

The frozen model runs over the held-out data once; only its features stay in memory: one row of C
numbers a token and exit, and one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ppsd.model.packed import whole
from ppsd.model.stage import Stage
from ppsd.train.batched import teacher_rows, whole_sequences
from ppsd.train.copies import NONE, Copies, copies_of
from ppsd.train.data import Batch, Example, Vocabulary, make_batch, plan_epoch
from ppsd.train.features import FeatureSource
from ppsd.train.feedback import sample_verified, take_verified
from ppsd.train.interval import interval
from ppsd.train.student import Student

TOP = 4
CHUNK_ROWS = 256  # rows whose logits over the whole vocabulary exist at once


@dataclass(frozen=True)
class Agreement:
    """Shares of positions where the model's greedy token is the draft, or among its first four.

    ``between`` is the 95 % interval of ``alpha`` over ``examples``, None where there is but one.
    """

    alpha: float
    top4: float
    between: tuple[float, float] | None
    examples: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures, rounded for people; a percent has four digits."""
        between = None if self.between is None else [round(x, 6) for x in self.between]
        shares = {"alpha": round(self.alpha, 6), "top4": round(self.top4, 6)}
        return shares | {"interval": between, "examples": self.examples}


@dataclass(frozen=True)
class HeldOut:
    """One batch of held-out text, n positions of which count.

    Hidden rows at each exit, verified rows [n, C], what lookup copies [n], and the model's greedy
    tokens [n].
    """

    batch: Batch
    exits: dict[int, torch.Tensor]
    verified: torch.Tensor
    copies: Copies
    greedy: torch.Tensor


def prepare(
    model: Stage, examples: Sequence[Example], source: FeatureSource, batch_tokens: int
) -> list[HeldOut]:
    """Take the model's rows of the held-out examples, and what it would say greedily.

    Answers alone count, whatever is trained on: nothing is drafted within a prompt.
    """
    examples = [replace(e, start=max(e.start, e.prompt)) for e in examples]
    lengths = [len(e.tokens) for e in examples]
    held = []
    generator = torch.Generator().manual_seed(0)
    for indices in plan_epoch(lengths, batch_tokens, 0, 0):
        batch = make_batch([examples[i] for i in indices], model.plan.device)
        features = source(batch)
        rows = teacher_rows(model, features, batch.rows)
        assert model.lm_head is not None
        table = whole(model.lm_head)
        greedy = [(part @ table.T).argmax(-1) for part in torch.split(rows, CHUNK_ROWS)]
        verified = take_verified(features.last, sample_verified(batch, generator))
        copies = copies_of(batch)
        held.append(HeldOut(batch, features.exits, verified, copies, torch.cat(greedy)))
    return held


def lookup_alone(held: Sequence[HeldOut]) -> float:
    """Return the share of positions where the model's greedy token is what lookup copies."""
    right = sum(int((part.copies.tokens == part.greedy).sum()) for part in held)
    return right / sum(len(part.greedy) for part in held)


@torch.no_grad()
def evaluate(
    student: Student,
    model: Stage,
    held: Sequence[HeldOut],
    vocabulary: Vocabulary,
    precision: AbstractContextManager[object],
) -> Agreement:
    """Measure the agreement of one head mixed with lookup, as it drafts by default.

    Tokens that it does not score count as misses, unless they are copied.
    """
    among, accepted, judged = 0, [], []
    for part in held:
        sequences, length = part.batch.tokens.shape
        rope = whole_sequences(model.rope, sequences, length)
        hidden = part.exits[student.exit_layer]
        with precision:
            normed = student.forward(hidden, part.verified, rope, sequences, part.batch.rows)
            odds = student.odds(normed, part.copies.slots)
        right = []
        scored = vocabulary.of(part.batch)
        sayable = vocabulary.sayable(part.batch, scored)
        example = part.batch.rows // length
        columns = (normed, odds.float(), part.copies.tokens, part.greedy, example)
        for rows, log_weights, copied, greedy, whose in zip(
            *(torch.split(column, CHUNK_ROWS) for column in columns), strict=True
        ):
            scores = (rows.to(scored.rows.dtype) @ scored.rows.T).float()
            scores = scores.masked_fill(~sayable[whose], -torch.inf)
            hits = _best(scores, scored.ids, copied, log_weights) == greedy[:, None]
            right.append(hits[:, 0])
            among += int(hits.sum())
        example = example.cpu()
        accepted += example.bincount(torch.cat(right).double().cpu(), sequences).tolist()
        judged += example.bincount(minlength=sequences).tolist()
    total = sum(judged)
    between = interval(accepted, judged)
    return Agreement(sum(accepted) / total, among / total, between, len(judged))


def _best(
    scores: torch.Tensor, ids: torch.Tensor, copied: torch.Tensor, odds: torch.Tensor
) -> torch.Tensor:
    """Return the likeliest tokens [n, TOP] of ``lookup.mixed`` ``scores`` [n, W], best first."""
    same = ids == copied[:, None]
    own = scores.masked_fill(~same, -torch.inf).amax(-1)
    mixed = torch.logaddexp(own, scores.logsumexp(-1) + odds).masked_fill(
        copied == NONE, -torch.inf
    )
    every = torch.cat([scores.masked_fill(same, -torch.inf), mixed[:, None]], -1)
    best = every.topk(min(TOP, every.shape[1]), -1).indices
    return torch.where(best == len(ids), copied[:, None], ids[best.clamp(max=len(ids) - 1)])
