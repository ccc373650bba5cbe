"""Drafts by a head: lookup beside it, masks, and noise of their own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ppsd.engine.drafter import DraftState, Given, HeadDrafter, PacedDrafter
from ppsd.speculation.lookup import LENGTHS, find, likeliest, mixed
from ppsd.speculation.masks import mask_bytes, permits
from ppsd.speculation.sampling import Sampler, Stream
from ppsd.types import SamplingParams

VOCAB = 40
TEXT = torch.tensor([1, 2, 3, 5] * 12)
ODDS = torch.full((len(LENGTHS),), math.log(2.0))
SAMPLED = [0.0, 1.0]
ROW = torch.zeros(1, 2)


class FixedHead:
    """A head that always says the same, and notes what it is asked about."""

    config = SimpleNamespace(feedback=False)

    def __init__(self) -> None:
        self.logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
        self.ran: list[tuple[int, int, int]] = []  # rows, position, slot
        self.verified: list[torch.Tensor | None] = []

    def forward(self, rows: torch.Tensor, position: int, slot: int) -> torch.Tensor:
        self.ran.append((len(rows), position, slot))
        return rows

    def finish(self, features: torch.Tensor, verified: torch.Tensor | None) -> torch.Tensor:
        self.verified.append(verified)
        return features

    def scores(self, finished: torch.Tensor, slot: int) -> torch.Tensor:
        return self.logits[None].clone()

    def spread(self, scores: torch.Tensor, slot: int) -> torch.Tensor:
        return scores

    def copy_odds(self, finished: torch.Tensor) -> torch.Tensor:
        return ODDS.expand(len(finished), -1)

    def drafts_below(self, size: int, slot: int) -> bool:
        return size >= VOCAB

    def likeliest(self, scores: torch.Tensor, match, odds: torch.Tensor, slot: int) -> int:
        return likeliest(scores[0].numpy(), np.arange(VOCAB), match, odds)


def sampler(temperature: float) -> Sampler:
    return Sampler(SamplingParams(temperature=temperature, seed=4), 0, frozenset(), VOCAB)


@pytest.mark.parametrize("temperature", SAMPLED)
@pytest.mark.parametrize("lookup", [False, True])
def test_a_draft_is_the_targets_choice_from_what_head_and_lookup_say(
    temperature: float, lookup: bool
) -> None:
    head, samples = FixedHead(), sampler(temperature)
    drafter, state, copied = HeadDrafter(head, lookup=lookup), DraftState(last=ROW), 0
    for length in range(1, len(TEXT)):
        history, logits = TEXT[:length], head.logits.clone()
        if lookup and (match := find(history)):
            logits = mixed(logits, match, ODDS)
        expected = samples.choose(logits, history)
        assert drafter.draft(state, Given(samples, history)) == expected
        copied += expected == int(TEXT[length])
    assert (copied > len(TEXT) // 3) == lookup


def test_a_head_runs_what_it_has_not_seen_in_its_slot_and_reads_the_verified_row() -> None:
    head, state = FixedHead(), DraftState(slot=3)
    drafter, newest = HeadDrafter(head), torch.ones(1, 2)
    drafter.observe(state, 0, torch.zeros(2, 2))
    drafter.observe(state, 2, torch.zeros(1, 2))
    for _ in range(2):
        drafter.draft(state, Given(sampler(0.0), TEXT[:3], verified=newest))
    assert head.ran == [(3, 0, 3)]
    assert [row is newest for row in head.verified] == [True, True]


def test_drafts_and_passes_over_prompts_take_their_time_on_an_emulated_device(monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ppsd.engine.drafter.time.sleep", slept.append)
    drafter, state = PacedDrafter(HeadDrafter(FixedHead()), 5.0), DraftState()
    drafter.observe(state, 0, torch.zeros(9, 2))
    drafter.observe(state, 9, torch.zeros(1, 2))  # it waits for the draft
    drafter.draft(state, Given(sampler(0.0), TEXT[:10]))
    assert slept == [pytest.approx(5.0, abs=1.0)] * 2


@pytest.mark.parametrize("temperature", SAMPLED)
def test_a_draft_is_permitted(temperature: float) -> None:
    mask = bytearray(mask_bytes(VOCAB))
    for token in (5, 17, 30):
        mask[token >> 3] |= 1 << (token & 7)
    samples, drafter = sampler(temperature), HeadDrafter(FixedHead(), lookup=True)
    for length in range(1, 20):
        given = Given(samples, TEXT[:length], mask=bytes(mask))
        draft = drafter.draft(DraftState(last=ROW), given)
        assert permits(bytes(mask), draft)


def test_where_nothing_may_be_said_the_last_token_is_drafted() -> None:
    nothing = bytes(mask_bytes(VOCAB))
    given = Given(sampler(0.0), TEXT[:7], mask=nothing)
    assert HeadDrafter(FixedHead()).draft(DraftState(), given) == TEXT[6]


def test_drafts_with_noise_of_their_own_leave_their_distributions() -> None:
    head, samples, state = FixedHead(), sampler(0.7), DraftState()
    drafter = HeadDrafter(head)
    for length in (3, 4, 5, 4):  # a verdict took one back
        history = TEXT[:length]
        draft = drafter.draft(state, Given(samples, history, Stream.DRAFT))
        assert draft == samples.draw(head.logits, history, Stream.DRAFT)
        expected = samples.probabilities(head.logits, history)
        torch.testing.assert_close(state.drawn[length], expected, rtol=0, atol=0)
    assert sorted(state.drawn) == [3, 4]
