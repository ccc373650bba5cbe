"""What candidate trees bring: the real wave policy, tick by tick, with heads of given rates.

Waves move on together, whenever the slowest stage at work is done; with clocks of their own stages
are simulated in the laboratory (lab/virtual_waves.py). As many waves as stages are under way, so
where hops are slow the next one waits until the verdict of the oldest is back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ppsd.errors import ConfigError
from ppsd.plan.model import CostModel
from ppsd.plan.planner import Plan, Problem, plain_cost
from ppsd.plan.profile import Profile
from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.policy import Judged, Schedule
from ppsd.speculation.tree import CANDIDATES, Cells, Node
from ppsd.speculation.waves import Verified, WavePolicy, choose

LATER = 0.35  # of what a head's first candidates miss, each next one has about so much
TOKENS = 120  # of all requests together, at least
LEAST_TOKENS = 24  # of one of them, on average
SPREAD = 3  # times the average: what no request among others reaches
RIGHT, WRONG = 0, 1  # tokens: the target's own, and the first of those that it never says

PRICED_ROWS = (1, 4, 16)
CUTS = 3  # of the best for chains; trying one takes a second

Fed = list[tuple[WavePolicy, Node]]


class Growth(NamedTuple):
    """How many times as long as one row so many take in a layer or exit head; in the LM head."""

    layer: Callable[[int], float]
    lm_head: Callable[[int], float]

    @classmethod
    def of(cls, profile: Profile) -> Growth:
        """Return what was timed."""
        one = profile.lm_head_time()
        return cls(profile.growth, lambda rows: profile.lm_head_time(rows) / one)


@dataclass(frozen=True)
class WavePlan:
    """What ``rows`` bring on a cut, with later heads or without, over plain decoding."""

    split: tuple[int, ...]
    rows: int
    heads: str
    tokens_per_second: float
    speedup: float


def price(
    problem: Problem, plans: Sequence[Plan], load: int, *, later: bool = True
) -> list[WavePlan]:
    """Return what numbers of rows bring to ``load`` requests together, on the best of some cuts.

    The cuts are those of the first of ``plans`` that are chains. Heads of the problem that fit
    ``later`` boundaries count if they make it faster. Nothing comes back without drafts.
    """
    together = Schedule(1, min(load, 2))  # stages that work at the same time may share cores
    plainly = plain_cost(problem, together)
    plain = wave_token_time(plainly, Growth.of(problem.profile), 0, {}, load)
    chains = [plan for plan in plans if plan.exit and plan.mode == "ppsd" and plan.bitwise]
    tried = [_priced(problem, plan, load, plain, later=later) for plan in chains[:CUTS]]
    return max(tried, key=lambda ways: max(way.speedup for way in ways), default=[])


def fastest(ways: Sequence[WavePlan]) -> WavePlan:
    """Return the fastest way, of equals the one with the fewest rows."""
    return max(ways, key=lambda way: way.speedup)


def _priced(
    problem: Problem, plan: Plan, load: int, plain: float, *, later: bool
) -> list[WavePlan]:
    assert plan.exit is not None
    first = {0: plan.exit.alpha}
    rates: dict[int, float] = {}
    for exit_ in problem.exits:
        rates[exit_.layer] = max(exit_.alpha, rates.get(exit_.layer, 0.0))
    inner = {k: rates[b] for k, b in enumerate(plan.bounds[1:-1]) if later and k and b in rates}
    found = []
    for rows in PRICED_ROWS:
        times = {
            name: wave_token_time(plan.cost, Growth.of(problem.profile), rows, heads, load)
            for name, heads in (("none", first), *([("auto", first | inner)] if inner else []))
        }
        heads = min(times, key=times.__getitem__)
        time = times[heads]
        found.append(WavePlan(plan.bounds[1:-1], rows, heads, 1 / time, plain / time))
    return found


def shares(alpha: float) -> list[float]:
    """Return how often each candidate of a head is right: the first ``alpha``, then LATER ones.

    None is right more often than the one before it. Raises ConfigError for an ``alpha`` that is no
    rate.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError("alpha", alpha, "a rate in [0, 1]")
    found, left = [alpha], 1.0 - alpha
    for _ in range(CANDIDATES - 1):
        found.append(left * min(LATER, alpha))
        left -= found[-1]
    return found


def wave_token_time(
    cost: CostModel,
    growth: Growth,
    rows: int,
    heads: Mapping[int, float],
    load: int = 1,
) -> float:
    """Return the seconds from token to token of ``load`` requests together, all of them under way.

    ``heads`` holds the acceptance rate of the head behind each stage that has one; a head that is
    right more often is right wherever another is. 0 ``rows`` decode plainly.
    """
    return Ticks(cost, growth, rows, heads, load).run()


class Ticks:
    """Requests on their way through a pipeline whose waves move on together."""

    def __init__(
        self,
        cost: CostModel,
        growth: Growth,
        rows: int,
        heads: Mapping[int, float],
        load: int,
    ) -> None:
        self._cost, self._rows = cost, rows
        self._heads = {rank: shares(alpha) for rank, alpha in heads.items()} if rows else {}
        counts = range(1, rows + load + 1)
        self._growth = [growth.layer(n) for n in counts]
        self._lm_head = [cost.lm_head * growth.lm_head(n) for n in counts]
        self._wanted = max(LEAST_TOKENS * load, TOKENS) - load  # after the first of each
        self._tokens = TOKENS if load == 1 else SPREAD * self._wanted // load
        self._luck = [_drawn(slot, self._tokens + 1) for slot in range(load)]
        self._policies = [self._begun(slot) for slot in range(load)]

    def _begun(self, slot: int) -> WavePolicy:
        """Return a request whose prompt is done."""
        cells = Cells(self._tokens + 2, self._cost.size * (self._rows + 1))
        policy = WavePolicy(
            slot,
            self._cost.size,
            max_tokens=self._tokens,
            stop_ids=frozenset(),
            cells=cells,
            lookup=False,
        )
        policy.start((RIGHT,))
        policy.chunk(1)
        policy.on(Judged(policy.epoch, 0, 1, (RIGHT,), self._cost.size - 1))
        return policy

    def run(self) -> float:
        """Decode as many tokens as are wanted; return the mean seconds that one takes."""
        stages: list[Fed] = [[] for _ in range(self._cost.size)]
        arrivals = [0.0] * self._cost.size  # of each stage's wave at the next, or back at rank 0
        seconds, wave, made = 0.0, 1, 0
        while made < self._wanted:
            wave += 1
            costs = self._growth if self._rows else ()
            stages = [choose(self._policies, self._rows, wave, costs), *stages[:-1]]
            alive = [[(p, node) for p, node in fed if _lives(p, node)] for fed in stages]
            begun = [seconds, *arrivals[:-1]]
            arrivals = [0.0] * self._cost.size
            times = [self._time(k, len(fed)) if fed else 0.0 for k, fed in enumerate(alive)]
            for k, fed in enumerate(alive):
                if fed:
                    arrivals[k] = begun[k] + times[k] + self._delay(k, len(fed))
            seconds = max(seconds + max(*times, sum(times) / self._cost.at_once), arrivals[-1])
            for rank in self._heads:
                for policy, node in alive[rank]:
                    self._say(policy, node, rank)
            for policy, node in alive[-1]:
                if node is policy.tree.root:
                    policy.on(Verified((node.id,), (RIGHT,)))
            made = sum(policy.emitted - 1 for policy in self._policies)
        return seconds / made

    def _time(self, rank: int, rows: int) -> float:
        """Return how long a stage is busy with a wave of ``rows`` rows."""
        cost, grown = self._cost, self._growth[rows - 1]
        stage = cost.stages[rank]
        lm_head = self._lm_head[rows - 1] if rank == cost.size - 1 else 0.0
        head = cost.head * grown if rank in self._heads else 0.0
        return stage.layers * stage.layer * grown + lm_head + head + cost.overhead

    def _delay(self, rank: int, rows: int) -> float:
        """Return how long the next stage waits for ``rows`` rows, or rank 0 for their verdicts."""
        if rank == self._cost.size - 1:
            rows = 0
        links = self._cost.links
        return links[rank].delay(rows * self._cost.row_bytes) if links else 0.0

    def _say(self, policy: WavePolicy, node: Node, rank: int) -> None:
        """Let the head behind a stage name candidates, the right one where it has it."""
        chances = self._heads[rank]
        place = bisect_right(list(accumulate(chances)), self._luck[policy.slot][node.position])
        tokens = [RIGHT if i == place else WRONG + i for i in range(CANDIDATES)]
        policy.hear(node.id, rank, tokens, [*chances, *[0.0] * len(LENGTHS)])


def _drawn(seed: int, count: int) -> list[float]:
    """Draw from [0, 1), one out of each of ``count`` equal parts: so few would else be lopsided."""
    places = np.random.default_rng(seed).permutation(count)
    luck: list[float] = ((places + 0.5) / count).tolist()
    return luck


def _lives(policy: WavePolicy, node: Node) -> bool:
    return not policy.finished and node.id in policy.tree.nodes
