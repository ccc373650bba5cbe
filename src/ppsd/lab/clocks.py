"""Virtual time, in whole nanoseconds, so that equal times are equal."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

NOISE_POSITIONS = 4096  # after so many the same factors come again


class Clock:
    """The time of one rank, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Published:
    """The epochs of a slot, and when stages see them."""

    def __init__(self) -> None:
        self.epochs = [1]
        self._seen_at = [0]

    def add(self, seen_at: int, epoch: int) -> None:
        """Let stages see ``epoch`` from ``seen_at`` on."""
        self._seen_at.append(seen_at)
        self.epochs.append(epoch)

    def at(self, now: int) -> int:
        """Return the newest epoch that is seen at a time."""
        return self.epochs[bisect_right(self._seen_at, now) - 1]


def nanoseconds(seconds: float) -> int:
    """Return whole nanoseconds, so that equal times are equal."""
    return round(seconds * 1e9)


def noise(sigma: float, seed: int, lanes: int) -> list[list[float]]:
    """Return log-normal factors with mean 1 for each lane, by position."""
    rng = np.random.default_rng(seed)
    factors: list[list[float]] = rng.lognormal(
        -(sigma**2) / 2, sigma, (lanes, NOISE_POSITIONS)
    ).tolist()
    return factors
