"""The command line, interrupted, killed or with a broken worker: exit codes, words, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ppsd.worker import process
from tests.support.faults import Forked, ForkedWorker, forked_cli, gone, plant

ROOT = Path(__file__).parents[2]
PLANTING = """
import json, os, sys
if "ppsd.worker" in sys.orig_argv:
    from tests.support.faults import plant
    plant(*json.loads(os.environ["PLANT"]))
"""
START_UP = 120.0  # seconds within which a busy machine imports PyTorch three times


class Command:
    """``ppsd generate`` on three stages, as a program of its own or forked."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.child: Forked | subprocess.Popen[bytes]
        self._out, self._err = folder / "out", folder / "err"
        settings = "--split 2,4 --raw --dtype float64 -n 400 --ignore-eos"
        settings += f" --head untrained --threads-per-stage 1 --init-timeout {START_UP / 2:g}"
        self._arguments = ["generate", "hello", "-m", str(model), *settings.split()]
        self._folder = folder

    def start(self, *fault: int | str) -> None:
        """Run ``python -m ppsd``, with a fault planted in its workers if one is given."""
        if fault:
            (self._folder / "sitecustomize.py").write_text(PLANTING)
        places = os.pathsep.join(map(str, (self._folder, ROOT / "src", ROOT)))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "ppsd", *self._arguments],
                stdout=out,
                stderr=err,
                env=os.environ | {"PYTHONPATH": places, "PLANT": json.dumps(fault)},
                process_group=0,
            )

    def fork(self, transport: str) -> None:
        """Run the same from here, in milliseconds; needs ``cheap_workers``."""
        arguments = [*self._arguments, "--transport", transport]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.child = forked_cli(arguments, out.fileno(), err.fileno())

    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.child.pid).children()]

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_UP
        while not condition():
            assert self.child.poll() is None, self.words()
            assert time.monotonic() < deadline, self.doing()
            time.sleep(0.01)

    def answering(self) -> bool:
        return self._out.stat().st_size > 0

    def words(self) -> str:
        return self._err.read_text(errors="replace")

    def doing(self) -> str:
        return self.child.stacks() if isinstance(self.child, Forked) else self.words()

    def signal(self, number: int) -> None:
        """Send a signal to the process group, as a terminal does with Ctrl-C."""
        os.killpg(self.child.pid, number)


@pytest.fixture
def command(tmp_path: Path, tiny_model: Callable[[], Path]) -> Iterator[Command]:
    command = Command(tmp_path, tiny_model())
    yield command
    if command.child.poll() is None:
        command.child.kill()


@pytest.fixture
def cheap_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {name: getattr(subprocess, name) for name in ("PIPE", "TimeoutExpired")}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=ForkedWorker, **rest))
    monkeypatch.setattr(ForkedWorker, "sabotage", lambda _: plant(4, "decode", "slow"))


def interrupted(command: Command) -> None:
    """Press Ctrl-C; insist on 130, on silence, and on the workers' end."""
    workers = command.workers()
    command.signal(signal.SIGINT)
    assert command.child.wait(START_UP) == 130, command.words()
    assert "Traceback" not in command.words()
    assert "Interrupt" not in command.words()
    assert gone(workers)


def test_ctrl_c_while_loading(command: Command) -> None:
    command.start(4, "load", "slow")
    command.wait_until(lambda: len(command.workers()) == 2)
    interrupted(command)


def test_sigterm_while_loading(command: Command) -> None:
    command.start()  # its workers import PyTorch, which takes seconds
    command.wait_until(lambda: len(command.workers()) == 2)
    workers = command.workers()
    command.signal(signal.SIGTERM)
    assert command.child.wait(START_UP) == -signal.SIGTERM
    assert "Traceback" not in command.words()
    assert gone(workers)


@pytest.mark.usefixtures("cheap_workers")
@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_ctrl_c_while_decoding(command: Command, transport: str) -> None:
    command.fork(transport)
    command.wait_until(command.answering)
    interrupted(command)


def killed(command: Command) -> None:
    """Kill the parent with -9 while it answers; insist on the workers' end."""
    command.wait_until(command.answering)
    workers = command.workers()
    assert len(workers) == 2
    command.child.kill()
    assert command.child.wait(START_UP) == -signal.SIGKILL
    assert gone(workers)


def test_the_parent_is_killed(command: Command) -> None:
    command.start(4, "decode", "slow")
    killed(command)


@pytest.mark.usefixtures("cheap_workers")
def test_the_parent_of_ranks_is_killed(command: Command) -> None:
    command.fork("distributed")
    killed(command)


@pytest.mark.usefixtures("cheap_workers")
@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_a_worker_is_killed(command: Command, transport: str) -> None:
    command.fork(transport)
    command.wait_until(command.answering)
    workers = command.workers()
    os.kill(workers[0], signal.SIGKILL)
    assert command.child.wait(START_UP) == 1
    end = f"ppsd: stage 1 (pid {workers[0]}) was killed by signal 9 (Killed)\n"
    assert command.words().endswith(end)
    assert "Traceback" not in command.words()
    assert gone(workers)


def test_a_workers_traceback_reaches_the_user(command: Command) -> None:
    command.start(2, "decode", "fail")
    assert command.child.wait(START_UP) == 1
    sentence, _, rest = command.words().partition("ppsd: ")[2].partition("\n")
    assert sentence == "stage 1 failed: ValueError: planted"
    assert rest.startswith("Traceback (most recent call last):")
    assert rest.count("Traceback") == 1
    assert rest.strip().endswith("ValueError: planted")
