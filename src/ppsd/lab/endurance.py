"""A long request, and many: what a late token costs beyond its context, and if memory grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError
from ppsd.lab.oracle import WINDOW, Variant
from ppsd.lab.runner import PLAIN, Results, Spread, spread
from ppsd.plan.planner import Exit, Problem, cost_model
from ppsd.plan.profile import Profile
from ppsd.speculation.policy import Schedule
from ppsd.types import SamplingParams

VARIANTS = (Variant("autoregressive"), Variant("ppsd", alpha=1.0))
SETTLED = 10  # requests after which everything has been allocated that ever will be


@dataclass(frozen=True)
class Drift:
    """Seconds per token at both ends of a request, and the ratio that its context explains."""

    variant: str
    first: Spread
    last: Spread
    ratio: Spread
    explained: float

    @property
    def beyond(self) -> float:
        """Return what of the ratio the context does not explain, as a share."""
        return self.ratio.median / self.explained - 1


def drifts(results: Results, explained: Mapping[str, float]) -> list[Drift]:
    """Return one row a variant."""
    return [_drift(results, name, ratio) for name, ratio in explained.items()]


def _drift(results: Results, name: str, explained: float) -> Drift:
    runs = [m for cell, m in results.measurements.items() if cell.variant == name]
    ends = [run.details["ends"] for run in runs]
    if not all(ends):
        raise ConfigError("tokens", runs[0].tokens, f"above {2 * WINDOW}, for two windows")
    first, last = zip(*ends, strict=True)
    return Drift(name, spread(first), spread(last), spread([b / a for a, b in ends]), explained)


def explained(
    profile: Profile,
    bounds: Sequence[int],
    schedules: Mapping[str, Schedule],
    prompt: int,
    new: int,
) -> dict[str, float]:
    """Return the ratio of the last window's token time to the first's that a profile predicts."""
    free = Exit(bounds[1], alpha=1.0, draft=0.0)

    def token_time(context: int, schedule: Schedule) -> float:
        problem = Problem(profile, len(bounds) - 1, context=context)
        return float(cost_model(problem, bounds, free, schedule).token_time(1.0, schedule))

    early, late = prompt + WINDOW // 2, prompt + new - WINDOW // 2
    return {name: token_time(late, s) / token_time(early, s) for name, s in schedules.items()}


def schedules(llm: LLM) -> dict[str, Schedule]:
    """Return the schedule of each variant on this pipeline."""
    return {PLAIN: Schedule(1, 1), VARIANTS[1].name: Schedule(1, llm.layout.stages)}


@dataclass(frozen=True)
class Memory:
    """Resident bytes of each stage's process after each request."""

    resident: list[list[int]]

    @property
    def growth(self) -> list[int]:
        """Return what each process gained between request SETTLED and the last."""
        return [b - a for a, b in zip(self.resident[SETTLED - 1], self.resident[-1], strict=True)]


def check(requests: int) -> None:
    """Raise ConfigError for too few requests to tell growth from what is new at the beginning."""
    if requests <= SETTLED:
        raise ConfigError("requests", requests, f"above {SETTLED}")


def check_tokens(tokens: int) -> None:
    """Raise ConfigError for answers of too few tokens to have two ends."""
    if tokens < 2 * WINDOW:
        raise ConfigError("tokens", tokens, f"at least {2 * WINDOW}, for two windows")


def memory(
    llm: LLM, prompt: Sequence[int], requests: int, done: Callable[[int], None] = lambda n: None
) -> Memory:
    """Run ``requests`` requests of growing length; raises ConfigError for too few of them."""
    check(requests)
    found = psutil.Process()
    processes = [found, *(c for c in found.children() if "ppsd.worker" in c.cmdline())]
    resident = []
    for i in range(requests):
        params = SamplingParams(max_tokens=8 + i % 8, ignore_eos=True)
        llm.generate([*prompt, *prompt[: 1 + i % 7]], params)
        llm.trace.take()
        resident.append([process.memory_info().rss for process in processes])
        done(i + 1)
    return Memory(resident)
