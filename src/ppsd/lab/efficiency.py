"""How much of the theoretical speedup a pipeline reaches, and where the rest goes.

``measurements`` come from oracle.py; what is here are pure functions of them. Every PPSD request is
compared with the plain request of the same repeat on the same task and workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ppsd.errors import PpsdError
from ppsd.lab.oracle import Variant
from ppsd.lab.runner import PLAIN, Measurement, Results, Spread, pairs, spread

ALPHAS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
GATED = 0.2  # up to this α PPSD runs a second time, with the gate that keeps it from being slower


@dataclass(frozen=True)
class Budget:
    """Where a token's time goes, seconds: the measured time is the sum of all parts.

    ``ideal``: W(α/P + 1 − α), W being the stages' work on a token when each works alone (in plain
    decoding), shared out evenly. The others are losses, taken from the critical path:
    ``imbalance``: work of stages on the path beyond the ideal; ``contention``: how much longer
    that work took than alone (stages working at once, jitter); ``drafting``, ``messages``,
    ``handover`` (Python between two pieces of work on a stage), ``cancel`` (needed work waits for
    stale work to stop) and ``other``: as in timeline.Path.
    """

    ideal: float
    imbalance: float
    contention: float
    drafting: float
    messages: float
    handover: float
    cancel: float
    other: float

    @property
    def total(self) -> float:
        """Return the token time as measured."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class Efficiency:
    """One PPSD request against plain decoding; ``paper`` is ρ* for P equal stages at this α.

    ``model`` is the bound from the stage times measured in the plain request: A / (ατ + (1 − α)A)
    with A the plain token time and τ the slowest stage alone.
    """

    alpha: float
    speedup: float
    paper: float
    model: float

    @property
    def of_paper(self) -> float:
        """Return the measured speedup divided by ρ*."""
        return self.speedup / self.paper

    @property
    def of_model(self) -> float:
        """Return the measured speedup divided by the bound from measured times."""
        return self.speedup / self.model


def variants(alphas: Sequence[float], in_flight: int | None = None) -> list[Variant]:
    """Return plain decoding, PPSD at each α, and with the gate where that may have to pause."""
    fast = [Variant("ppsd", in_flight=in_flight, alpha=alpha) for alpha in alphas]
    gated = [replace(variant, gate=True) for variant in fast if (variant.alpha or 0) <= GATED]
    return [Variant("autoregressive"), *fast, *gated]


def gated_speedups(results: Results, names: Sequence[str]) -> dict[str, Spread]:
    """Return these variants' speedups over plain decoding; α means nothing while they pause."""
    found = {
        name: [plain.token_time / fast.token_time for fast, plain in pairs(results, name, PLAIN)]
        for name in names
    }
    return {name: spread(speedups) for name, speedups in found.items() if speedups}


def alone(plain: Measurement) -> list[float]:
    """Return each stage's mean seconds for a token in plain decoding, where no two work at once."""
    stages = plain.details["stages"]
    if any("1" not in stage for stage in stages):
        raise PpsdError("too few tokens to tell the time of a stage; ask for more")
    return [float(stage["1"]["mean"]) for stage in stages]


def ideal_speedup(alpha: float, stages: int) -> float:
    """Return ρ* = P / (α + (1 − α)P): Eq. 7 of arXiv 2509.19368 for P equal stages (E = N/P)."""
    return stages / (alpha + (1 - alpha) * stages)


def efficiency(fast: Measurement, plain: Measurement) -> Efficiency:
    """Compare one PPSD request with its plain partner."""
    times, alpha = alone(plain), fast.alpha
    bound = plain.token_time / (alpha * max(times) + (1 - alpha) * plain.token_time)
    return Efficiency(
        alpha=alpha,
        speedup=plain.token_time / fast.token_time,
        paper=ideal_speedup(alpha, len(times)),
        model=bound,
    )


def budget(fast: Measurement, plain: Measurement) -> Budget:
    """Return where the time of a PPSD request went, per token."""
    times, path, tokens = alone(plain), fast.details["path"], fast.tokens
    ideal = sum(times) / ideal_speedup(fast.alpha, len(times))
    needed = sum(n * t for n, t in zip(path["blocks"], times, strict=True)) / tokens
    waits = {f.name: path[f.name] / tokens for f in fields(Budget) if f.name in path}
    return Budget(
        ideal=ideal,
        imbalance=needed - ideal,
        contention=sum(path["work"]) / tokens - needed,
        **waits,
    )


@dataclass(frozen=True)
class Row:
    """All repeats of PPSD with one oracle; ``budget`` holds the mean of each part, seconds.

    Means, because only they add up. ``token_time`` is their sum.
    """

    variant: str
    alpha: Spread
    speedup: Spread
    paper: Spread
    model: Spread
    of_paper: Spread
    of_model: Spread
    token_time: float
    budget: dict[str, float]


def summarize(results: Results, names: Sequence[str]) -> list[Row]:
    """Return one row for each of these variants that was measured together with plain decoding."""
    return [row for name in names if (row := _row(results, name)) is not None]


def _row(results: Results, name: str) -> Row | None:
    partners = list(pairs(results, name, PLAIN))
    if not partners:
        return None
    found = [efficiency(fast, plain) for fast, plain in partners]
    budgets = [budget(fast, plain) for fast, plain in partners]
    means = {f.name: _mean([getattr(b, f.name) for b in budgets]) for f in fields(Budget)}
    columns = ("alpha", "speedup", "paper", "model", "of_paper", "of_model")
    return Row(
        variant=name,
        **{column: spread([getattr(e, column) for e in found]) for column in columns},
        token_time=sum(means.values()),
        budget=means,
    )


def plain_summary(results: Results) -> dict[str, Any]:
    """Return token time and stage times of plain decoding: medians over the repeats, seconds."""
    plain = [m for m in results.measurements.values() if m.variant == PLAIN]
    stages = zip(*(alone(m) for m in plain), strict=True)
    return {
        "token_time": asdict(spread([m.token_time for m in plain])),
        "stage_times": [asdict(spread(times)) for times in stages],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
