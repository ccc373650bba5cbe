"""Estimate from some prompts how far a rate of accepted drafts may be off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES, COVERAGE = 2000, 0.95


def interval(accepted: Sequence[int], judged: Sequence[int]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of Σ accepted / Σ judged over prompts (Efron 1979).

    Prompts are drawn anew, not positions, because positions of one prompt are alike. None for a
    single prompt. The same numbers always give the same interval.
    """
    count = len(judged)
    if count < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    rates = np.asarray(accepted)[drawn].sum(1) / np.asarray(judged)[drawn].sum(1)
    low, high = np.quantile(rates, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
