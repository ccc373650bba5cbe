"""Measure a profile on this machine: a model's parts in this process, a link to a real worker.

The only module of cost/ that imports torch. What is timed is the code that decoding runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppsd.cost.profile import HeadTime, LayerTime, Profile, RowsTime, Timing
from ppsd.cost.sizes import Sizes
from ppsd.errors import ConfigError, PipelineTimeoutError, StageFailedError
from ppsd.model import kernels
from ppsd.model.exit_head import ExitHead, HeadConfig, head_tensor_shapes
from ppsd.model.packed import first_rows
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.weights import TensorSource
from ppsd.speculation.lookup import likeliest
from ppsd.speculation.sampling import Sampler
from ppsd.transport.base import Endpoint, Geometry, part_bytes
from ppsd.types import SamplingParams
from ppsd.worker.messages import (
    Begin,
    Block,
    Control,
    Message,
    Status,
    Verdict,
    decode,
    encode,
    frame_bytes,
)
from ppsd.worker.process import Supervisor, WorkerConfig, open_endpoint, pin

CONTEXTS = (0, 128, 512, 1024, 2048)  # cached positions at which one row is timed
ROWS = (1, 2, 4, 8)  # rows of a block, timed at ROWS_CONTEXT
ROWS_CONTEXT = 128
HEAD_LAYERS = (0, 1, 2)
DRAFT_VOCABULARY = 8192
STAGE_BYTES = 1 << 30  # so many bytes of layers are loaded: more than caches hold, less than memory
REPEATS, LEAST_REPEATS = 15, 5
PINGS = 30
BUDGET_S = 60.0  # then LEAST_REPEATS have to do
WAIT_S = 60.0  # for the worker
POLL_S = 0.05
BULK_ROWS = 128  # of the large message that tells the bandwidth
STALE, CURRENT = 1, 2  # epochs: a stale block is carried but not worked on

Progress = Callable[[int, int], None]  # steps done, steps in all
Case = Callable[[], object]
Key = tuple[str, int, int]  # of a case
PASS = ("layer", 0, 1)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model on disk, and how a stage of it would run.

    ``cores`` are the CPUs of the measuring process and of the worker, empty when there are too few.
    """

    path: Path
    spec: ModelSpec
    source: TensorSource
    fingerprint: str
    dtype: torch.dtype
    threads: int
    cores: tuple[tuple[int, ...], ...]
    transport: str = "shared-memory"

    def __post_init__(self) -> None:
        if self.transport not in ("shared-memory", "distributed"):
            allowed = "shared-memory or distributed: a profile needs a second process"
            raise ConfigError("transport", self.transport, allowed)

    @property
    def plan(self) -> StagePlan:
        """The last layers of the model, as many as STAGE_BYTES hold; not the first (token ids)."""
        spec = self.spec
        fitting = STAGE_BYTES // (spec.layer_parameters * self.dtype.itemsize)
        first = max(1, spec.num_layers - max(2, fitting))
        context = min(spec.max_context, max(CONTEXTS) + max(ROWS))
        cpu = torch.device("cpu")
        return StagePlan(first, spec.num_layers, context, self.dtype, cpu, packed=True)


Take = Callable[[Mapping[str, Any], Progress], Profile]  # with this provenance


@contextmanager
def profiler(subject: Subject) -> Iterator[Take]:
    """Load the layers, here and in a worker, and yield what measures profile after profile.

    Each takes under two minutes for a model of 135 M on an idle core. Raises what loading a model
    raises, and PipelineError when the worker fails.
    """
    with torch.inference_mode():
        stage = Stage(subject.spec, subject.plan, subject.source)
        cases = _cases(stage, subject)
    with _worker(subject) as peer:
        yield partial(_take, subject, cases, peer)


@torch.inference_mode()
def _take(
    subject: Subject,
    cases: Mapping[Key, Case],
    peer: _Peer,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Profile:
    steps = len(cases) * (REPEATS + 1)  # one round to warm up

    def after(done: int) -> Callable[[int], None]:
        return lambda more: progress(done + more, steps + 2 * PINGS)

    with _placed(subject):
        times = _rounds(cases, after(0))
        latency, overhead, bandwidth = _link(peer, cases[PASS], after(steps))
        contention = _contention(peer, cases[PASS], after(steps + PINGS))
    layers = subject.plan.last - subject.plan.first
    return Profile(
        model=subject.spec.name,
        fingerprint=subject.fingerprint,
        sizes=Sizes.of(subject.spec),
        dtype=str(subject.dtype).removeprefix("torch."),
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
        embedding=Timing.of(times["embedding", 0, 0]),
        latency=latency,
        bandwidth=bandwidth,
        overhead=overhead,
        contention=contention,
        kernels=kernels.kind(str(subject.dtype).removeprefix("torch.")),
        provenance=dict(provenance),
    )


def _cases(stage: Stage, subject: Subject) -> dict[Key, Case]:
    """What is timed, by part and its two numbers (context and rows; layers and vocabulary)."""
    spec, room = subject.spec, subject.plan.max_context - max(ROWS)
    at = min(ROWS_CONTEXT, room)
    table = torch.zeros(spec.vocab_size, spec.hidden_size, dtype=subject.dtype)
    sampler = Sampler(SamplingParams(), 1, frozenset(), spec.vocab_size)
    history, ids = torch.zeros(at + 1, dtype=torch.int64), torch.arange(spec.vocab_size)
    hidden = torch.randn(max(ROWS), spec.hidden_size).to(subject.dtype)

    def layers(context: int, rows: int) -> Case:
        def run() -> None:
            stage.cache.advance(0, context)  # rows of zeros cost what any rows cost
            stage.forward(hidden[:rows], context)

        return run

    def lm_head(rows: int) -> Case:
        return lambda: [sampler.choose(row, history) for row in stage.logits(hidden[:rows])]

    def draft(head: ExitHead) -> Case:
        def run() -> None:
            head.cache.advance(0, at)
            scores = head.scores(head.finish(head.forward(hidden[:1], at)))[0]
            likeliest(scores.float().numpy(), ids[: len(scores)].numpy(), None)

        return run

    contexts = sorted({min(context, room) for context in CONTEXTS} | {at})
    cases: dict[Key, Case] = {("layer", c, 1): layers(c, 1) for c in contexts}
    cases |= {("layer", at, rows): layers(at, rows) for rows in ROWS}
    cases |= {("lm_head", rows, 0): lm_head(rows) for rows in ROWS}
    cases["embedding", 0, 0] = lambda: table.index_select(0, ids[:1])
    for depth in HEAD_LAYERS:
        for scored in sorted({min(DRAFT_VOCABULARY, spec.vocab_size), spec.vocab_size}):
            cases["head", depth, scored] = draft(_head(stage, subject, depth, scored))
    return cases


def _head(stage: Stage, subject: Subject, layers: int, scored: int) -> ExitHead:
    """A head of random weights: they cost what trained ones cost."""
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


def _rounds(cases: Mapping[Key, Case], progress: Callable[[int], None]) -> dict[Key, list[float]]:
    """Time all cases in turn, over and over; what follows layers in decoding follows them here."""
    times: dict[Key, list[float]] = {key: [] for key in cases}
    end = time.monotonic() + BUDGET_S
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


class _Peer:
    """A worker process with the same layers, and the messages to and from it."""

    def __init__(self, endpoint: Endpoint, check: Callable[[], None], subject: Subject) -> None:
        self._endpoint = endpoint
        self._check = check
        self._small = self._block(subject, CURRENT, 1)
        self._large = self._block(subject, STALE, BULK_ROWS)
        self.bulk_bytes = sum(map(part_bytes, encode(self._large)))
        self._expect(Status, "ready")
        vocabulary = subject.spec.vocab_size
        self._send(Begin(0, SamplingParams(), 1, (), vocabulary))
        endpoint.publish(CURRENT)

    @staticmethod
    def _block(subject: Subject, epoch: int, rows: int) -> Block:
        hidden = torch.randn(rows, subject.spec.hidden_size).to(subject.dtype)
        return Block(0, epoch, 0, -1, 1, (0,) * rows, hidden)

    def feed(self, *, bulk: bool = False) -> tuple[int, int]:
        """Send a block of one row, after a large stale one if asked; start and end in ns."""
        start = time.monotonic_ns()
        if bulk:
            self._send(self._large)
        self._send(self._small)
        return start, time.monotonic_ns()

    def answer(self) -> int:
        """Wait for a verdict; when it had been read, in ns."""
        self._expect(Verdict)
        return time.monotonic_ns()

    def slices(self) -> list[tuple[int, int]]:
        """Start and end, in ns, of every block worked on since the last call."""
        self._send(Control("report"))
        found: list[Any] = []
        while True:
            fields = self._expect(Status, "report").fields
            found += fields["slices"]
            if fields["last"]:
                return [(start, end) for start, end, *_ in found]

    def _send(self, message: Message) -> None:
        self._endpoint.send(1, encode(message), WAIT_S)

    def _expect(self, kind: type, of: str | None = None) -> Any:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            received = self._endpoint.receive(POLL_S)
            if received is None:
                self._check()
                continue
            message = decode(received[1], self._endpoint.rows)
            if isinstance(message, Status) and message.kind == "failed":
                fields = message.fields
                raise StageFailedError(fields["message"], fields["traceback"])
            if isinstance(message, kind) and getattr(message, "kind", None) == of:
                return message
        raise PipelineTimeoutError(f"the measuring worker did not answer for {WAIT_S:g} s")


@contextmanager
def _worker(subject: Subject) -> Iterator[_Peer]:
    """Start the worker; it is gone afterwards."""
    rows = frame_bytes(BULK_ROWS, subject.spec.hidden_size, subject.dtype)
    geometry = Geometry(2, rows, frame_bytes(1, subject.spec.vocab_size, subject.dtype), 8)
    supervisor = Supervisor()
    with ExitStack() as cleanup:
        cleanup.callback(supervisor.close, 1.0)
        endpoint = _connect(subject, geometry, supervisor, cleanup)
        cleanup.callback(endpoint.close)
        yield _Peer(endpoint, supervisor.check, subject)


def _connect(
    subject: Subject, geometry: Geometry, supervisor: Supervisor, cleanup: ExitStack
) -> Endpoint:
    if subject.transport == "shared-memory":
        from ppsd.transport.shared_memory import create_segment

        segment = create_segment(geometry)
        cleanup.callback(os.close, segment)
        supervisor.start(_config(subject, 1, geometry, segment=segment))
        return open_endpoint(_config(subject, 0, geometry, segment=segment))
    from ppsd.transport.rendezvous import free_port, leave_group

    cleanup.callback(leave_group)
    master = ("127.0.0.1", free_port())
    supervisor.start(_config(subject, 1, geometry, master=master))
    return open_endpoint(_config(subject, 0, geometry, master=master), supervisor.check)


def _config(subject: Subject, rank: int, geometry: Geometry, **join: Any) -> WorkerConfig:
    plan = subject.plan
    return WorkerConfig(
        rank=rank,
        model_path=str(subject.path),
        spec=subject.spec.to_json(),
        fingerprint=subject.fingerprint,
        first=plan.first,
        last=plan.last,
        max_context=plan.max_context,
        dtype=str(subject.dtype).removeprefix("torch."),
        device="cpu",
        threads=subject.threads,
        cores=subject.cores[rank],
        timeout=WAIT_S,
        init_timeout=WAIT_S,
        trace=True,
        geometry=asdict(geometry),
        **join,
    )


def _link(
    peer: _Peer, forward: Case, progress: Callable[[int], None]
) -> tuple[Timing, Timing, float]:
    """Latency and the sender's overhead in seconds, bandwidth in bytes a second.

    Both sides compute between messages, as stages do. All processes of a host share the clock, so
    each direction is timed by itself: from before a message is laid out until the receiver begins
    to work on it, and back.
    """
    sent: list[tuple[int, int, int]] = []
    peer.slices()
    for i in range(2 * PINGS):
        forward()
        start, end = peer.feed(bulk=bool(i % 2))
        sent.append((start, end, peer.answer()))
        progress(i // 2 + 1)
    there, back, sending = [], [], []
    for (start, end, answered), (begun, done) in zip(sent, peer.slices(), strict=True):
        there.append((begun - start) / 1e9)
        back.append((answered - done) / 1e9)
        sending.append((end - start) / 1e9)
    small = [(a + b) / 2 - s for a, b, s in zip(there[::2], back[::2], sending[::2], strict=True)]
    longer = statistics.median(b - a for a, b in zip(there[::2], there[1::2], strict=True))
    latency = Timing.of([max(0.0, value) for value in small])
    return latency, Timing.of(sending[::2]), peer.bulk_bytes / max(longer, 1e-6)


def _contention(peer: _Peer, forward: Case, progress: Callable[[int], None]) -> Timing:
    """How many times as long the layers take while the worker runs the same on its own core."""

    def timed() -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    ratios = []
    for i in range(PINGS):
        alone = timed()
        for _ in range(2):  # the second keeps it busy to the end
            peer.feed()
        ratios.append(timed() / alone)
        for _ in range(2):
            peer.answer()
        progress(i + 1)
    return Timing.of(ratios)
