"""Measure a profile on this machine: a model's parts in this process, a link to a real worker.

What is timed is the code that decoding runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ppsd.engine.peer import CONTEXTS, CURRENT, ROWS, Peer, Subject, worker
from ppsd.model import kernels
from ppsd.model.exit_head import ExitHead, head_tensor_shapes
from ppsd.model.head_files import HeadConfig
from ppsd.model.packed import first_rows
from ppsd.model.stage import Stage
from ppsd.plan.profile import HeadTime, LayerTime, Profile, RowsTime, Timing
from ppsd.plan.sizes import Sizes
from ppsd.speculation.gate import Gate
from ppsd.speculation.lookup import ODDS
from ppsd.speculation.policy import Drafted, Judged, Policy, Schedule
from ppsd.types import SamplingParams
from ppsd.worker.judge import Judge, require_finite
from ppsd.worker.machine import pin
from ppsd.worker.messages import Begin, Block

ROWS_CONTEXT = 128
HEAD_LAYERS = (0, 1, 2)
DRAFT_VOCABULARY = 8192
REPEATS, LEAST_REPEATS = 15, 5
PINGS = 30
BUDGET_S = 60.0

Progress = Callable[[int, int], None]  # steps done, steps in all
Case = Callable[[], object]
Key = tuple[str, int, int]  # of a case
PASS = ("layer", 0, 1)
Take = Callable[[Mapping[str, Any], Progress], Profile]  # with this provenance


@contextmanager
def profiler(subject: Subject, budget: float = BUDGET_S) -> Iterator[Take]:
    """Load the layers, here and in a worker, and yield what measures profile after profile.

    Each takes under two minutes for a model of 135 M on an idle core. After ``budget`` seconds
    LEAST_REPEATS have to do. Raises what loading a model raises, and PipelineError when the worker
    fails.
    """
    with torch.inference_mode():
        stage = Stage(subject.spec, subject.plan, subject.source)
        cases = _cases(stage, subject)
    with worker(subject) as peer:
        yield partial(_take, subject, cases, peer, budget)


@torch.inference_mode()
def _take(
    subject: Subject,
    cases: Mapping[Key, Case],
    peer: Peer,
    budget: float,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Profile:
    steps = len(cases) * (REPEATS + 1)  # one round to warm up

    def after(done: int) -> Callable[[int], None]:
        return lambda more: progress(done + more, steps + 2 * PINGS)

    with _placed(subject):
        times = _rounds(cases, budget, after(0))
        contention, overhead = _busy(peer, cases[PASS], after(steps))
        latency, bandwidth = _link(peer, cases[PASS], overhead.median, after(steps + PINGS))
    layers = subject.plan.last - subject.plan.first
    return Profile(
        model=subject.spec.name,
        fingerprint=subject.fingerprint,
        sizes=Sizes.of(subject.spec),
        dtype=subject.dtype_name,
        itemsize=subject.dtype.itemsize,
        threads=subject.threads,
        transport=subject.transport,
        source="measured profile",
        measured=True,
        layer=tuple(
            LayerTime(key[1], key[2], Timing.of([t / layers for t in times[key]]))
            for key in times
            if key[0] == "layer"
        ),
        lm_head=tuple(RowsTime(k[1], Timing.of(times[k])) for k in times if k[0] == "lm_head"),
        heads=tuple(HeadTime(k[1], k[2], Timing.of(times[k])) for k in times if k[0] == "head"),
        entry=Timing.of(times["entry", 0, 0]),
        latency=latency,
        bandwidth=bandwidth,
        overhead=overhead,
        contention=contention,
        kernels=kernels.kind(subject.dtype_name),
        codes=subject.codes,
        provenance=dict(provenance),
    )


def _cases(stage: Stage, subject: Subject) -> dict[Key, Case]:
    """Return the timed cases by part and two numbers (context, rows; layers, vocabulary)."""
    spec, room = subject.spec, subject.plan.max_context - max(ROWS)
    at = min(ROWS_CONTEXT, room)
    hidden = torch.randn(max(ROWS), spec.hidden_size).to(subject.dtype)
    judge = Judge(stage, 1, subject.plan.max_context)
    judge.begin(Begin(0, SamplingParams(), 1, (), spec.vocab_size))

    def layers(context: int, rows: int) -> Case:
        def run() -> None:
            stage.cache.advance(0, context)  # rows of zeros cost what any rows cost
            stage.forward(hidden[:rows], context)

        return run

    def lm_head(rows: int) -> Case:
        block = Block(0, CURRENT, at, at - 1, rows, (0,) * rows, hidden[:rows])

        def run() -> None:
            require_finite(block.hidden, 1, at)
            judge.verdict(block, block.hidden)

        return run

    def draft(head: ExitHead) -> Case:
        def run() -> None:
            head.cache.advance(0, at)
            scores = head.scores(head.finish(head.forward(hidden[:1], at)), 0)
            head.likeliest(scores, None, ODDS, 0)

        return run

    contexts = sorted({min(context, room) for context in CONTEXTS} | {at})
    cases: dict[Key, Case] = {("layer", c, 1): layers(c, 1) for c in contexts}
    cases |= {("layer", at, rows): layers(at, rows) for rows in ROWS}
    cases |= {("lm_head", rows, 0): lm_head(rows) for rows in ROWS}
    cases["entry", 0, 0] = _entry(torch.zeros(spec.vocab_size, spec.hidden_size).to(subject.dtype))
    for depth in HEAD_LAYERS:
        for scored in sorted({min(DRAFT_VOCABULARY, spec.vocab_size), spec.vocab_size}):
            cases["head", depth, scored] = draft(_head(stage, subject, depth, scored))
    return cases


def _entry(table: torch.Tensor) -> Case:
    """Return rank 0's work for a token beside layers and messages: decide, look up, check."""
    schedule = Schedule(1, 2)
    gate, policy = Gate(schedule), Policy(schedule, max_tokens=sys.maxsize, stop_ids=frozenset())
    policy.start([0])
    gate.begin(policy, time.monotonic())

    def run() -> None:
        position = policy.committed
        policy.on(Drafted(policy.epoch, position, 0))
        policy.on(Judged(policy.epoch, position - 1, position, (0,), 1))
        gate.watch(policy, time.monotonic())
        require_finite(table.index_select(0, torch.zeros(1, dtype=torch.int64)), 0, position)

    return run


def _head(stage: Stage, subject: Subject, layers: int, scored: int) -> ExitHead:
    """Return a head of random weights: they cost what trained ones cost."""
    spec, table = subject.spec, stage.lm_head
    assert table is not None
    kind = "transformer" if layers else "norm"
    subset = None if scored == spec.vocab_size else scored
    config = HeadConfig(kind, spec.num_layers, layers, subset, spec.name, subject.fingerprint)
    weights = {n: 0.02 * torch.randn(s) for n, s in head_tensor_shapes(config, spec).items()}
    if subset is not None:
        weights["draft_ids"] = torch.arange(scored)
        table = first_rows(table, scored)
    return ExitHead(config, spec, subject.plan, weights, table)


def _rounds(
    cases: Mapping[Key, Case], budget: float, progress: Callable[[int], None]
) -> dict[Key, list[float]]:
    """Time all cases in turn, over and over; what follows layers in decoding follows them here."""
    times: dict[Key, list[float]] = {key: [] for key in cases}
    end = time.monotonic() + budget
    for repeat in range(-1, REPEATS):  # the first round only warms up
        if repeat >= LEAST_REPEATS and time.monotonic() > end:
            break
        for i, (key, case) in enumerate(cases.items()):
            if key[0] != PASS[0]:
                cases[PASS]()
            start = time.perf_counter()
            case()
            if repeat >= 0:
                times[key].append(time.perf_counter() - start)
            progress((repeat + 1) * len(cases) + i + 1)
    return times


@contextmanager
def _placed(subject: Subject) -> Iterator[None]:
    """Run on the cores and threads of stage 0; put both back afterwards."""
    with ExitStack() as before:
        before.callback(torch.set_num_threads, torch.get_num_threads())
        if hasattr(os, "sched_getaffinity"):
            before.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        torch.set_num_threads(subject.threads)
        pin(subject.cores[0])
        yield


def _link(
    peer: Peer, forward: Case, overhead: float, progress: Callable[[int], None]
) -> tuple[Timing, float]:
    """Measure latency in seconds beside a stage's ``overhead``, and bandwidth in bytes a second.

    Both sides compute between messages, as stages do. All processes of a host share the clock, so
    each direction is timed by itself: from before a message is laid out until the receiver begins
    to work on it, and back.
    """
    sent: list[tuple[int, int]] = []
    peer.slices()
    for i in range(2 * PINGS):
        forward()
        sent.append((peer.feed(bulk=bool(i % 2)), peer.answer()))
        progress(i // 2 + 1)
    there, back = [], []
    for (start, answered), (begun, done) in zip(sent, peer.slices(), strict=True):
        there.append((begun - start) / 1e9)
        back.append((answered - done) / 1e9)
    small = [(a + b) / 2 - overhead for a, b in zip(there[::2], back[::2], strict=True)]
    longer = statistics.median(b - a for a, b in zip(there[::2], there[1::2], strict=True))
    return Timing.of([max(0.0, value) for value in small]), peer.bulk_bytes / max(longer, 1e-6)


def _busy(peer: Peer, forward: Case, progress: Callable[[int], None]) -> tuple[Timing, Timing]:
    """Measure contention, and overhead: what both stages need while both work.

    How many times as long the layers take here, and seconds from the end of one block in the
    worker to the start of the next, which waits already.
    """

    def timed() -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    ratios = []
    peer.slices()
    for i in range(PINGS):
        alone = timed()
        for _ in range(2):  # the second keeps it busy to the end
            peer.feed()
        ratios.append(timed() / alone)
        for _ in range(2):
            peer.answer()
        progress(i + 1)
    slices = peer.slices()
    between = [(b[0] - a[1]) / 1e9 for a, b in zip(slices[::2], slices[1::2], strict=True)]
    return Timing.of(ratios), Timing.of(between)
