"""Closed forms against brute force: every accept/reject string, every length of a run."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ppsd.lab import closed_forms
from ppsd.plan import theory

ALPHAS = (0.0, 0.3, 0.6, 0.95, 1.0)


def probability(string: tuple[bool, ...], alpha: float) -> float:
    return float(np.prod([alpha if hit else 1 - alpha for hit in string]))


def committed(string: tuple[bool, ...]) -> int:
    """Tokens of one round: the drafts before the first wrong one, and the target's own."""
    return (string.index(False) if False in string else len(string)) + 1


def mean_tokens(alpha: float, block: int) -> float:
    strings = product([True, False], repeat=block - 1)
    return sum(probability(s, alpha) * committed(s) for s in strings)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("block", [1, 2, 5, 8])
def test_expected_tokens_is_the_mean_over_all_strings(alpha: float, block: int) -> None:
    assert theory.expected_tokens(alpha, block) == pytest.approx(mean_tokens(alpha, block))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("block", "exit_layer", "head", "row"), [(2, 8, 0, 0), (5, 4, 1.5, 0.1)])
def test_draft_then_verify_speedup_is_time_over_time(
    alpha: float, block: int, exit_layer: int, head: float, row: float
) -> None:
    drafting = block * exit_layer + (block - 1) * head
    verifying = (32 - exit_layer) * (1 + (block - 1) * row) + 3
    expected = mean_tokens(alpha, block) * (32 + 3) / (drafting + verifying)
    got = closed_forms.draft_then_verify_speedup(alpha, block, 32, exit_layer, head, row, extra=3)
    assert got == pytest.approx(expected)


def run_time(verdicts: int, in_flight: int, tick: float, latency: float) -> float:
    """From a resync to its ``verdicts``-th verdict, block by block."""
    fed, seen = [0.0], [latency]
    for i in range(1, verdicts):
        room = seen[i - in_flight] if i >= in_flight else 0.0
        fed.append(max(fed[-1], room))
        seen.append(max(fed[-1] + latency, seen[-1] + tick))
    return seen[-1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("block", "in_flight"), [(1, 2), (1, 4), (1, 7), (3, 2), (2, 5)])
@pytest.mark.parametrize("latency", [4.0, 9.5])
def test_token_time_is_the_mean_over_runs(
    alpha: float, block: int, in_flight: int, latency: float
) -> None:
    """A run is the verdicts between two resyncs; k blocks right and then a wrong one."""
    right = alpha**block
    chances = [(1 - right) * right**k for k in range(400)]
    times = [run_time(k + 1, in_flight, 1.0, latency) + 0.25 for k in range(400)]
    time = np.dot(chances, times)
    tokens = mean_tokens(alpha, block) * np.dot(chances, range(1, 401))
    got = theory.token_time(alpha, block, in_flight, 1.0, latency, reaction=0.25)
    assert got == pytest.approx(time / tokens, rel=1e-9)


def test_full_pipeline_token_time_is_the_papers_mean() -> None:
    for alpha in ALPHAS:
        got = theory.token_time(alpha, 1, 4, 8.0, 32.0)
        assert got == pytest.approx(alpha * 8 + (1 - alpha) * 32)
        assert 32 / got == pytest.approx(theory.paper_speedup(alpha, 32, 8))


def test_known_values_and_limits() -> None:
    assert theory.paper_speedup(0.6, 32, 8) == pytest.approx(32 / 17.6)
    assert theory.paper_speedup(0.6, 32, 24) == pytest.approx(32 / (14.4 + 0.4 * 48))
    assert theory.paper_speedup(1.0, 32, 4) == 8
    assert theory.paper_speedup(0.7, 10**6, 1) == pytest.approx(
        closed_forms.many_stages_limit(0.7), 1e-4
    )
    assert closed_forms.many_stages_limit(1.0) == np.inf
    assert theory.token_time(1.0, 1, 4, 1.0, 10.0) == pytest.approx(2.5)  # w blocks a round trip
    assert theory.token_time(0.9, 1, 1, 99.0, 10.0) == 10  # plain decoding, whatever the tick


def test_the_alpha_a_claim_needs_gives_that_claim() -> None:
    for claim, exit_layer in ((2.01, 4), (2.01, 8), (3.81, 4), (3.81, 8)):
        alpha = closed_forms.paper_alpha(claim, 32, exit_layer)
        assert theory.paper_speedup(alpha, 32, exit_layer) == pytest.approx(claim)
    assert np.isnan(closed_forms.paper_alpha(2.01, 32, 16))  # two stages give at most 2
    assert np.isnan(closed_forms.paper_alpha(1.5, 32, 32))


def test_at_the_break_even_alpha_nothing_is_won_or_lost() -> None:
    blocks, exits = np.meshgrid([2, 4, 8], [4, 8, 16])
    alpha = closed_forms.break_even_alpha(blocks, 32, exits, head=0.5, row_cost=0.02, extra=4)
    costs = {"head": 0.5, "row_cost": 0.02, "extra": 4}
    at = closed_forms.draft_then_verify_speedup(alpha, blocks, 32, exits, **costs)
    below = closed_forms.draft_then_verify_speedup(alpha - 0.01, blocks, 32, exits, **costs)
    assert at == pytest.approx(np.ones_like(at))
    assert (below < 1).all()
    assert closed_forms.break_even_alpha(2, 32, 8) == pytest.approx(
        0.25
    )  # 40 layers for 1 + α tokens
    assert np.isnan(closed_forms.break_even_alpha(2, 32, 24, head=20))
    assert closed_forms.break_even_alpha(1, 32, 8) == 0, "a row alone is plain decoding"


def test_arrays_give_what_scalars_give() -> None:
    alphas = np.linspace(0, 1, 5)[:, None]
    exits = np.array([4, 8, 24])
    together = theory.paper_speedup(alphas, 32, exits)
    singly = [[theory.paper_speedup(a, 32, e) for e in exits] for a in alphas[:, 0]]
    assert np.array_equal(together, np.array(singly))
