"""The time of a stage that works for a rival: emulated in real time, or on a virtual clock."""

from __future__ import annotations

import time
from typing import Protocol


class Timer(Protocol):
    """Take the time that a device would take for what a stage does."""

    def arrive(self, moment: float) -> None:
        """Begin with work that came at a moment of ``now``."""

    def spend(self, seconds: float) -> None:
        """Let the time of a piece of work pass, which is done."""

    def now(self) -> float:
        """Return the time in seconds."""


class RealTimer:
    """Wait until an emulated device would be as far; without a pace there is nothing to wait for.

    Computing counts towards the device's time, as with paced stages (worker/pace.py).
    """

    def __init__(self) -> None:
        self._due = 0.0

    def arrive(self, moment: float) -> None:
        self._due = time.monotonic()

    def spend(self, seconds: float) -> None:
        self._due += seconds
        time.sleep(max(0.0, self._due - time.monotonic()))

    def now(self) -> float:
        return time.monotonic()


class VirtualTimer:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self._now = 0.0

    def arrive(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def spend(self, seconds: float) -> None:
        self._now += seconds

    def now(self) -> float:
        return self._now
