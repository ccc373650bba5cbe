"""Heads in 8-bit codes: close to what was trained, half the size, and refused when damaged."""

from __future__ import annotations

import pytest
import torch

from ppsd.model.head_codes import SCALES, decode, encode, rounded


def test_codes_stay_within_half_a_step_of_every_number() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    matrix[2, :32] = 0
    stored = encode({"a": matrix})
    assert stored["a"].dtype == torch.int8
    assert stored["a" + SCALES].shape == (6, 2)
    step = matrix.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (decode(stored)["a"] - matrix).unflatten(1, (-1, 32)).abs()
    assert bool((error <= step * 0.51 + 1e-7).all())  # scales are float16
    assert not rounded(matrix)[2, :32].any()


def test_what_came_back_comes_back_the_same_again() -> None:
    torch.manual_seed(1)
    once = rounded(torch.randn(4, 96, dtype=torch.float64))
    assert once.dtype == torch.float64
    assert torch.equal(rounded(once), once)


def test_vectors_odd_matrices_and_ids_keep_their_form() -> None:
    weights = {"v": torch.randn(64), "odd": torch.randn(3, 33), "ids": torch.arange(5)}
    stored = encode(weights)
    assert {name: t.dtype for name, t in stored.items()} == {
        "v": torch.bfloat16,
        "odd": torch.bfloat16,
        "ids": torch.int64,
    }
    assert decode(stored).keys() == weights.keys()


@pytest.mark.parametrize("scales", [None, torch.ones(2, 3), torch.ones(4)])
def test_codes_without_fitting_scales_are_refused(scales: torch.Tensor | None) -> None:
    stored = {"a": torch.zeros(2, 64, dtype=torch.int8)}
    if scales is not None:
        stored["a" + SCALES] = scales
    with pytest.raises(ValueError, match="scales of a do not fit"):
        decode(stored)
