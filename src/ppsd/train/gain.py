"""Estimate from earlier runs how much training improves a head."""

from __future__ import annotations

import numpy as np

# Tokens of a run, prompts and all passes counted, and how far held-out α rose above its start by
# least squares: heads of SmolLM2-135M-Instruct at exit 8 (docs/results/heads).
TOKENS = (12_000, 185_000, 1_100_000, 10_200_000, 16_400_000, 21_100_000)
GAINS = (0.0, 0.10, 0.16, 0.19, 0.203, 0.217)


def expected_gain(tokens: int, seen: int = 0) -> float:
    """Return the rise of held-out α that ``tokens`` may bring after those that a head has seen."""
    before, after = np.interp(np.log([max(1, seen), max(1, seen + tokens)]), np.log(TOKENS), GAINS)
    return float(after - before)
