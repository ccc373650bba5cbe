"""Simulated waves: the real engine and policy where every time is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ppsd.lab.pipelines import uniform
from ppsd.lab.simulator import simulate
from ppsd.lab.virtual_waves import MISSED, Boundary, ranks, simulate_waves
from ppsd.plan.waves import shares
from ppsd.speculation.policy import PLAIN, Schedule

TOKENS = 300


def plain_time(stages: int) -> float:
    return simulate(uniform([4] * stages, 1e-3), PLAIN, bytes(TOKENS)).token_time


def speedup(
    stages: int, rows: int, found: bytes, inner: dict[int, Boundary] | None = None
) -> float:
    run = simulate_waves(uniform([4] * stages, 1e-3), rows, found, inner=inner)
    counts = run.counts
    assert run.tokens == len(found)
    assert counts.drafted == counts.judged + counts.discarded
    return plain_time(stages) / run.token_time


def chain(stages: int, found: bytes) -> float:
    """Return the speedup of a chain of the first candidates."""
    hits = (np.frombuffer(found, np.uint8) == 0).astype(np.uint8).tobytes()
    run = simulate(uniform([4] * stages, 1e-3), Schedule(1, stages), hits)
    return plain_time(stages) / run.token_time


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_right_first_candidates_keep_every_stage_busy(stages: int) -> None:
    """The last tokens find the pipeline emptying, hence not quite the number of stages."""
    for rows in (1, 16):
        assert speedup(stages, rows, bytes(TOKENS)) == pytest.approx(stages, rel=0.02)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.67, 0.9])
def test_one_row_is_no_slower_than_a_chain_and_more_rows_are_faster(stages, alpha) -> None:
    found = ranks(alpha, TOKENS, seed=stages)
    speeds = [speedup(stages, rows, found) for rows in (1, 2, 4, 16)]
    assert speeds[0] >= chain(stages, found) * 0.999
    assert all(more >= fewer * 0.99 for fewer, more in pairwise(speeds))
    if not alpha:  # no candidate is ever right
        assert speeds == [1.0] * 4
        return
    assert speeds[-1] > speeds[0] * (1.02 if stages > 2 or alpha < 0.9 else 1.0)


def test_without_right_candidates_waves_are_plain_decoding() -> None:
    missed = bytes([MISSED]) * TOKENS
    for rows in (1, 16):
        assert speedup(4, rows, missed) == pytest.approx(1.0, rel=0.002)


def test_a_better_head_on_the_way_corrects_the_first() -> None:
    """It is heard two stages late, so it cannot do all that it could as the first."""
    found, better = ranks(0.5, TOKENS), ranks(0.9, TOKENS, seed=1)
    without = speedup(8, 1, found)
    helped = speedup(8, 1, found, {1: Boundary(better, 0.0)})
    assert without * 1.15 < helped < speedup(8, 1, better)


def test_ranks_come_as_often_as_their_shares() -> None:
    found = np.bincount(np.frombuffer(ranks(0.6, 200_000), np.uint8), minlength=MISSED + 1)
    expected = [*shares(0.6), 1 - sum(shares(0.6))]
    assert found / 200_000 == pytest.approx(expected, abs=0.004)
