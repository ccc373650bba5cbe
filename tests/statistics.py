"""Goodness-of-fit tests with a family-wise error rate. For tests of sampled output only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

MIN_EXPECTED = 5.0


def g_test(counts: ArrayLike, probabilities: ArrayLike) -> float:
    """p-value of the G-test that ``counts`` were drawn from ``probabilities`` (same shape).

    Cells with fewer than 5 expected draws are pooled; a draw from an impossible cell gives 0.
    """
    observed, expected = np.ravel(counts).astype(float), np.ravel(probabilities).astype(float)
    if observed[expected == 0].any():
        return 0.0
    expected = expected / expected.sum() * observed.sum()
    rare = expected < MIN_EXPECTED
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(stats.power_divergence(observed[keep], expected[keep], lambda_=0).pvalue)


def holm_rejections(p_values: Mapping[str, float], alpha: float) -> list[str]:
    """The hypotheses that Holm's step-down method rejects at family-wise level ``alpha``."""
    ranked = sorted(p_values, key=p_values.__getitem__)
    for passed, name in enumerate(ranked):
        if not p_values[name] <= alpha / (len(ranked) - passed):
            return ranked[:passed]
    return ranked
