"""Stage workers as processes: what a worker does, and rank 0's hold on its children.

``python -m ppsd.worker`` reads one JSON line from standard input (WorkerConfig) and serves its
stage until that pipe ends. Workers start from that program and not from the caller's script, so
no ``if __name__ == "__main__"`` guard is needed there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
import torch

from ppsd.errors import (
    ModelError,
    PipelineTimeoutError,
    PpsdError,
    ProtocolError,
    StageLostError,
    cause_of,
)
from ppsd.model import kernels
from ppsd.model.exit_head import load_head
from ppsd.model.head_files import check_head
from ppsd.model.head_library import find_head
from ppsd.model.identity import Identity
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import Progress, Stage, StagePlan
from ppsd.model.weights import TensorSource, open_source
from ppsd.transport.base import Endpoint, Geometry
from ppsd.worker.frame import VERSION
from ppsd.worker.inner_head import InnerHead
from ppsd.worker.judge import Judge
from ppsd.worker.link import TransportLink
from ppsd.worker.loop import Worker, failure_status
from ppsd.worker.machine import memory_used, pin
from ppsd.worker.messages import Status, encode
from ppsd.worker.pace import paced
from ppsd.worker.recorder import Recorder

if TYPE_CHECKING:
    from ppsd.transport.rendezvous import Meeting

IDLE_WAIT_S = 1.0  # how long one wait for work lasts; a longer pause just waits again
SIGNS_OF_LIFE_S = 5.0  # rank 0 gives one a second, however short the wait for a stage may be
STDERR_TAIL = 2000  # characters of a dead worker's last words that an error quotes


@dataclass(frozen=True)
class WorkerConfig:
    """All a stage needs to know; travels as JSON.

    ``segment`` is the shared-memory file descriptor, ``master`` (host, port) the torch.distributed
    rendezvous; neither is set under torchrun. ``cores`` are the CPUs to stay on, empty for any.
    ``kernels`` names what has to compute here (Kernels of model/kernels.py); ``library`` is a file
    descriptor of it, which children of rank 0's host inherit. ``own_gpus``: every stage has a GPU
    of its own, so rows travel from GPU to GPU. Times are those of EngineConfig; ``block`` is the
    most rows of a block or wave that is no piece of a prompt, ``loose`` the cells of a slot beyond
    its positions. ``head`` is the directory of an exit head at the stage's end, if any; it takes
    ``head_seconds`` on an emulated device. Workers that rank 0 started do not outlive ``parent``.
    """

    rank: int
    model_path: str
    spec: dict[str, Any]
    fingerprint: str
    first: int
    last: int
    max_context: int
    dtype: str
    device: str
    threads: int
    cores: tuple[int, ...]
    timeout: float
    init_timeout: float
    trace: bool
    geometry: dict[str, int]
    kernels: str
    library: int | None = None
    segment: int | None = None
    master: tuple[str, int] | None = None
    own_gpus: bool = False
    pace: float = 0.0
    block: int = 1
    loose: int = 0
    head: str = ""
    head_seconds: float = 0.0
    parent: int = field(default_factory=os.getpid)
    protocol: int = VERSION

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """Read what ``json.dumps(asdict(config))`` wrote; ProtocolError for another version's."""
        record = json.loads(text)
        if record["protocol"] != VERSION:
            raise ProtocolError(f"rank 0 speaks protocol {record['protocol']}, this rank {VERSION}")
        master = record["master"] and (str(record["master"][0]), int(record["master"][1]))
        return cls(**record | {"cores": tuple(record["cores"]), "master": master})


def open_endpoint(
    config: WorkerConfig,
    check: Callable[[], None] = lambda: None,
    listener: socket.socket | None = None,
) -> Endpoint:
    """Join the transport the configuration names; ``listener`` is rank 0's socket at ``master``.

    ``check`` is called while others are awaited.
    """
    geometry = Geometry(**config.geometry)
    if config.segment is not None:
        from ppsd.transport.shared_memory import SharedMemoryEndpoint

        return SharedMemoryEndpoint(config.segment, geometry, config.rank, bool(config.cores))
    from ppsd.transport.rendezvous import meet

    assert config.master is not None
    join = (config.rank, geometry.size, *config.master, config.init_timeout)
    return endpoint_over(config, meet(*join, check, listener), check)


def endpoint_over(
    config: WorkerConfig, meeting: Meeting, check: Callable[[], None] = lambda: None
) -> Endpoint:
    """Join the ranks that have met; ``check`` is called while others are awaited."""
    from ppsd.transport.distributed import DistributedEndpoint

    return DistributedEndpoint(
        Geometry(**config.geometry),
        meeting,
        max(config.timeout, SIGNS_OF_LIFE_S),
        torch.device(config.device) if config.own_gpus else None,
        join_timeout=config.init_timeout,
        check=check,
    )


def serve_rank(model: str | None, timeout: float) -> None:
    """Serve as a rank above 0 that torchrun started: rank 0 sends the configuration.

    ``model`` is where this host keeps the model. Raises ModelError when it is another model than
    rank 0's, ProtocolError when rank 0 speaks another protocol version; rank 0 is told why.
    """
    from ppsd.transport.rendezvous import meet_from_environment, receive_text, send_text

    meeting = meet_from_environment(timeout)
    try:
        config = _accepted(receive_text(meeting, 0, 2 * timeout), model)
    except Exception as error:  # whatever it is, rank 0 should hear of it
        own = isinstance(error, PpsdError)
        send_text(meeting, 0, str(error) if own else f"{type(error).__name__}: {error}")
        raise
    send_text(meeting, 0, "")
    serve(config, lambda: endpoint_over(config, meeting))


def _accepted(text: str, model: str | None) -> WorkerConfig:
    """Return the configuration that rank 0 sent, for this host's files of the model and head."""
    from ppsd.model.source import describe, resolve_model
    from ppsd.model.weights import fingerprint

    config = WorkerConfig.from_json(text)
    files = resolve_model(model)
    mark = fingerprint(describe(files), open_source(files.path))
    if mark != config.fingerprint:
        raise ModelError(
            f"rank {config.rank} has {files.name} ({mark[:12]}), rank 0 has "
            f"{config.spec['name']} ({config.fingerprint[:12]}); all ranks need the same model"
        )
    if config.head:
        spec, (place, head) = ModelSpec.from_json(config.spec), find_head(config.head)
        identity = Identity.of(spec, open_source(files.path))
        check_head(head, spec, identity, config.last, config.head)
        config = replace(config, head=str(place))
    return replace(config, model_path=str(files.path))


Extend = Callable[[Worker, Stage, Endpoint, WorkerConfig], Any]


def serve(
    config: WorkerConfig,
    join: Callable[[], Endpoint] | None = None,
    extend: Extend | None = None,
) -> None:
    """Load the stage, say ``ready``, and work until told to stop, or until rank 0 says goodbye.

    ``extend`` may put another worker in the usual one's place. An exception is reported to rank 0
    before it is raised here.
    """
    pin(config.cores)
    torch.set_num_threads(config.threads)
    endpoint = join() if join else open_endpoint(config)

    def say(status: Status) -> None:
        endpoint.send(0, encode(status), config.timeout)

    try:
        kernels.use(config.kernels, config.library)
        worker = _load(config, endpoint, say, extend)
        while not worker.stopped:
            worker.step(IDLE_WAIT_S)
    except Exception as error:  # whatever it is, rank 0 should hear of it
        with contextlib.suppress(PpsdError):  # rank 0 may be what failed
            say(failure_status(config.rank, error))
        if not (endpoint.ended and isinstance(error, StageLostError)):
            raise
    finally:
        endpoint.close()


def _load(config: WorkerConfig, endpoint: Endpoint, say: Any, extend: Extend | None) -> Any:
    def progress(done: int, total: int) -> None:
        if done % 8 == 0 or done == total:
            say(Status(config.rank, "progress", {"done": done, "total": total}))

    source = open_source(Path(config.model_path))
    worker, stage = stage_worker(config, endpoint, source, progress)
    about = {
        "pid": os.getpid(),
        "memory": memory_used(),
        "kernels": kernels.name(config.dtype, config.device),
    }
    say(Status(config.rank, "ready", about))
    return worker if extend is None else extend(worker, stage, endpoint, config)


def stage_worker(
    config: WorkerConfig,
    endpoint: Endpoint,
    source: TensorSource,
    progress: Progress = lambda done, total: None,
) -> tuple[Worker, Stage]:
    """Load the stage and any head at its end; return the worker that serves it, and the stage."""
    spec, slots = ModelSpec.from_json(config.spec), config.geometry["slots"]
    plan = StagePlan(
        config.first,
        config.last,
        config.max_context,
        getattr(torch, config.dtype),
        torch.device(config.device),
        packed=True,
        loose=config.loose,
        slots=slots,
    )
    loaded = Stage(spec, plan, source, progress)
    head = None
    if config.head:  # which was checked before any stage began to load
        found = load_head(Path(config.head), spec, plan, source, Identity.of(spec, source))
        head = InnerHead(found, config.head_seconds)
    recorder = Recorder(config.trace)
    stage = paced(loaded, config.pace, config.block, recorder)
    judge = Judge(stage, config.rank, config.max_context, slots) if stage.is_last else None
    link = TransportLink(endpoint, config.timeout)
    return Worker(config.rank, stage, link, judge, recorder, head), loaded


class Supervisor:
    """The worker processes of rank 0: started together, watched, and never left behind.

    Each runs the module ``program``. One that is stopped (SIGSTOP) for ``timeout`` seconds counts
    as lost.
    """

    def __init__(self, timeout: float, program: str = "ppsd.worker") -> None:
        self._timeout = timeout
        self._program = program
        self._children: dict[int, tuple[subprocess.Popen[str], IO[str]]] = {}
        self._stopped: dict[int, float] = {}  # since when a worker was seen stopped
        _supervisors.add(self)

    def start(self, config: WorkerConfig) -> None:
        """Start the worker of ``config.rank``; raises StageLostError when the system cannot."""
        config = replace(config, library=kernels.descriptor(config.kernels))
        shared = [file for file in (config.segment, config.library) if file is not None]
        try:
            output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
            child = subprocess.Popen(
                # -P: nothing from the caller's directory
                [sys.executable, "-P", "-m", self._program],
                stdin=subprocess.PIPE,
                stdout=output,  # standard output is for answers
                stderr=output,
                text=True,
                pass_fds=shared,
                env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
                process_group=0,  # Ctrl-C is rank 0's to handle
            )
        except OSError as error:
            raise StageLostError(
                f"stage {config.rank} cannot be started: {cause_of(error)}"
            ) from error
        self._children[config.rank] = (child, output)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # gone already; check() tells why
            child.stdin.write(json.dumps(asdict(config)) + "\n")
            child.stdin.flush()

    def check(self) -> None:
        """Raise StageLostError naming a worker that is no longer running.

        One that a signal killed is named first: others may have left because it was gone.
        """
        codes = {rank: child.poll() for rank, (child, _) in self._children.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if ended:
            rank = min(ended, key=lambda rank: (ended[rank] >= 0, rank))
            child, output = self._children[rank]
            output.seek(0)
            raise StageLostError(
                f"stage {rank} (pid {child.pid}) {_ending(ended[rank])}"
                f"{_quote(output.read()[-STDERR_TAIL:])}"
            )
        self._check_stopped()

    def _check_stopped(self) -> None:
        """Raise PipelineTimeoutError naming a worker that has been stopped for too long."""
        now = time.monotonic()
        for rank, (child, _) in self._children.items():
            if not _is_stopped(child.pid):
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > self._timeout:
                raise PipelineTimeoutError(
                    f"stage {rank} (pid {child.pid}) has been stopped for {self._timeout:g} s; "
                    f"stage {rank} does not answer"
                )

    def pids(self) -> dict[int, int]:
        """Return the process ids by rank."""
        return {rank: child.pid for rank, (child, _) in self._children.items()}

    def forget(self) -> None:
        """Let go of the workers without a word, as a forked child has to: they are its parent's."""
        for child, _ in self._children.values():
            with contextlib.suppress(OSError):  # closed, or its reader gone
                assert child.stdin is not None
                child.stdin.close()  # while a copy is open, they would not notice the parent's end
        self._children.clear()

    def close(self, grace: float) -> None:
        """End the workers' standard input, so that they leave; kill those left after ``grace`` s.

        That takes milliseconds; only a worker that is stopped or swapped out needs to be killed.
        """
        for child, _ in self._children.values():
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has left already
                child.stdin.close()
        deadline = time.monotonic() + grace
        for child, output in self._children.values():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            output.close()
        self._children.clear()


_supervisors: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def _forget_in_child() -> None:
    for supervisor in _supervisors:
        supervisor.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it has just ended
        return False


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exited with code {code}"


def _quote(text: str) -> str:
    return f"; its last words:\n{text.strip()}" if text.strip() else ""
