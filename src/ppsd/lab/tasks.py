"""Real prompts, real heads: plain decoding, PPSD and its rivals on the same workers.

Variants take turns on every task (runner.py), so the machine's drift meets all alike.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ppsd.engine.llm import LLM, Completion
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.rivals.decoders import Decoded
from ppsd.lab.rivals.rivals import NAMES, Rivals
from ppsd.lab.runner import PLAIN, Cell, Measurement, Results, Spread, spread
from ppsd.measure.workload import Task
from ppsd.speculation.policy import MAX_ROWS
from ppsd.types import SamplingParams

PPSD, DRAFTING, RIVAL = "ppsd", "draft-then-verify", "rival"
ROWS, GAMMA = f"{PPSD} rows=", f"{DRAFTING} γ="
MAX_GAMMA = 63  # a block holds γ drafts and the token before them


@dataclass(frozen=True)
class Variant:
    """A way to decode: mode, block and rows, as ``LLM.use`` takes them, or a rival's name."""

    name: str
    mode: str
    block: int | None = None
    rows: int = 1


def variants(gammas: Sequence[int], rows: Sequence[int] = ()) -> list[Variant]:
    """Return plain decoding, PPSD, and draft-then-verify with each draft length.

    With ``rows``, PPSD with each number of them.
    """
    for count in rows:
        if not 1 <= count <= MAX_ROWS:
            raise ConfigError("rows", count, f"rows in [1, {MAX_ROWS}]")
    for gamma in gammas:
        if not 1 <= gamma <= MAX_GAMMA:
            raise ConfigError("gamma", gamma, f"draft lengths in [1, {MAX_GAMMA}]")
    drafting = [Variant(f"{GAMMA}{g}", DRAFTING, g + 1) for g in gammas]
    trees = [Variant(f"{ROWS}{n}", "ppsd", rows=n) for n in rows]
    return [Variant(PLAIN, "autoregressive"), *(trees or [Variant(PPSD, "ppsd")]), *drafting]


def named(names: Sequence[str], gammas: Sequence[int], rows: Sequence[int] = ()) -> list[Variant]:
    """Return variants by name; plain decoding, which all are compared with, comes first anyhow.

    ``ppsd`` stands for PPSD with each number of ``rows``, ``draft-then-verify`` for that with each
    of ``gammas``. Raises ConfigError for an unknown name.
    """
    plain, *own = variants(gammas, rows)
    chosen = {PLAIN: plain}
    for name in names:
        if name in NAMES:
            found = [Variant(name, RIVAL)]
        elif name.startswith((ROWS, GAMMA)):
            found = [_numbered(name)]
        else:
            found = [v for v in (plain, *own) if name in (v.name, v.name.split(" ")[0])]
        if not found:
            kinds = ", ".join((PLAIN, PPSD, DRAFTING, *NAMES))
            raise ConfigError("variants", name, f"names of {kinds}, {ROWS}R and {GAMMA}N")
        chosen |= {variant.name: variant for variant in found}
    return list(chosen.values())


def _numbered(name: str) -> Variant:
    """Return the variant of a name that ends in its rows or its draft length."""
    kind, _, text = name.rpartition("=")
    if not text.isdecimal():
        raise ConfigError("variants", name, f"with a number behind {kind}=")
    number = [int(text)]
    return variants(number)[-1] if name.startswith(GAMMA) else variants((), number)[-1]


class TaskBench:
    """Measures variants on tasks; every task's prompt is checked before anything is timed."""

    def __init__(
        self,
        llm: LLM,
        chosen: Sequence[Variant],
        tasks: Sequence[Task],
        params: Mapping[str, SamplingParams],
    ) -> None:
        self._llm = llm
        self._variants = {variant.name: variant for variant in chosen}
        self._prompts = {task.id: _encode(llm, task) for task in tasks}
        self._params = params
        rivals = any(variant.mode == RIVAL for variant in chosen)
        self._rivals = Rivals(llm) if rivals else None

    def measure(self, cell: Cell) -> Measurement:
        """Decode one task (``id @ setting``) in one variant."""
        task, _, setting = cell.task.rpartition(" @ ")
        variant = self._variants[cell.variant]
        if self._rivals is not None and variant.mode == RIVAL:
            found = self._rivals.run(variant.name, self._prompts[task], self._params[setting])
            return rival_measurement(cell, found)
        self._llm.use(variant.mode, variant.block, rows=variant.rows)
        completion = self._llm.run(self._prompts[task], self._params[setting])
        return measurement(cell, completion)


def measurement(cell: Cell, completion: Completion) -> Measurement:
    """Return what a completion cost, with a digest of its text to compare variants by."""
    stats = completion.stats
    return Measurement(
        *cell,
        tokens=len(completion.token_ids) - 1,
        seconds=stats.decode_seconds,
        first_seconds=stats.prefill_seconds,
        counts=asdict(stats.counts),
        hits="".join("01"[accepted] for accepted in completion.accepted),
        details={"output": digest(completion.token_ids)},
    )


def rival_measurement(cell: Cell, found: Decoded) -> Measurement:
    """Return the same of a rival's completion."""
    return Measurement(
        *cell,
        tokens=len(found.tokens) - 1,
        seconds=found.seconds,
        first_seconds=found.first_seconds,
        counts=found.counts,
        hits="".join("01"[accepted] for accepted in found.accepted),
        details={"output": digest(found.tokens), "rounds": found.rounds},
    )


def digest(tokens: Sequence[int]) -> str:
    """Digest a sequence of token ids into sixteen hexadecimal digits."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


def _encode(llm: LLM, task: Task) -> list[int]:
    try:
        return llm.encode(task.messages)
    except PpsdError as error:
        raise PpsdError(f"task {task.id}: {error}") from error


@dataclass(frozen=True)
class Summary:
    """One variant on one group of tasks; speeds in tokens a second, over all repeats.

    ``ratio`` is the quotient of the mean speeds of variant and plain decoding (Spec-Bench's),
    ``total_ratio`` that of all tokens over all time, ``paired`` the spread of the quotients task by
    task. ``per_device`` is the total speed over the number of stages. ``differing`` counts outputs
    that are not those of plain decoding (what has none differs in none), ``judged`` to ``rows`` are
    sums; rivals do not count rows. ``reliability`` tells of waves, by tenths of the probability
    that a draft had by the heads, how many were judged and how many of them were right.
    """

    variant: str
    group: str
    tasks: int
    speed: float
    ratio: float
    total_ratio: float
    paired: Spread
    per_device: float
    alpha: float | None
    judged: int
    discarded: int
    resyncs: int
    rows: int
    differing: int
    reliability: list[tuple[int, int]]


def summarize(results: Results, groups: Mapping[str, Sequence[str]], stages: int) -> list[Summary]:
    """Summarise each variant on each group of task names, as far as it and plain were measured."""
    names = list(dict.fromkeys(cell.variant for cell in results.measurements))
    found = (
        _summary(results, name, group, set(tasks), stages)
        for group, tasks in groups.items()
        for name in names
    )
    return [summary for summary in found if summary is not None]


def _summary(
    results: Results, variant: str, group: str, tasks: set[str], stages: int
) -> Summary | None:
    both = [
        (m, p)
        for cell, m in results.measurements.items()
        if cell.variant == variant
        and cell.task in tasks
        and (p := results.measurements.get(cell._replace(variant=PLAIN))) is not None
        and min(m.tokens, p.tokens) > 0
    ]
    if not both:
        return None
    own, plain = [m for m, _ in both], [p for _, p in both]
    judged, accepted, discarded, resyncs = (
        sum(m.counts[name] for m in own) for name in ("judged", "accepted", "discarded", "resyncs")
    )
    return Summary(
        variant=variant,
        group=group,
        tasks=len({m.task for m in own}),
        speed=_total_speed(own),
        ratio=_mean_speed(own) / _mean_speed(plain),
        total_ratio=_total_speed(own) / _total_speed(plain),
        paired=spread([p.token_time / m.token_time for m, p in both]),
        per_device=_total_speed(own) / stages,
        alpha=accepted / judged if judged else None,
        judged=judged,
        discarded=discarded,
        resyncs=resyncs,
        rows=sum(m.counts.get("rows", 0) for m in own),
        differing=sum(m.details["output"] not in (None, p.details["output"]) for m, p in both),
        reliability=list(zip(*(_sums(own, name) for name in ("stated", "right")), strict=True)),
    )


def _sums(measurements: Sequence[Measurement], name: str) -> list[int]:
    """Return the sums of lists of counts, number by number; nothing where there are none."""
    lists = [m.counts.get(name, ()) for m in measurements]
    return [sum(column) for column in zip(*lists, strict=True)]


def _mean_speed(measurements: Sequence[Measurement]) -> float:
    return statistics.fmean(m.tokens / m.seconds for m in measurements)


def _total_speed(measurements: Sequence[Measurement]) -> float:
    return sum(m.tokens for m in measurements) / sum(m.seconds for m in measurements)
