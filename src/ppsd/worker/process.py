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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ppsd.errors import ModelError, PpsdError, ProtocolError, StageLostError
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.weights import open_source
from ppsd.transport.base import Endpoint, Geometry
from ppsd.worker.judge import Judge
from ppsd.worker.loop import Worker, failure_status
from ppsd.worker.messages import VERSION, Status, encode
from ppsd.worker.pace import paced
from ppsd.worker.recorder import Recorder

IDLE_WAIT_S = 1.0  # how long one wait for work lasts; a longer pause just waits again
SIGNS_OF_LIFE_S = 5.0  # rank 0 gives one a second, however short the wait for a stage may be
STDERR_TAIL = 2000  # characters of a dead worker's last words that an error quotes


@dataclass(frozen=True)
class WorkerConfig:
    """All a stage needs to know; travels as JSON.

    ``segment`` is the shared-memory file descriptor, ``master`` (host, port) the torch.distributed
    rendezvous; neither is set under torchrun. ``cores`` are the CPUs to stay on, empty for any.
    ``own_gpus``: every stage has a GPU of its own, so rows travel from GPU to GPU. Times are those
    of EngineConfig; ``block`` is the most rows of a block that is no piece of a prompt.
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
    segment: int | None = None
    master: tuple[str, int] | None = None
    own_gpus: bool = False
    pace: float = 0.0
    block: int = 1
    protocol: int = VERSION

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """Read what ``json.dumps(asdict(config))`` wrote."""
        record = json.loads(text)
        master = record["master"] and (str(record["master"][0]), int(record["master"][1]))
        return cls(**record | {"cores": tuple(record["cores"]), "master": master})


def memory_peak() -> int:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pin(cores: Sequence[int]) -> None:
    """Keep the calling thread, and those it starts, on ``cores``; nothing where unsupported."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def open_endpoint(config: WorkerConfig, check: Callable[[], None] = lambda: None) -> Endpoint:
    """Join the transport the configuration names; ``check`` is called while others are awaited."""
    geometry = Geometry(**config.geometry)
    if config.segment is not None:
        from ppsd.transport.shared_memory import SharedMemoryEndpoint

        return SharedMemoryEndpoint(config.segment, geometry, config.rank, bool(config.cores))
    from ppsd.transport.distributed import DistributedEndpoint
    from ppsd.transport.rendezvous import init_group, listening_with

    join, patience = config.init_timeout, max(config.timeout, SIGNS_OF_LIFE_S)
    with listening_with(config.master[0] if config.master else os.environ["MASTER_ADDR"]):
        if config.master is not None:
            init_group(config.rank, geometry.size, *config.master, join, check)
        apart = torch.device(config.device) if config.own_gpus else None
        return DistributedEndpoint(geometry, config.rank, patience, apart, join_timeout=join)


def serve_rank(model: str | None, timeout: float) -> None:
    """Serve as a rank above 0 that torchrun started: rank 0 sends the configuration.

    ``model`` is where this host keeps the model. Raises ModelError when it is another model than
    rank 0's, ProtocolError when rank 0 speaks another protocol version.
    """
    from ppsd.model.source import describe, resolve_model
    from ppsd.model.weights import fingerprint
    from ppsd.transport.rendezvous import init_group_from_environment, receive_text

    init_group_from_environment(timeout)
    config = WorkerConfig.from_json(receive_text(0))
    if config.protocol != VERSION:
        raise ProtocolError(f"rank 0 speaks protocol {config.protocol}, this rank {VERSION}")
    files = resolve_model(model)
    mark = fingerprint(describe(files), open_source(files.path))
    if mark != config.fingerprint:
        raise ModelError(
            f"rank {config.rank} has {files.name} ({mark[:12]}), rank 0 has "
            f"{config.spec['name']} ({config.fingerprint[:12]}); all ranks need the same model"
        )
    serve(replace(config, model_path=str(files.path)))


def serve(config: WorkerConfig) -> None:
    """Load the stage, say ``ready``, and work until told to stop.

    An exception is reported to rank 0 before it is raised here.
    """
    pin(config.cores)
    torch.set_num_threads(config.threads)
    endpoint = open_endpoint(config)

    def say(status: Status) -> None:
        endpoint.send(0, encode(status), config.timeout)

    try:
        worker = _load(config, endpoint, say)
        while not worker.stopped:
            worker.step(IDLE_WAIT_S)
    except Exception as error:  # whatever it is, rank 0 should hear of it; it is raised again
        with contextlib.suppress(PpsdError):  # rank 0 may be what failed
            say(failure_status(config.rank, error))
        raise
    finally:
        endpoint.close()


def _load(config: WorkerConfig, endpoint: Endpoint, say: Any) -> Worker:
    def progress(done: int, total: int) -> None:
        if done % 8 == 0 or done == total:
            say(Status(config.rank, "progress", {"done": done, "total": total}))

    spec = ModelSpec.from_json(config.spec)
    plan = StagePlan(
        config.first,
        config.last,
        config.max_context,
        getattr(torch, config.dtype),
        torch.device(config.device),
        packed=True,
    )
    loaded = Stage(spec, plan, open_source(Path(config.model_path)), progress)
    recorder = Recorder(config.trace)
    stage = paced(loaded, config.pace, config.block, recorder)
    judge = Judge(stage, config.rank, config.max_context) if stage.is_last else None
    say(Status(config.rank, "ready", {"pid": os.getpid(), "memory_peak": memory_peak()}))
    return Worker(config.rank, stage, endpoint, judge, timeout=config.timeout, recorder=recorder)


class Supervisor:
    """The worker processes of rank 0: started together, watched, and never left behind."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[subprocess.Popen[str], IO[str]]] = {}

    def start(self, config: WorkerConfig) -> None:
        """Start the worker of ``config.rank``; raises StageLostError when the system cannot."""
        try:
            output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "ppsd.worker",
                ],  # -P: nothing from the caller's directory
                stdin=subprocess.PIPE,
                stdout=output,  # standard output is for answers
                stderr=output,
                text=True,
                pass_fds=() if config.segment is None else (config.segment,),
                env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
                process_group=0,  # Ctrl-C is rank 0's to handle
            )
        except OSError as error:
            raise StageLostError(f"stage {config.rank} cannot be started: {error}") from error
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

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: child.pid for rank, (child, _) in self._children.items()}

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


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exited with code {code}"


def _quote(text: str) -> str:
    return f"; its last words:\n{text.strip()}" if text.strip() else ""
