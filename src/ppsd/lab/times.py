"""The simulator's clock: whole nanoseconds of everything that happens to a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ppsd.plan.model import CostModel
from ppsd.speculation.policy import Judged

NOISE_CHUNK = 4096  # random factors drawn at a time


class Times:
    """Nanoseconds of everything for a block of ``rows`` rows, of which ``judge`` are judged.

    Lists hold one entry for each stage behind the first.
    """

    def __init__(self, cost: CostModel, rows: int, judge: int) -> None:
        later = range(1, cost.size)
        self.first_layer = nanoseconds(cost.layer_time(0, rows))
        self.layers = [nanoseconds(cost.layer_time(k, rows)) for k in later]
        self.lm_head = nanoseconds(cost.lm_head * cost.growth(judge)) if judge else 0
        services = [
            cost.stages[k].layers * self.layers[k - 1] + nanoseconds(cost.overhead) for k in later
        ]
        if services:
            services[-1] += self.lm_head
        hops = [nanoseconds(link.delay(rows * cost.row_bytes)) for link in cost.links[:-1]]
        hops += [nanoseconds(link.delay(0)) for link in cost.links[-1:]]  # a verdict is short
        self.first_hop = hops[0] if hops else 0
        self.later = list(zip(services, hops[1:], strict=False))


class Sent(NamedTuple):
    """A block on its way; ``at`` is when it reaches stage 1 (or is judged, without a stage 1)."""

    at: int
    verdict: Judged
    rows: int
    times: Times


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds, so that equal times are equal."""
    return round(seconds * 1e9)


def noise(sigma: float, seed: int) -> Iterator[float]:
    """Log-normal factors with mean 1."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.lognormal(-(sigma**2) / 2, sigma, NOISE_CHUNK).tolist()
