"""The cost model: what stages, heads and links of one pipeline cost, as plain floats in seconds.

Where the numbers come from is in ``source``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ppsd.errors import ConfigError
from ppsd.plan.theory import Array, token_time
from ppsd.speculation.policy import Schedule

MIN_LAYER = 1e-7  # seconds; the simulator counts nanoseconds and may shorten a layer by jitter


@dataclass(frozen=True)
class StageCost:
    """Contiguous decoder layers of equal cost; ``layer`` is the seconds of one for one row."""

    layers: int
    layer: float

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError("layers", self.layers, "at least 1 in every stage")
        if not MIN_LAYER <= self.layer < math.inf:
            raise ConfigError("layer", self.layer, f"finite and at least {MIN_LAYER:g} seconds")


@dataclass(frozen=True)
class Link:
    """One direction of a connection: seconds before the first byte, then bytes per second."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        _check_times(latency=self.latency)
        if not self.bandwidth > 0:
            raise ConfigError("bandwidth", self.bandwidth, "above 0 bytes per second")

    def delay(self, size: float) -> float:
        """Return the seconds until ``size`` bytes are on the other side."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class CostModel:
    """One pipeline of P stages; all times in seconds.

    ``links[k]`` leads from stage k to the next one, the last back to rank 0 (no links for P = 1).
    ``head`` is one draft by the exit head, ``lm_head`` the last stage's for one row, ``row_cost``
    what each further row of a block costs as a share of the first, ``overhead`` what a stage spends
    between two blocks, ``cancel`` how long a new epoch takes to be seen (infinite: never). Where
    workers share cores, ``at_once`` stages compute at the same time, and others take turns.
    """

    stages: tuple[StageCost, ...]
    links: tuple[Link, ...]
    head: float = 0.0
    lm_head: float = 0.0
    row_cost: float = 0.0
    row_bytes: int = 0
    overhead: float = 0.0
    cancel: float = 0.0
    at_once: float = math.inf
    source: str = "assumed"

    def __post_init__(self) -> None:
        expected = len(self.stages) if len(self.stages) > 1 else 0
        if not self.stages or len(self.links) != expected:
            raise ConfigError("links", len(self.links), f"{expected} for {len(self.stages)} stages")
        _check_times(
            head=self.head, lm_head=self.lm_head, row_cost=self.row_cost, overhead=self.overhead
        )
        if not self.at_once >= 1:
            raise ConfigError("at_once", self.at_once, "at least 1 stage")
        if not self.cancel >= 0:
            raise ConfigError("cancel", self.cancel, "at least 0 seconds")

    @property
    def size(self) -> int:
        """Return P, the number of stages."""
        return len(self.stages)

    @property
    def layers(self) -> int:
        """Return N, the number of decoder layers."""
        return sum(stage.layers for stage in self.stages)

    @property
    def exit_layer(self) -> int:
        """Return E, the number of layers of stage 0."""
        return self.stages[0].layers

    @property
    def bounds(self) -> tuple[int, ...]:
        """Return the first layer of every stage, and N."""
        return tuple(int(b) for b in np.cumsum([0, *(stage.layers for stage in self.stages)]))

    def layer_time(self, stage: int, rows: int) -> float:
        """Return the seconds of one layer of ``stage`` for ``rows`` rows together."""
        return self.stages[stage].layer * self.growth(rows)

    def growth(self, rows: int) -> float:
        """Return how many times as long as one row ``rows`` rows take."""
        return 1 + (rows - 1) * self.row_cost

    def stage_time(self, stage: int, rows: int = 1) -> float:
        """Return the seconds that ``stage`` is busy with a block, drafting apart.

        The LM head counts on the stage that has it.
        """
        entered_singly = stage == 0  # drafts enter stage 0 one by one
        once = 1 if entered_singly else rows
        layers = self.stages[stage].layers * self.layer_time(stage, once)
        lm_head = self.lm_head * self.growth(rows) if stage == self.size - 1 else 0.0
        return layers * (rows if entered_singly else 1) + lm_head + self._sending

    @property
    def _sending(self) -> float:
        return self.overhead if self.size > 1 else 0.0

    def latency(self, rows: int = 1) -> float:
        """Return a block's time from stage 0 to its verdict at rank 0, with all queues empty."""
        stages = sum(self.stage_time(k, rows) for k in range(self.size))
        hops = sum(link.delay(rows * self.row_bytes) for link in self.links[:-1])
        verdict = self.links[-1].delay(0) if self.links else 0.0
        return stages + (rows - 1) * self.head + hops + verdict

    def tick(self, rows: int = 1) -> float:
        """Return τ, the time from one block to the next when the pipeline is full."""
        times = [self.stage_time(k, rows) for k in range(self.size)]
        times[0] += rows * self.head
        return max(*times, sum(times) / self.at_once)

    def reaction(self, schedule: Schedule) -> float:
        """Return how long a resync waits for stage 0 to notice it: until a layer or a draft ends.

        Exact for the first verdict after a resync; later ones may meet stage 0 in another phase.
        """
        layer = self.stages[0].layer
        cycle = self.stage_time(0) + self.head
        fed, phase = divmod(self.latency(schedule.block), cycle or math.inf)
        if fed >= schedule.block * schedule.in_flight:
            return 0.0
        begun = round(phase / layer, 6)  # or a sum's last digit would decide
        if begun > self.exit_layer:
            return cycle - phase
        return math.ceil(begun) * layer - phase

    def token_time(self, alpha: ArrayLike, schedule: Schedule) -> Array:
        """Return the mean seconds per token at acceptance ``alpha`` (see theory.token_time)."""
        m, w = schedule.block, schedule.in_flight
        if self.size == 1:  # nothing overlaps; w > 1 makes a draft more than can be used
            return token_time(alpha, m, 1, 0.0, self.latency(m) + (w > 1) * self.head)
        return token_time(alpha, m, w, self.tick(m), self.latency(m), self.reaction(schedule))

    def speedup(self, alpha: ArrayLike, schedule: Schedule) -> Array:
        """Return the plain token time divided by that of ``schedule``."""
        return self.latency() / self.token_time(alpha, schedule)


def _check_times(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(name, value, "a finite number, at least 0")
