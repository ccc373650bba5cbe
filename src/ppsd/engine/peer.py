"""What is measured, and a worker process with the same layers at the other end of a transport.

For profiler.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ppsd.errors import ConfigError, PipelineTimeoutError, StageFailedError
from ppsd.model import kernels
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan
from ppsd.model.weights import TensorSource, codes_digest
from ppsd.plan.profile import profile_path
from ppsd.transport.base import Endpoint, Geometry, part_bytes
from ppsd.types import SamplingParams
from ppsd.worker.frame import frame_bytes
from ppsd.worker.messages import (
    Begin,
    Block,
    Control,
    Message,
    Status,
    Verdict,
    decode,
    encode,
)
from ppsd.worker.process import Supervisor, WorkerConfig, open_endpoint

CONTEXTS = (0, 128, 512, 1024, 2048)  # cached positions at which one row is timed
ROWS = (1, 2, 4, 8)  # rows of a block, timed at ROWS_CONTEXT
STAGE_BYTES = 1 << 30  # so many bytes of layers are loaded: more than caches hold, less than memory
WAIT_S = 60.0  # for the worker
POLL_S = 0.05
BULK_ROWS = 128  # of the large message that tells the bandwidth
STALE, CURRENT = 1, 2  # epochs: a stale block is carried but not worked on


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
    def dtype_name(self) -> str:
        """Return the dtype as users write it."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def codes(self) -> str:
        """Return which weights decoding reads in the codes of their file; empty if none."""
        packed = kernels.kind(self.dtype_name) == "packed"
        return codes_digest(self.spec, self.source) if packed else ""

    @property
    def place(self) -> Path:
        """Return where this machine keeps the profile."""
        return profile_path(self.fingerprint, self.dtype_name, self.threads, self.codes)

    @property
    def plan(self) -> StagePlan:
        """Return the last layers of the model, as many as STAGE_BYTES hold, without the first."""
        spec = self.spec
        fitting = STAGE_BYTES // (spec.layer_parameters * self.dtype.itemsize)
        first = max(1, spec.num_layers - max(2, fitting))
        context = min(spec.max_context, max(CONTEXTS) + max(ROWS))
        cpu = torch.device("cpu")
        return StagePlan(first, spec.num_layers, context, self.dtype, cpu, packed=True)


class Peer:
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
        endpoint.publish(0, CURRENT)

    @staticmethod
    def _block(subject: Subject, epoch: int, rows: int) -> Block:
        hidden = torch.randn(rows, subject.spec.hidden_size).to(subject.dtype)
        return Block(0, epoch, 0, -1, 1, (0,) * rows, hidden)

    def feed(self, *, bulk: bool = False) -> int:
        """Send a block of one row, after a large stale one if asked; when that began, in ns."""
        start = time.monotonic_ns()
        if bulk:
            self._send(self._large)
        self._send(self._small)
        return start

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
def worker(subject: Subject) -> Iterator[Peer]:
    """Start a worker that measures with; it is gone afterwards."""
    rows = frame_bytes(BULK_ROWS, subject.spec.hidden_size, subject.dtype)
    geometry = Geometry(2, rows, frame_bytes(1, subject.spec.vocab_size, subject.dtype), 8)
    supervisor = Supervisor(WAIT_S)
    with ExitStack() as cleanup:
        cleanup.callback(supervisor.close, 1.0)
        endpoint = _connect(subject, geometry, supervisor, cleanup)
        cleanup.callback(endpoint.close)
        yield Peer(endpoint, supervisor.check, subject)


def _connect(
    subject: Subject, geometry: Geometry, supervisor: Supervisor, cleanup: ExitStack
) -> Endpoint:
    if subject.transport == "shared-memory":
        from ppsd.transport.shared_memory import create_segment

        segment = create_segment(geometry)
        cleanup.callback(os.close, segment)
        supervisor.start(_config(subject, 1, geometry, segment=segment))
        return open_endpoint(_config(subject, 0, geometry, segment=segment))
    from ppsd.transport.rendezvous import listen

    with listen() as listener:
        master = listener.getsockname()
        supervisor.start(_config(subject, 1, geometry, master=master))
        own = _config(subject, 0, geometry, master=master)
        return open_endpoint(own, supervisor.check, listener)


def _config(subject: Subject, rank: int, geometry: Geometry, **join: Any) -> WorkerConfig:
    plan, dtype = subject.plan, str(subject.dtype).removeprefix("torch.")
    return WorkerConfig(
        rank=rank,
        model_path=str(subject.path),
        spec=subject.spec.to_json(),
        fingerprint=subject.fingerprint,
        first=plan.first,
        last=plan.last,
        max_context=plan.max_context,
        dtype=dtype,
        device="cpu",
        threads=subject.threads,
        cores=subject.cores[rank],
        timeout=WAIT_S,
        init_timeout=WAIT_S,
        trace=True,
        geometry=asdict(geometry),
        kernels=kernels.name(dtype),
        **join,
    )
