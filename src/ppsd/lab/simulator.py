"""The real engine and stage loop on virtual clocks: what they do with stages of given costs.

What is modelled beside the engine's own code is in virtual.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ppsd.engine.engine import Engine
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.links import Links, OwnLinks
from ppsd.engine.sequence import Request
from ppsd.errors import ConfigError
from ppsd.lab.virtual import (
    RIGHT,
    VirtualDrafter,
    VirtualJudge,
    VirtualLink,
    VirtualLinks,
    VirtualPipeline,
    VirtualStage,
)
from ppsd.plan.model import CostModel
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Counts, Emit, Schedule
from ppsd.types import SamplingParams
from ppsd.worker.loop import Worker

TOY_VOCABULARY = 2

Slice = tuple[int, int, str, int, int, int]  # start, end, kind, epoch, position, rows


def acceptance(alpha: ArrayLike, tokens: int, seed: int = 0) -> bytes:
    """Return a byte for each of ``tokens`` positions: 1 if its draft will be right, else 0.

    ``alpha`` is one rate, a rate for each position, or a recorded trace of 0 and 1; a sequence
    shorter than ``tokens`` is repeated. The same positions hit in every schedule with one seed.
    """
    rates = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
    if rates.ndim != 1 or not rates.size or not ((rates >= 0) & (rates <= 1)).all():
        raise ConfigError("alpha", alpha, "a rate, or a sequence of rates, in [0, 1]")
    draws = np.random.default_rng(seed).random(tokens)
    return (draws < np.resize(rates, tokens)).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Simulated:
    """What a simulated request cost; times in seconds, lists by stage.

    ``cancelled`` is work that a resync cut short, part of ``busy``. ``slices`` are there when
    tracing, in nanoseconds, for ``engine.trace.TraceLog``.
    """

    tokens: int
    counts: Counts
    seconds: float
    first_token_seconds: float
    busy: list[float]
    cancelled: list[float]
    slices: list[list[Slice]]

    @property
    def token_time(self) -> float:
        """Return the mean seconds per token after the first."""
        return (self.seconds - self.first_token_seconds) / max(1, self.tokens - 1)

    @property
    def idle(self) -> list[float]:
        """Return the seconds each stage did nothing."""
        return [self.seconds - busy for busy in self.busy]

    def reports(self) -> list[dict[str, Any]]:
        """Return the slices as the stages of a real pipeline report them."""
        return [{"slices": lane} for lane in self.slices]


def simulate(
    cost: CostModel,
    schedule: Schedule,
    hits: bytes,
    *,
    prompt_tokens: int = 1,
    prefill_chunk: int = 128,
    jitter: float = 0.0,
    seed: int = 0,
    trace: bool = False,
    gate: Gate | None = None,
) -> Simulated:
    """Decode one request of ``len(hits)`` tokens under ``schedule``, drafts as ``hits`` say.

    ``jitter`` is the σ of a log-normal factor with mean 1 on every pass and draft, drawn from
    ``seed``; ``hits``: see ``acceptance``.
    """
    pipeline = VirtualPipeline(cost, jitter=jitter, seed=seed, trace=trace)
    drafter = VirtualDrafter(pipeline, hits, prompt_tokens)
    stage = FirstStage(VirtualStage(pipeline, 0), drafter, pipeline.recorders[0])
    engine = Engine(
        stage,
        _links(pipeline),
        schedule,
        max_context=prompt_tokens + len(hits) + 1,
        prefill_chunk=prefill_chunk,
        gate=gate,
    )
    return decoded(engine, pipeline, prompt_tokens, len(hits), TOY_VOCABULARY)


def decoded(
    engine: Engine, pipeline: VirtualPipeline, prompt_tokens: int, tokens: int, vocabulary: int
) -> Simulated:
    """Decode one request of ``tokens`` tokens by an engine on a virtual pipeline."""
    params = SamplingParams(max_tokens=tokens)
    prompt = (RIGHT,) * prompt_tokens
    sequence = engine.add(Request(prompt, params, frozenset(), vocabulary))
    clock, first = pipeline.clocks[0], 0
    while engine.busy:
        for _, output in engine.step():
            if isinstance(output, Emit):
                first = first or clock.now
    policy = sequence.policy
    return _simulated(policy.emitted, policy.counts, clock.now, first, pipeline, engine.links)


def _links(pipeline: VirtualPipeline) -> Links:
    judge, size = VirtualJudge(pipeline), pipeline.cost.size
    if size == 1:
        return OwnLinks(judge, pipeline.recorders[0])
    for rank in range(1, size):
        link, recorder = VirtualLink(pipeline, rank), pipeline.recorders[rank]
        last = judge if rank == size - 1 else None
        pipeline.workers.append(Worker(rank, VirtualStage(pipeline, rank), link, last, recorder))
    return VirtualLinks(pipeline)


def _simulated(
    tokens: int,
    counts: Counts,
    end: int,
    first: int,
    pipeline: VirtualPipeline,
    links: Links,
) -> Simulated:
    """Sum up a request that has ended at ``end``; ``first``: when its first token came."""
    reports = [pipeline.recorders[0].take(), *links.report()]
    return Simulated(
        tokens=tokens,
        counts=counts,
        seconds=end / 1e9,
        first_token_seconds=first / 1e9,
        busy=[sum(report["busy_ns"].values()) / 1e9 for report in reports],
        cancelled=[report["busy_ns"].get("cancelled", 0) / 1e9 for report in reports],
        slices=[report.get("slices", []) for report in reports],
    )
