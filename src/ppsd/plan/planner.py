"""Where to cut, where to exit, which schedule: every way priced by the cost model, best first.

Decides for ``ppsd plan`` and ``--plan auto``. Plain floats, no torch.

For each exit layer only splits on the Pareto front of (slowest stage, whole way) can be best,
because the token time of every schedule grows with both (theory.token_time). For a given limit on
the slowest stage, the whole way is shortest when the fastest workers are filled up first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise

from ppsd.errors import ConfigError
from ppsd.plan.model import CostModel, Link, StageCost
from ppsd.plan.profile import Profile
from ppsd.speculation.policy import DEFAULT_BLOCK, Schedule

LARGEST_BLOCK = 8
MAX_IN_FLIGHT = 64
TYPICAL_CONTEXT = 256  # positions already cached, unless a problem says otherwise
ASSUMED_ALPHA = 0.5  # of a trained head whose acceptance nobody measured
LOOKUP_ALPHA = 0.2  # to cut by: what prompt lookup alone brings depends on the text
UNKNOWN = "unknown"
UNTRAINED_ALPHA = 0.05  # of the model's own norm and LM head; 4 to 10 % were measured
MESSAGE_BYTES = 72  # header and token id of a block of one row
LEAST_GAIN = 1.02  # predictions are off by about as much: what promises less does not pay
RELATIVE_TIE = 1e-9  # token times closer than this are equal
SPARE = 0.05  # of a tick in which the round trip may stay unfilled


@dataclass(frozen=True)
class Exit:
    """A head that could draft: where, how often it is right, what it costs.

    ``draft``: seconds a draft on the profile's machine; ``weights``: numbers it holds; ``name``:
    its directory, or empty for one that is only imagined; ``origin``: how ``alpha`` is known.
    """

    layer: int
    alpha: float
    draft: float
    weights: int = 0
    name: str = ""
    origin: str = "given"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError("alpha", self.alpha, "a rate in [0, 1]")


@dataclass(frozen=True)
class Problem:
    """A model, some workers, and what is already decided.

    ``speeds`` are the workers' relative to the profile's machine, in pipeline order (empty: all
    1); ``links`` lead from each worker to the next and from the last to the first (empty: all as
    profiled). ``split``, ``exit_layer``, ``mode``, ``block`` and ``in_flight`` are kept when given.
    ``at_once``: how many workers can compute at the same time (None: all of them).
    ``bitwise``: only schedules whose output equals plain decoding's bit for bit (m = 1), unless
    the mode or block asks for others.
    """

    profile: Profile
    workers: int
    exits: tuple[Exit, ...] = ()
    speeds: tuple[float, ...] = ()
    links: tuple[Link, ...] = ()
    context: int = TYPICAL_CONTEXT
    split: tuple[int, ...] | None = None
    exit_layer: int | None = None
    mode: str | None = None
    block: int | None = None
    in_flight: int | None = None
    at_once: int | None = None
    bitwise: bool = False

    def __post_init__(self) -> None:
        layers, workers = self.profile.sizes.layers, self.workers
        if not 1 <= workers <= layers:
            raise ConfigError("stages", workers, f"an integer in [1, {layers}]")
        if len(self.speeds) not in (0, workers) or not all(0 < s < math.inf for s in self.speeds):
            raise ConfigError("worker_speed", self.speeds, f"{workers} numbers above 0")
        if len(self.links) not in (0, workers):
            raise ConfigError("link_ms", len(self.links), f"one hop, or {workers}, one a worker")
        if self.split is not None:
            self._check_split(self.split)
        exits = (None, *range(1, layers - workers + 2))
        if isinstance(self.exit_layer, bool) or self.exit_layer not in exits:
            allowed = f"an integer in [1, {layers - workers + 1}]"
            raise ConfigError("exit_layer", self.exit_layer, allowed)

    def _check_split(self, split: tuple[int, ...]) -> None:
        if len(split) != self.workers - 1:
            allowed = f"{self.workers - 1} layers, one for each stage but the first"
            raise ConfigError("split", split, allowed)
        check_split(split, self.profile.sizes.layers)
        if split and self.exit_layer not in (None, split[0]):
            allowed = f"the end of stage 0, {split[0]} in this split"
            raise ConfigError("exit_layer", self.exit_layer, allowed)

    def speed(self, rank: int) -> float:
        """Return a worker's speed relative to the profile's machine."""
        return self.speeds[rank] if self.speeds else 1.0


@dataclass(frozen=True)
class Plan:
    """One way to run the pipeline, and what it is predicted to cost; times in seconds.

    ``plain_time`` is the token time of plain decoding on the same workers, cut in the way that
    suits it best unless the split is decided. ``exit`` is None in plain decoding.
    """

    mode: str
    schedule: Schedule
    bounds: tuple[int, ...]
    exit: Exit | None
    cost: CostModel
    token_time: float
    plain_time: float

    @property
    def speedup(self) -> float:
        """Predict speed relative to plain decoding."""
        return self.plain_time / self.token_time

    @property
    def pays(self) -> bool:
        """Return True if speculation promises more than predictions may be wrong."""
        return self.speedup >= LEAST_GAIN

    def speedup_at(self, alpha: float) -> float:
        """Predict speed relative to plain decoding if α were ``alpha``; at 1 it is the bound."""
        return self.plain_time / float(self.cost.token_time(alpha, self.schedule))

    @property
    def stage_times(self) -> tuple[float, ...]:
        """Return the seconds each stage is busy with a block, stage 0's drafts included."""
        rows = self.schedule.block
        times = [self.cost.stage_time(k, rows) for k in range(self.cost.size)]
        drafts = rows if self.schedule.in_flight > 1 else rows - 1
        return (times[0] + drafts * self.cost.head, *times[1:])

    @property
    def bottleneck(self) -> int:
        """Return the stage that takes longest."""
        return max(range(self.cost.size), key=self.stage_times.__getitem__)

    @property
    def bitwise(self) -> bool:
        """Return True if rows travel one by one, so that all logits equal plain decoding's."""
        return self.schedule.block == 1


def check_split(split: Sequence[int], layers: int) -> tuple[int, ...]:
    """Return the bounds [0, …, N] of a split; ConfigError unless it ascends within the model."""
    bounds = (0, *split, layers)
    if any(a >= b for a, b in pairwise(bounds)):
        raise ConfigError("split", tuple(split), f"ascending layers in [1, {layers - 1}]")
    return bounds


def cost_model(
    problem: Problem, bounds: Sequence[int], exit_: Exit | None, schedule: Schedule
) -> CostModel:
    """Price a split; where blocks overlap, co-located workers slow each other down."""
    if schedule.in_flight == 1:
        return _price(problem, bounds, exit_, schedule, 1.0)
    contended = max(1.0, problem.profile.contention.median)
    cost = _price(problem, bounds, exit_, schedule, contended)
    return cost if problem.at_once is None else replace(cost, at_once=problem.at_once)


def _price(
    problem: Problem,
    bounds: Sequence[int],
    exit_: Exit | None,
    schedule: Schedule,
    slower: float,
) -> CostModel:
    """Return the cost of a split when all work takes ``slower`` times as long as alone."""
    profile, last = problem.profile, len(bounds) - 2
    layer = profile.layer_time(problem.context) * slower
    stages = [
        StageCost(b - a, layer / problem.speed(k)) for k, (a, b) in enumerate(pairwise(bounds))
    ]
    entry = profile.entry.median / problem.speed(0) / stages[0].layers
    stages[0] = StageCost(stages[0].layers, stages[0].layer + entry)
    rows = schedule.block
    hops = problem.links or (profile.link,) * len(stages)
    return CostModel(
        stages=tuple(stages),
        links=hops if last else (),
        head=exit_.draft * slower / problem.speed(0) if exit_ else 0.0,
        lm_head=profile.lm_head_time(rows) / profile.growth(rows) * slower / problem.speed(last),
        row_cost=max(0.0, profile.growth(rows) - 1) / (rows - 1) if rows > 1 else 0.0,
        row_bytes=profile.sizes.hidden * profile.itemsize + MESSAGE_BYTES,
        overhead=profile.overhead.median,
        cancel=0.0 if profile.transport == "shared-memory" else hops[0].latency,
        source=profile.source,
    )


def alternatives(problem: Problem, *, every_split: bool = False) -> list[Plan]:
    """Return all candidates with predictions, fastest first: each exit with each schedule.

    Each comes with its best split or, with ``every_split``, once with each split there is (their
    number grows fast with the workers). Plain decoding is among them unless the mode excludes it.
    """
    find = _all_splits if every_split else _front
    plain = Schedule(1, 1)
    free = replace(problem, exit_layer=None)  # plain decoding has no exit that could bind its cut
    plain_time = min(_plan(free, bounds, None, plain).token_time for bounds in _front(free, None))
    found = []
    if _plain_allowed(problem):
        found = [_plan(problem, bounds, None, plain) for bounds in find(problem, None)]
    for exit_ in problem.exits if problem.workers > 1 else ():
        for bounds in find(problem, exit_):
            found += [_plan(problem, bounds, exit_, s) for s in _schedules(problem, bounds, exit_)]
    if not every_split:
        found = _best_splits(found)
    priced = [replace(plan, plain_time=plain_time) for plan in found]
    return sorted(priced, key=lambda p: (round(p.token_time / plain_time, 9), *_preference(p)))


def plain_cost(problem: Problem, schedule: Schedule) -> CostModel:
    """Return what the cut that suits plain decoding costs where ``schedule`` says what overlaps."""
    problem = replace(problem, exit_layer=None)
    found = [cost_model(problem, bounds, None, schedule) for bounds in _front(problem, None)]
    return min(found, key=CostModel.latency if schedule.in_flight == 1 else CostModel.tick)


def choose(problem: Problem) -> Plan:
    """Return the best plan; ConfigError when nothing suits what is already decided."""
    found = alternatives(problem)
    if not found:
        exits = sorted({e.layer for e in problem.exits})
        allowed = f"one that the split and the heads at exits {exits} allow"
        raise ConfigError("mode", problem.mode or "auto", allowed)
    return found[0]


def _preference(plan: Plan) -> tuple[int, float, tuple[int, ...]]:
    """Prefer among equals the smaller block, the more even split, the earlier cut."""
    return plan.schedule.block, max(plan.stage_times), plan.bounds


def _best_splits(plans: Iterable[Plan]) -> list[Plan]:
    """Return the best split for each exit, mode and block."""
    best: dict[tuple[Exit | None, str, int], Plan] = {}
    for plan in plans:
        key = (plan.exit, plan.mode, plan.schedule.block)
        if key not in best or _rank(plan) < _rank(best[key]):
            best[key] = plan
    return list(best.values())


def _rank(plan: Plan) -> tuple[float, float, tuple[int, ...]]:
    return float(f"{plan.token_time:.9g}"), max(plan.stage_times), plan.bounds


def _plan(
    problem: Problem, bounds: tuple[int, ...], exit_: Exit | None, schedule: Schedule
) -> Plan:
    cost = cost_model(problem, bounds, exit_, schedule)
    time = float(cost.token_time(exit_.alpha if exit_ else 0.0, schedule))
    return Plan(_mode(schedule), schedule, bounds, exit_, cost, time, time)


def _mode(schedule: Schedule) -> str:
    if not schedule.drafts:
        return "autoregressive"
    return "ppsd" if schedule.in_flight > 1 else "draft-then-verify"


def _plain_allowed(problem: Problem) -> bool:
    decided = (problem.block or 1, problem.in_flight or 1)
    return problem.mode in (None, "autoregressive") and decided == (1, 1)


def _schedules(problem: Problem, bounds: tuple[int, ...], exit_: Exit) -> Iterator[Schedule]:
    """Yield the schedules that draft and agree with what is decided."""
    mode, window = problem.mode, problem.in_flight
    if mode in (None, "ppsd") and window != 1:
        for block in _overlapped_blocks(problem):
            yield Schedule(block, window or _window(problem, bounds, exit_, block))
    if mode == "draft-then-verify" or (mode is None and window in (None, 1)):
        for block in _single_blocks(problem):
            yield Schedule(block, window or 1)
    if mode == "ppsd" and window == 1:
        yield Schedule(problem.block or 1, 1)


def _overlapped_blocks(problem: Problem) -> Iterable[int]:
    if problem.block is not None:
        return (problem.block,)
    return (1,) if problem.bitwise or problem.mode == "ppsd" else range(1, DEFAULT_BLOCK + 1)


def _single_blocks(problem: Problem) -> Iterable[int]:
    if problem.block is not None:
        return (problem.block,) if problem.block > 1 or problem.mode else ()
    return () if problem.bitwise and problem.mode is None else range(2, LARGEST_BLOCK + 1)


def _window(problem: Problem, bounds: tuple[int, ...], exit_: Exit, block: int) -> int:
    """Return ⌈A/τ⌉ blocks to fill the round trip where hops are slow; P as in the paper otherwise.

    One block more for less than SPARE of a tick would cost more in work thrown away.
    """
    cost = cost_model(problem, bounds, exit_, Schedule(block, 2))
    needed = math.ceil(cost.latency(block) / cost.tick(block) - SPARE)
    return min(MAX_IN_FLIGHT, max(problem.workers, needed))


def _fixed_first(problem: Problem, exit_: Exit | None) -> tuple[int, ...] | None:
    """Return how many layers stage 0 may have; None when the exit contradicts what is decided."""
    layers, workers = problem.profile.sizes.layers, problem.workers
    latest = layers - workers + 1
    decided = problem.split[0] if problem.split else problem.exit_layer
    if exit_ is None:
        return tuple(range(1, latest + 1)) if decided is None else (decided,)
    suits = exit_.layer <= latest and decided in (None, exit_.layer)
    return (exit_.layer,) if suits else None


def _all_splits(problem: Problem, exit_: Exit | None) -> Iterator[tuple[int, ...]]:
    layers, workers = problem.profile.sizes.layers, problem.workers
    firsts = _fixed_first(problem, exit_)
    if firsts is None:
        return
    if problem.split is not None or workers == 1:
        yield (0, *(problem.split or ()), layers)
        return
    for first in firsts:
        for cuts in combinations(range(first + 1, layers), workers - 2):
            yield (0, first, *cuts, layers)


def _front(problem: Problem, exit_: Exit | None) -> Iterator[tuple[int, ...]]:
    """Yield splits, none better than another in both the slowest stage and the whole way."""
    if problem.split is not None or problem.workers <= 2:
        yield from _all_splits(problem, exit_)
        return
    for first in _fixed_first(problem, exit_) or ():
        yield from _front_behind(problem, exit_, first)


def _front_behind(problem: Problem, exit_: Exit | None, first: int) -> Iterator[tuple[int, ...]]:
    """Yield the front for a given stage 0."""
    layers, later = problem.profile.sizes.layers, range(1, problem.workers)
    layer = problem.profile.layer_time(problem.context)
    each = [layer / problem.speed(k) for k in later]
    fixed = [0.0] * len(each)
    fixed[-1] = problem.profile.lm_head_time() / problem.speed(problem.workers - 1)
    rest = layers - first
    most = rest - len(each) + 1  # every stage keeps a layer
    stage_0 = (first * layer + (exit_.draft if exit_ else 0.0)) / problem.speed(0)
    limits = {fixed[k] + n * each[k] for k in range(len(each)) for n in range(1, most + 1)}
    shortest = math.inf
    for limit in sorted({max(limit, stage_0) for limit in limits}):
        counts = _fill(rest, each, fixed, limit)
        if counts is None:
            continue
        way = sum(n * cost for n, cost in zip(counts, each, strict=True))
        if way < shortest * (1 - RELATIVE_TIE):
            shortest = way
            yield tuple(accumulate((0, first, *counts)))


def _fill(
    layers: int, each: Sequence[float], fixed: Sequence[float], limit: float
) -> list[int] | None:
    """Fill stages with layers, so none takes longer than ``limit``: the fastest get the most."""
    slack = limit * (1 + RELATIVE_TIE)
    most = [math.floor((slack - f) / cost) for cost, f in zip(each, fixed, strict=True)]
    if min(most) < 1 or sum(most) < layers:
        return None
    counts = [1] * len(each)
    left = layers - len(each)
    for k in sorted(range(len(each)), key=each.__getitem__):
        more = min(left, most[k] - 1)
        counts[k] += more
        left -= more
    return counts
