"""Prompt lookup against a search by hand, and the mixture against its definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ppsd import LLM, SamplingParams
from ppsd.errors import NonFiniteError
from ppsd.speculation.lookup import (
    CONFIDENCE,
    LENGTHS,
    LONGEST,
    ODDS,
    Match,
    find,
    likeliest,
    mixed,
)


def by_hand(tokens: list[int], longest: int) -> Match | None:
    for length in range(longest, 0, -1):
        for end in range(len(tokens) - 2, length - 2, -1):
            if tokens[end + 1 - length : end + 1] == tokens[-length:]:
                return Match(tokens[end + 1], length)
    return None


ids = st.integers(0, 3) | st.sampled_from([256, 2**16, 2**56])  # bytes as of 1, shifted


@given(st.lists(ids, min_size=1, max_size=40), st.integers(1, 9))
@example([256, 0, 9, 1], 9)
@example([0, 256, 0], 9)
def test_the_longest_repetition_the_newest_among_equals(tokens: list[int], longest: int) -> None:
    assert find(torch.tensor(tokens), longest) == by_hand(tokens, longest)


def test_lengths_are_told_apart_by_their_slots() -> None:
    assert [Match(0, length).slot for length in LENGTHS] == list(range(len(LENGTHS)))
    assert Match(0, 11).slot == Match(0, 8).slot
    assert find(torch.zeros(LONGEST + 9, dtype=torch.int64)) == Match(0, LONGEST)


def test_examples() -> None:
    assert find(torch.tensor([1, 2, 3, 9, 2, 3])) == Match(9, 2)
    assert find(torch.tensor([7, 7, 7])) == Match(7, 2)
    assert find(torch.tensor([1, 2, 3])) is None
    assert find(torch.tensor([5])) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_mixture_is_what_it_says(dtype: torch.dtype) -> None:
    """Also for a token that the head cannot draft (-inf)."""
    history = torch.tensor([4, 1, 2, 0, 1, 2])
    for banned in (False, True):
        logits = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(dtype)
        if banned:
            logits[0] = -torch.inf
        share = CONFIDENCE[1]  # "1, 2" stood before, and 0 came next
        wanted = logits.double().softmax(0) / (1 + share)
        wanted[0] += share / (1 + share)
        match = find(history)
        assert match is not None
        found = mixed(logits.clone(), match)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(
            found.double().softmax(0), wanted, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(("margin", "copied"), [(0.02, True), (-0.02, False)])
def test_the_copy_wins_unless_the_head_is_surer(margin: float, copied: bool) -> None:
    history = torch.tensor([4, 1, 2, 0, 1, 2])
    sure = CONFIDENCE[1] - margin
    rest = (1 - sure) / 5
    probabilities = torch.tensor([0.0, sure, rest, rest, rest, rest, rest])
    match = find(history)
    assert match is not None
    best = mixed(probabilities.log(), match).argmax().item()
    assert best == (0 if copied else 1)


def test_odds_of_one_s_own_are_taken_by_length() -> None:
    odds = torch.full_like(ODDS, -99.0)
    odds[2] = 99.0
    assert mixed(torch.zeros(6), Match(4, 3), odds).argmax() == 4
    torch.testing.assert_close(mixed(torch.zeros(6), Match(4, 2), odds), torch.zeros(6))


def test_longer_repetitions_count_for_more() -> None:
    assert len(CONFIDENCE) == len(LENGTHS)
    assert list(CONFIDENCE) == sorted(CONFIDENCE)
    assert all(0 < c < 1 for c in CONFIDENCE)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("split", [(3,), (1, 4)])
def test_repeating_needs_no_head_and_changes_nothing(
    tiny_model: Callable[[str], Path], split: tuple[int, ...], temperature: float
) -> None:
    three = {5: 90.0, 7: 90.0, 9: 90.0}  # with so few tokens text repeats
    params = SamplingParams(temperature, seed=3, max_tokens=40, ignore_eos=True, logit_bias=three)
    settings = {"dtype": "float64", "transport": "inprocess", "gate": False}
    prompt = [5, 9, 7, 5, 9]
    with LLM(str(tiny_model("llama")), stages=1, dtype="float64") as llm:
        plain = llm.run(prompt, params)
    with LLM(str(tiny_model("llama")), split=split, head="lookup", mode="ppsd", **settings) as llm:
        assert llm.drafts
        found = llm.run(prompt, params)
        assert found.token_ids == plain.token_ids
        counts = found.stats.counts
        text = [*prompt, *plain.token_ids]
        repeated = sum(
            (match.token if (match := find(torch.tensor(text[:i]))) else text[i - 1]) == text[i]
            for i in range(len(prompt), len(text))
        )
        assert 10 < counts.accepted <= repeated  # a verdict may overtake its draft
    with LLM(
        str(tiny_model("llama")), split=split, head="lookup", mode="ppsd", acceptance="rejection",
        **settings,
    ) as llm:  # fmt: skip
        assert len(llm.run(prompt, params).token_ids) == 40


@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    gaps=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    copy=st.none() | st.tuples(st.integers(0, 20), st.integers(1, 40)),
    odds=st.sampled_from([-40.0, -1.0, 0.0, 1.0]),
)
def test_the_likeliest_token_is_the_maximum_of_the_mixture(scores, gaps, copy, odds) -> None:
    ids = np.cumsum(gaps[: len(scores)]) - 1
    full = torch.full((21,), -torch.inf, dtype=torch.float64)
    full[torch.from_numpy(ids)] = torch.tensor(scores, dtype=torch.float64)
    match = None if copy is None else Match(*copy)
    same = torch.full_like(ODDS, odds)
    wanted = full if match is None else mixed(full.clone(), match, same)
    top = wanted.max()
    near = (wanted - top).abs() < 1e-12  # both sum in an order of their own
    found = likeliest(np.array(scores, dtype=np.float64), ids, match, same)
    assert near[found]
    if (wanted[near] == top).all():
        assert found == int(wanted.argmax())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_draft_of_nothing_finite_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="finite maximum, got"):
        likeliest(np.array([bad, bad]), np.arange(2), None)
