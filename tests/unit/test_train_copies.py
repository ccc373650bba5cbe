"""What lookup offers in training is what it offers at run time, and so is what becomes of it."""

from __future__ import annotations

import torch

from ppsd.speculation.lookup import LENGTHS, find, mixed
from ppsd.train.copies import NONE, copies_of
from ppsd.train.data import Example, make_batch
from ppsd.train.evaluate import TOP, _best


def test_every_row_gets_the_copy_of_its_own_past() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 4, (n,), generator=generator, dtype=torch.int32) for n in (9, 30)]
    texts.append(texts[1][:11].repeat(9))  # repetitions longer than are told apart
    starts = (1, 12, 2)
    examples = [Example(t, n, n) for t, n in zip(texts, starts, strict=True)]
    copies = copies_of(make_batch(examples, torch.device("cpu")))
    pasts = [t[:n] for t, start in zip(texts, starts, strict=True) for n in range(start, len(t))]
    matches = [find(past.long()) for past in pasts]
    assert copies.tokens.tolist() == [m.token if m else NONE for m in matches]
    assert copies.slots.tolist() == [m.slot if m else 0 for m in matches]


def test_the_best_tokens_are_those_of_the_mixture() -> None:
    """With a draft vocabulary, with copies in it, outside it, and without any."""
    torch.manual_seed(1)
    rows, vocab = 200, 12
    draft_ids = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    scores, odds = torch.randn(rows, len(draft_ids)), torch.randn(rows)
    copied = torch.randint(NONE, vocab, (rows,))
    best = _best(scores, draft_ids, copied, odds)
    for i in range(rows):
        logits = torch.full((vocab,), -torch.inf)
        logits[draft_ids] = scores[i]
        if copied[i] != NONE:
            match = find(torch.tensor([1, copied[i], 1]))
            assert match is not None
            logits = mixed(logits, match, odds[i].expand(len(LENGTHS)))
        assert best[i].tolist() == logits.topk(TOP).indices.tolist()
