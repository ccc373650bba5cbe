"""`coupled` mode: speculative text is plain text, and plain text follows the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppsd.speculation.accept import accept
from ppsd.speculation.sampling import Sampler
from ppsd.types import SamplingParams
from tests.statistics import g_test, holm_rejections


def tokens(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def toy_logits(history: Tensor, vocab: int = 6) -> Tensor:
    """Logits that depend on the whole prefix."""
    key = 0
    for token in history.tolist():
        key = (key * 31 + token + 1) % 1_000_003
    return torch.from_numpy(np.random.default_rng(key).normal(0, 1.5, vocab))


def plain_text(sampler: Sampler, prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    while len(text) < length:
        text.append(sampler.choose(toy_logits(tokens(*text)), tokens(*text)))
    return text


TEXT_PARAMS = (
    {"temperature": 1.0},
    {"temperature": 0.0, "presence_penalty": 0.5},
    {"temperature": 1.7, "top_k": 4, "repetition_penalty": 1.4},
    {"temperature": 0.6, "top_p": 0.8, "frequency_penalty": 0.7, "logit_bias": {2: 2.0}},
)


@given(seed=st.integers(0, 2**63 - 1), params=st.sampled_from(TEXT_PARAMS), data=st.data())
@settings(deadline=None, max_examples=60)
def test_speculative_text_equals_plain_text_whatever_the_drafts(seed, params, data):
    prompt = [1, 2, 3, 4, 5]
    sampler = Sampler(SamplingParams(seed=seed, **params), 5, frozenset(), 6)
    expected = plain_text(sampler, prompt, 17)
    text = list(prompt)
    while len(text) < 17:
        good = data.draw(st.integers(0, 4))
        guesses = data.draw(st.lists(st.integers(0, 5), max_size=3))
        drafts = (expected[len(text) : len(text) + good] + guesses)[: 17 - len(text) - 1]
        prefixes = [tokens(*text, *drafts[:i]) for i in range(len(drafts) + 1)]
        targets = [sampler.choose(toy_logits(prefix), prefix) for prefix in prefixes]
        num_accepted, following = accept(drafts, targets)
        assert following is not None
        text += [*drafts[:num_accepted], following]
    assert text == expected


def test_a_drafter_with_the_targets_logits_is_always_right():
    params = SamplingParams(temperature=1.3, top_p=0.9, frequency_penalty=0.4, seed=77)
    target, drafter = (Sampler(params, 5, frozenset(), 500) for _ in range(2))
    prefix = torch.arange(60) % 7
    for length in range(60):
        logits = toy_logits(prefix[:length], vocab=500).float()
        expected = target.choose(logits, prefix[:length])
        assert drafter.choose(logits.clone(), prefix[:length]) == expected


NUM_DRAWS = 10_000
MARGINALS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.4},
    "truncated": {"temperature": 1.5, "top_k": 3},
}


@pytest.fixture(scope="module")
def marginals() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Counts of coupled draws at successive positions, and the exact distribution."""
    logits, history = np.array([0.3, -1.2, 1.1, 0.0]), torch.zeros(NUM_DRAWS, dtype=torch.int64)
    results = {}
    for name, params in MARGINALS.items():
        sampler = Sampler(SamplingParams(seed=2024, **params), 0, frozenset(), 4)
        drawn = [sampler.choose(torch.tensor(logits), history[:p]) for p in range(NUM_DRAWS)]
        weights = np.exp(logits / params["temperature"]) * [1, "top_k" not in params, 1, 1]
        results[name] = np.bincount(drawn, minlength=4), weights / weights.sum()
    return results


def test_coupled_marginals_are_the_softmax(marginals):
    p_values = {name: g_test(counts, probs) for name, (counts, probs) in marginals.items()}
    assert not holm_rejections(p_values, 1e-4), p_values


def test_the_g_test_sees_a_shift_of_three_percent(marginals):
    shift = np.array([0.03, 0.0, -0.03, 0.0])
    p_values = {name: g_test(counts, probs + shift) for name, (counts, probs) in marginals.items()}
    assert len(holm_rejections(p_values, 1e-4)) == len(p_values)
