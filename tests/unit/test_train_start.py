"""Where training begins, and which verified rows a head learns to read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppsd.speculation.policy import UNVERIFIED
from ppsd.train.data import Example, make_batch
from ppsd.train.feedback import IN_FLIGHT, newest_verified, sample_verified, take_verified
from ppsd.train.start import LeastSquares


def test_least_squares_finds_the_matrix_that_made_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(6, 4, generator=generator)
    fit = LeastSquares()
    for _ in range(3):
        inputs = torch.randn(50, 6, generator=generator)
        fit.add(inputs, inputs @ true, torch.ones(50))
    torch.testing.assert_close(fit.solve().float(), true, rtol=1e-2, atol=2e-3)


def test_rows_weigh_alike_whatever_their_length() -> None:
    """A row ten times as long says the same; two that disagree meet in the middle.

    Where one weighs three times as much, they meet nearer to it.
    """
    fit = LeastSquares()
    rows = torch.tensor([[1.0], [10.0]]), torch.tensor([[1.0, 1.0], [10.0, -10.0]])
    fit.add(*rows, torch.ones(2))
    torch.testing.assert_close(fit.solve(), torch.tensor([[1.0, 0.0]]).double(), rtol=0, atol=1e-3)
    fit.add(*rows, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(fit.solve(), torch.tensor([[1.0, 0.5]]).double(), rtol=0, atol=1e-3)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 5))
def test_a_verified_position_is_one_whose_verdict_must_have_come(
    corrected: list[bool], start: int, in_flight: int
) -> None:
    """As one who follows a decode would tell, position by position."""
    corrected = [c and p >= start for p, c in enumerate(corrected)]
    found = newest_verified(torch.tensor(corrected), start, in_flight).tolist()
    for position, newest in enumerate(found):
        before = [p - 1 for p in range(position + 1) if corrected[p]]
        known = {p for p in range(position) if p <= max(before, default=-1)}
        known |= {p for p in range(position) if position - p >= in_flight}
        judged = [p for p in known if p >= start - 1]
        assert newest == max(judged, default=UNVERIFIED)


@pytest.mark.parametrize("whole", [False, True])
def test_sampled_rows_lie_before_their_own_and_in_what_is_to_be_guessed(whole: bool) -> None:
    """A prompt is read as decoded, too, where it is to be guessed: ``whole``."""
    tokens = [torch.arange(n, dtype=torch.int32) for n in (9, 30, 17)]
    examples = [Example(t, 1 if whole else len(t) // 2, len(t) // 2) for t in tokens]
    batch = make_batch(examples, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    verified = sample_verified(batch, generator)
    assert len(verified) == len(batch.rows)
    length = batch.tokens.shape[1]
    lags = set()
    for row, newest in zip(batch.rows.tolist(), verified.tolist(), strict=True):
        if newest != UNVERIFIED:
            assert newest // length == row // length
            assert newest % length >= examples[row // length].start - 1
            lags.add(row - newest)
        else:
            assert row % length < examples[row // length].start + max(IN_FLIGHT) - 1
    assert {1, 2, 3} <= lags <= set(range(1, max(IN_FLIGHT) + 1))


def test_no_verified_row_is_a_row_of_zeros() -> None:
    last = torch.randn(5, 3)
    taken = take_verified(last, torch.tensor([4, UNVERIFIED, 0]))
    assert torch.equal(taken, torch.stack([last[4], torch.zeros(3), last[0]]))
