"""Faults planted in worker processes from outside, and workers that start in milliseconds.

``ForkedWorker`` stands in for subprocess.Popen: a real process with its own memory, signals and
exit code, but forked from a parent that has imported PyTorch already.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

import ppsd.worker.__main__ as worker_program
from ppsd.cli import app
from ppsd.errors import ModelError
from ppsd.model.passes import Pass
from ppsd.model.stage import Stage
from tests.support.passes import ChangedPass

PATIENCE = 5.0  # seconds: what a fault may take until nothing is left of it
ENDING = 0.1  # seconds: what a thread may take to end once its program has


def die(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return result


def spin(result: Any) -> Any:
    while True:
        pass


def slow(result: Any) -> Any:
    time.sleep(0.05)
    return result


def fail(result: Any) -> Any:
    raise ValueError("planted")


def refuse(result: Any) -> Any:
    raise ModelError("planted.safetensors: tensor x is missing")


def nan(result: Any) -> Any:
    return None if result is None else result * float("nan")


def infinity(result: Any) -> Any:
    return None if result is None else torch.full_like(result, float("inf"))


def plant(first_layer: int, moment: str, act: str) -> None:
    """Let the stage that begins at ``first_layer`` ``act`` in this process, at every ``moment``."""
    if moment == "load":
        load = Stage._load

        def loading(stage: Stage, name: str) -> Any:
            loaded = load(stage, name)
            return globals()[act](loaded) if stage.plan.first == first_layer else loaded

        Stage._load = loading  # type: ignore[method-assign]  # the fault
        return
    start = Stage.start

    def starting(stage: Stage, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        work = start(stage, inputs, position, slot)
        now = (moment == "prefill") == (position == 0)
        return (
            ChangedPass(work, globals()[act]) if now and stage.plan.first == first_layer else work
        )

    Stage.start = starting  # type: ignore[method-assign]  # the fault


class Forked:
    """What is used of a Popen, for a child that runs ``program`` with these standard files."""

    def __init__(
        self, program: Callable[[], int], *standard: int, keep: Iterable[int] = ()
    ) -> None:
        self.returncode: int | None = None
        _let_threads_end()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(program, standard, keep)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stacks(self) -> str:
        """Return what all threads of the child and of what it has forked are doing."""
        pids = [self.pid, *(child.pid for child in psutil.Process(self.pid).children())]
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
        time.sleep(1.0)
        texts = [Path(f"/proc/{pid}/fd/2").read_text(errors="replace") for pid in pids]
        return "\n".join(f"process {pid}:\n{text}" for pid, text in zip(pids, texts, strict=True))


class ForkedWorker(Forked):
    """Takes a Popen's place in Supervisor; ``sabotage`` runs in the child before its program."""

    sabotage: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, command: list[str], *, stdout: Any, pass_fds: Any, **_: Any) -> None:
        theirs, ours = os.pipe()
        super().__init__(self._work, theirs, stdout.fileno(), stdout.fileno(), keep=pass_fds)
        os.close(theirs)
        self.stdin = os.fdopen(ours, "w")

    def _work(self) -> int:
        os.setpgid(0, 0)
        self.sabotage()
        return worker_program.main()


def forked_cli(arguments: list[str], out: int, err: int) -> Forked:
    """Run the command line in a child of its own process group."""

    def program() -> int:
        os.setpgid(0, 0)
        sys.argv = ["ppsd", *arguments]
        return app.main()

    with open(os.devnull) as nothing:
        return Forked(program, nothing.fileno(), out, err)


def _let_threads_end() -> None:
    """Wait for threads that are joined but still give back what they held, such as native locks.

    A fork would copy the locks and not the threads.
    """
    deadline = time.monotonic() + ENDING
    while psutil.Process().num_threads() > threading.active_count():
        if time.monotonic() > deadline:  # they are native ones that stay
            return
        time.sleep(0.001)


def _be_child(program: Callable[[], int], standard: Sequence[int], keep: Iterable[int]) -> NoReturn:
    code = 1
    try:
        for target, fd in enumerate(standard):
            os.dup2(fd, target)
        faulthandler.register(signal.SIGUSR2, file=2)  # for ``stacks``
        for kept, following in pairwise([2, *sorted(keep), 4096]):
            os.closerange(kept + 1, following)
        streams = (
            open(fd, mode, closefd=False)  # noqa: SIM115 (open as long as the child lives)
            for fd, mode in enumerate("rww")
        )
        sys.stdin, sys.stdout, sys.stderr = streams
        code = program()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # a forked child must never run the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gone(pids: Iterable[int]) -> bool:
    """Whether these processes have ended, or do within PATIENCE; zombies count as ended."""
    deadline = time.monotonic() + PATIENCE
    pids = list(pids)
    while any(map(_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
