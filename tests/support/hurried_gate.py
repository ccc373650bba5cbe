"""A real gate that switches many times a request, for tests that pauses change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ppsd.speculation.gate import Gate, Switches
from ppsd.speculation.policy import Policy, Schedule

LONGEST_PAUSE = 2  # tokens after it was decided


class Hurried(Gate):
    """Sees ``times`` go by from verdict to verdict in place of the clock's, and is impatient."""

    def __init__(
        self, schedule: Schedule, times: Sequence[float] = (1.0, 1.1, 1.0, 30.0, 1.0)
    ) -> None:
        super().__init__(schedule)
        self._clock = itertools.accumulate(itertools.cycle(times))
        self.begun: list[Switches] = []

    def begin(self, policy: Policy, now: float) -> Switches:
        """See Gate."""
        self.begun.append(super().begin(policy, now))
        return self.begun[-1]

    def watch(self, policy: Policy, now: float) -> None:
        """See Gate."""
        super().watch(policy, next(self._clock))
        self._left = min(self._left, LONGEST_PAUSE)
