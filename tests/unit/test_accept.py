"""Acceptance: `rejection` enumerated, then sampled; and planted bugs that must be caught."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ppsd.speculation.accept import accept, draw_target
from ppsd.speculation.sampling import Sampler, Stream, uniform
from ppsd.types import SamplingParams
from tests.enumeration import (
    Draw,
    Pair,
    Probs,
    Step,
    Text,
    check_joint,
    kernel,
    plain_joint,
    prefix_model,
    tensor,
)
from tests.statistics import g_test, holm_rejections

ALMOST_ONE = math.nextafter(1.0, 0.0)


# accept


@pytest.mark.parametrize(
    ("drafts", "targets", "expected"),
    [
        ([], [], (0, None)),
        ([], [7], (0, 7)),
        ([5], [], (0, None)),
        ([5], [5], (1, None)),
        ([5], [6], (0, 6)),
        ([5], [5, 9], (1, 9)),
        ([5], [6, 9], (0, 6)),
        ([5, 6, 7], [5, 6], (2, None)),
        ([5, 6, 7], [5, 8, 7], (1, 8)),
        ([5, 6, 7], [5, 6, 7, 8], (3, 8)),
        ((1, 1), (0, 1, 1), (0, 0)),
    ],
)
def test_accept(drafts, targets, expected):
    assert accept(drafts, targets) == expected


def test_accept_refuses_targets_for_positions_it_has_no_draft_for():
    with pytest.raises(ValueError, match="at most 2 tokens, got 3"):
        accept([1], [1, 2, 3])


# draw_target at its corners

TINY = 5e-324
CORNERS = (0.0, TINY, 0.5, ALMOST_ONE)


def reachable(draw: Draw, q: Probs, p: Probs, draft: int) -> set[int]:
    """All results at the corners of both uniforms."""
    return {draw(draft, tensor(q), tensor(p), a, r) for a in CORNERS for r in CORNERS}


def check_corners(draw: Draw) -> None:
    assert reachable(draw, (0.3, 0.7), (0.3, 0.7), 0) == {0}, "p = q must always accept"
    assert reachable(draw, (0.5, 0.0, 0.5), (0.0, 1.0, 0.0), 0) == {1}, "disjoint supports"
    assert reachable(draw, (0.5, 0.5, 0.0), (0.0, 0.5, 0.5), 0) == {2}, "p(draft) = 0"
    assert reachable(draw, (1.0, 0.0), (1.0, 0.0), 0) == {0}, "equal one-hots"
    assert reachable(draw, (1.0, 0.0), (0.5, 0.5), 0) == {0, 1}, "one-hot draft"
    assert reachable(draw, (0.5, 0.5), (0.0, 1.0), 1) == {1}, "p > q must always accept"
    assert reachable(draw, (TINY, 1.0), (1.0, 0.0), 0) == {0}, "p / q overflows"
    assert reachable(draw, (1.0, 0.0, 0.0), (1.0 - 2**-53, TINY, 0.0), 0) <= {0, 1}, "denormal"


def test_corners():
    check_corners(draw_target)


def test_a_cumulative_sum_that_ends_below_one_never_yields_a_massless_token():
    p = (0.0, *[0.1] * 10, 0.0)
    q = (1.0, *[0.0] * 11)
    assert sum(p) < 1.0
    assert draw_target(0, tensor(q), tensor(p), 0.5, ALMOST_ONE) == 10
    assert draw_target(0, tensor(q), tensor(p), 0.5, 0.0) == 1


def test_the_residual_gives_each_token_a_half_open_interval():
    q, p = tensor((1.0, 0.0, 0.0)), tensor((0.0, 0.5, 0.5))
    assert draw_target(0, q, p, 0.0, math.nextafter(0.5, 0.0)) == 1
    assert draw_target(0, q, p, 0.0, 0.5) == 2


def test_a_denormal_residual_is_sampled():
    p, q = (1.0, TINY, 0.0), (1.0 + 2**-52, 0.0, 0.0)
    for residual_uniform in CORNERS:
        assert draw_target(0, tensor(q), tensor(p), ALMOST_ONE, residual_uniform) == 1


def test_a_rejection_by_rounding_with_no_residual_draws_from_the_target():
    q, p = (0.5 + 2**-53, 0.5, 0.0), (0.5, 0.5, 0.0)
    assert draw_target(0, tensor(q), tensor(p), ALMOST_ONE, 0.25) == 0
    assert draw_target(0, tensor(q), tensor(p), ALMOST_ONE, ALMOST_ONE) == 1


def test_a_draft_that_cannot_have_been_drawn_is_refused():
    with pytest.raises(ValueError, match="token 1 has none"):
        draw_target(1, tensor((1.0, 0.0)), tensor((0.5, 0.5)), 0.0, 0.0)


def test_arguments_are_never_changed():
    q, p = tensor((0.9, 0.1)), tensor((0.1, 0.9))
    draw_target(0, q, p, 0.9, 0.5)
    assert q.tolist() == [0.9, 0.1]
    assert p.tolist() == [0.1, 0.9]


# Exact enumeration


def normalised(weights: list[float]) -> Probs:
    array = np.array(weights)
    return tuple((array / array.sum()).tolist())


WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, TINY, 1e-310, 1e-17]), st.floats(0, 1))


@st.composite
def distributions(draw: st.DrawFn, vocab: int) -> Probs:
    weights = draw(st.lists(WEIGHTS, min_size=vocab, max_size=vocab))
    assume(sum(weights) > 1e-300)
    return normalised(weights)


@st.composite
def pairs_of(draw: st.DrawFn, vocab: int) -> Pair:
    """Independent, equal, disjoint, one-hot, or one distribution truncated in two ways."""
    p = draw(distributions(vocab))
    kind = draw(st.sampled_from(["independent", "equal", "disjoint", "one-hot", "truncated"]))
    if kind == "equal":
        return p, p
    if kind == "one-hot":
        hot = draw(st.integers(0, vocab - 1))
        return tuple(float(token == hot) for token in range(vocab)), p
    if kind == "independent":
        return draw(distributions(vocab)), p
    mask = draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab))
    other = [not m for m in mask] if kind == "disjoint" else [True] * vocab
    sides = [[w * m for w, m in zip(p, ms, strict=True)] for ms in (mask, other)]
    assume(all(sum(side) > 1e-300 for side in sides))
    return normalised(sides[0]), normalised(sides[1])


@given(st.integers(2, 6).flatmap(pairs_of))
@settings(deadline=None, max_examples=150)
@example(((TINY, 1.0, 0.0), (0.5, TINY, 0.5)))
def test_one_position_is_exact_and_accepts_as_often_as_possible(pair):
    q, p = pair
    kernels = {draft: kernel(Step(), draft, q, p) for draft in range(len(q)) if q[draft] > 0}
    emitted = sum(q[draft] * np.array(odds) for draft, odds in kernels.items())
    accepted = sum(q[draft] * odds[draft] for draft, odds in kernels.items())
    np.testing.assert_allclose(emitted, p, rtol=0, atol=1e-12)
    assert accepted == pytest.approx(sum(map(min, p, q)), abs=1e-12)
    larger = {token for token in range(len(p)) if p[token] > q[token]}
    for draft, odds in kernels.items():
        support = {token for token, mass in enumerate(odds) if mass > 0} - {draft}
        assert support <= larger or not larger


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Pair], int]:
    vocab, depth = draw(st.sampled_from([(2, 4), (3, 3), (4, 2), (6, 1), (2, 2), (3, 1)]))
    return draw(st.lists(pairs_of(vocab), min_size=1, max_size=5)), depth


@given(models())
@settings(deadline=None, max_examples=40)
def test_the_joint_of_several_tokens_is_the_targets(model):
    check_joint(Step(), *model)


FIXED_PAIRS: list[Pair] = [
    ((0.2, 0.5, 0.3), (0.6, 0.1, 0.3)),
    ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6)),
    ((0.1, 0.1, 0.8), (0.25, 0.5, 0.25)),
    ((0.4, 0.3, 0.3), (0.3, 0.4, 0.3)),
]


def test_the_joint_at_the_largest_size():
    rng = np.random.default_rng(6)
    pairs = [tuple(normalised(rng.random(6) ** 3) for _ in range(2)) for _ in range(7)]
    check_joint(Step(), pairs, 4)


# Sampled: a prefix-dependent drafter and target over three tokens

LENGTH = 3
MODEL = prefix_model(FIXED_PAIRS)
EXPECTED = plain_joint(MODEL, (), LENGTH)


def simulate(step: Step, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts, int [runs, LENGTH], and whether each token was an accepted draft."""
    texts, hits = np.empty((2, runs, LENGTH), dtype=int)
    uniforms = np.random.default_rng(2023).random((runs, LENGTH, 3)).tolist()
    for run, position in itertools.product(range(runs), range(LENGTH)):
        q, p = MODEL(tuple(texts[run, :position].tolist()))
        for_draft, for_accept, for_residual = uniforms[run][position]
        draft = int((np.cumsum(q[:-1]) <= for_draft).sum())
        believed = tensor(step.believe(q))
        token = step.draw(draft, believed, tensor(p), for_accept, for_residual)
        texts[run, position], hits[run, position] = token, token == draft
    return texts, hits.astype(bool)


def count(texts: np.ndarray) -> np.ndarray:
    """How often each text occurs, one axis per token."""
    return np.histogramdd(texts, bins=[np.arange(4) - 0.5] * LENGTH)[0]


def seeded_text(seed: int) -> Text:
    """Two drafts, their judgement and plain decoding of the rest, on the production streams."""
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 0, frozenset(), 3)

    def logits(side: int, prefix: Text) -> tuple[Tensor, Tensor]:
        return tensor(MODEL(prefix)[side]).log(), torch.tensor(prefix, dtype=torch.int64)

    drafts: Text = ()
    targets: Text = ()
    for position in range(2):
        draft_input, target_input = logits(0, drafts), logits(1, drafts)
        draft = sampler.draw(*draft_input, Stream.DRAFT)
        noise = [uniform(seed, position, s) for s in (Stream.ACCEPT, Stream.RESIDUAL)]
        q, p = sampler.probabilities(*draft_input), sampler.probabilities(*target_input)
        drafts, targets = (*drafts, draft), (*targets, draw_target(draft, q, p, *noise))
    num_accepted, following = accept(drafts, targets)
    text = drafts[:num_accepted] + (() if following is None else (following,))
    while len(text) < LENGTH:
        text = (*text, sampler.choose(*logits(1, text)))
    return text


def after_rejection() -> np.ndarray:
    """Distribution of a text whose first draft was rejected: residual, then plain decoding."""
    q, p = MODEL(())
    residual = np.subtract(p, q).clip(0)
    return np.stack(
        [m / residual.sum() * plain_joint(MODEL, (x,), LENGTH - 1) for x, m in enumerate(residual)]
    )


def test_sampled_text_follows_the_target():
    texts, hits = simulate(Step(), 6_000)
    seeded = np.array([seeded_text(seed) for seed in range(1_500)])
    acceptance = sum(map(min, *MODEL(())))
    p_values = {
        "joint": g_test(count(texts), EXPECTED),
        "after a rejection": g_test(count(texts[~hits[:, 0]]), after_rejection()),
        "acceptance": stats.binomtest(int(hits[:, 0].sum()), len(hits), acceptance).pvalue,
        "production streams": g_test(count(seeded), EXPECTED),
    }
    assert not holm_rejections(p_values, 1e-4), p_values


# Planted bugs


def residual_by(weigh: Callable[[Tensor, Tensor], Tensor]) -> Draw:
    """`draw_target` with another weight for the token after a rejection."""

    def draw(draft: int, q: Tensor, p: Tensor, for_accept: float, for_residual: float) -> int:
        if for_accept < p[draft] / q[draft]:
            return draft
        cumulative = weigh(q, p).cumsum(0)
        return min(int((cumulative <= for_residual).sum()), len(p) - 1)

    return draw


def residual(q: Tensor, p: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


def share(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def accept_at_equality(draft: int, q: Tensor, p: Tensor, a: float, r: float) -> int:
    return draft if a <= p[draft] / q[draft] else draw_target(draft, q, p, a, r)


BUGS = {
    "residual not clamped": Step(residual_by(lambda q, p: share(abs(p - q)))),
    "residual not renormalised": Step(residual_by(residual)),
    "residual the wrong way round": Step(residual_by(lambda q, p: share(residual(p, q)))),
    "resampled from the target": Step(residual_by(lambda q, p: p)),
    "one uniform for both": Step(lambda draft, q, p, a, r: draw_target(draft, q, p, a, a)),
    "q of another position": Step(believe=lambda q: FIXED_PAIRS[1][0]),
    "q without the draft's temperature": Step(believe=lambda q: normalised([m**0.7 for m in q])),
}


def test_a_rewritten_but_correct_draw_passes_the_checks_for_bugs():
    correct = Step(residual_by(lambda q, p: share(residual(q, p))))
    check_joint(correct, FIXED_PAIRS, LENGTH - 1)
    assert g_test(count(simulate(correct, 2_000)[0]), EXPECTED) > 1e-4


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_enumeration_catches(bug):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_joint(bug, FIXED_PAIRS, LENGTH - 1)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_sampling_catches(bug):
    assert g_test(count(simulate(bug, 2_000)[0]), EXPECTED) < 1e-4


def test_corners_catch_acceptance_at_equality():
    """A bug of probability zero in the reals: only u = 0 exactly shows it."""
    with pytest.raises(AssertionError, match="disjoint supports"):
        check_corners(accept_at_equality)
