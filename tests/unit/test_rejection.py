"""What rejection draws is held by contract tests; here it is asked what each draft is held against.

A draft of the target's own distribution is always kept, and any other rule keeps fewer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ppsd.engine.rejection import redraw

VOCAB, FIRST = 50, 7


def verdict_of(logits: torch.Tensor) -> Any:
    rows = len(logits)
    return SimpleNamespace(position=FIRST - 1, rows=rows, tokens=(0,) * rows, logits=logits)


def sequence_of(drafts: dict[int, int], drawn: dict[int, torch.Tensor], seed: int) -> Any:
    sampler = SimpleNamespace(probabilities=lambda logits, before: logits.softmax(-1))
    return SimpleNamespace(
        chain=SimpleNamespace(draft_at=drafts.get),
        draft=SimpleNamespace(drawn=drawn),
        history=SimpleNamespace(before=lambda position: ()),
        request=SimpleNamespace(params=SimpleNamespace(seed=seed), vocab_size=VOCAB),
        sampler=sampler,
    )


def test_drafts_are_held_against_what_they_were_drawn_from() -> None:
    logits = torch.randn(3, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for seed in range(20):
        drawn = {FIRST + i: row.softmax(-1) for i, row in enumerate(logits)}
        drafts = {position: (11 * seed + position) % VOCAB for position in drawn}
        kept = redraw(sequence_of(drafts, drawn, seed), verdict_of(logits))
        assert kept == tuple(drafts.values()), "whatever they are"
        assert not drawn, "none is kept for a later round"


def test_a_draft_that_could_be_no_other_is_kept_as_often_as_the_target_says_it() -> None:
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    logits[0, 3] = 4.0  # probability 0.53
    tokens = [redraw(sequence_of({FIRST: 3}, {}, s), verdict_of(logits))[0] for s in range(1000)]
    assert 470 < tokens.count(3) < 580
    assert len(set(tokens)) > 40, "the others share the rest"


def test_positions_without_a_draft_keep_the_targets_token() -> None:
    logits = torch.zeros(2, VOCAB, dtype=torch.float64)
    logits[1, 9] = 1e3
    found = redraw(sequence_of({FIRST + 1: 9}, {}, 0), verdict_of(logits))
    assert found == (0, 9)
