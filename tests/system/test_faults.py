"""Stages that die, raise, hang or compute nonsense: a named error, and nothing left behind.

Three stages, so that the middle one and the last are tried. ``timeout`` is far above PATIENCE
where a fault has to be noticed by other means.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.errors import (
    ModelError,
    NonFiniteError,
    PipelineError,
    PipelineTimeoutError,
    PpsdError,
    StageFailedError,
    StageLostError,
)
from ppsd.worker import process
from tests.support.faults import ForkedWorker, gone, plant

FIRST_LAYERS = {1: 2, 2: 4}  # of the later stages
PROMPT = list(range(3, 40))
KILLED = r"stage {} \(pid \d+\) was killed by signal 9 \(Killed\)"
ERRORS: dict[str, tuple[type[PpsdError], str]] = {
    "die": (StageLostError, KILLED),
    "fail": (StageFailedError, "stage {} failed: ValueError: planted"),
    "refuse": (ModelError, "stage {}: planted.safetensors: tensor x is missing"),
    "nan": (NonFiniteError, "stage {} computed NaN or infinity at position"),
    "infinity": (NonFiniteError, "stage {} computed NaN or infinity at position"),
    "freeze": (PipelineTimeoutError, "for 0.5 s; stage {} does not answer"),
    "spin": (PipelineTimeoutError, "for 0.5 s; stage {} does not answer"),
}

Sabotage = Callable[..., None]


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """Start workers by fork, with a fault planted in the stage it is told."""
    names = ("PIPE", "TimeoutExpired")
    rest = {name: getattr(subprocess, name) for name in names}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=ForkedWorker, **rest))

    def choose(stage: int, moment: str, act: str) -> None:
        first = FIRST_LAYERS[stage]
        monkeypatch.setattr(ForkedWorker, "sabotage", lambda _: plant(first, moment, act))

    return choose


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Compare what this process holds before and after, whatever happened in between."""
    before, others = holdings(), children()  # of tests before in the same process
    yield
    assert holdings() == before
    assert gone(child.pid for child in children() - others)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def holdings() -> dict[str, object]:
    """What must be as it was. Threads are not: gloo may keep one whose peer died in mid-send."""
    gc.collect()  # an error's traceback holds what its frames hold
    shared = Path("/dev/shm")
    return {
        "segments": sorted(os.listdir(shared)) if shared.is_dir() else [],
        "memory files": sum("memfd:ppsd" in target for target in open_files()),
        "affinity": os.sched_getaffinity(0),
        "torch threads": torch.get_num_threads(),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
    }


def open_files() -> list[str]:
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)]


def is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def open_llm(model: Path, transport: str = "shared-memory", **settings: object) -> LLM:
    fixed = {"dtype": "float64", "split": (2, 4), "threads_per_stage": 1, "init_timeout": 30}
    fixed |= {"head": "untrained"}
    return LLM(str(model), transport=transport, **fixed | settings)


def run_into(error: type[PpsdError], match: str, model: Path, **settings: object) -> PpsdError:
    """Load and decode until ``error`` comes, in these words."""
    with pytest.raises(error, match=match) as caught:
        decode(model, **settings)
    return caught.value


def decode(model: Path, **settings: object) -> None:
    """Load and decode; an LLM that broke must repeat its error, and can be closed."""
    with open_llm(model, **settings) as llm:
        try:
            llm.generate(PROMPT, SamplingParams(max_tokens=20))
        except PipelineError as first:
            with pytest.raises(type(first), match=re.escape(str(first))):
                llm.generate(PROMPT)
            raise


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("moment", "act"),
    [
        *((moment, act) for moment in ("load", "prefill", "decode") for act in ("die", "fail")),
        ("load", "refuse"),
        ("prefill", "nan"),
        ("decode", "infinity"),
    ],
)
def test_a_fault_in_a_stage_is_named_at_once(sabotage, tiny_model, stage, moment, act) -> None:
    sabotage(stage, moment, act)
    error, sentence = ERRORS[act]
    caught = run_into(error, sentence.format(stage), tiny_model(), timeout=600)
    if isinstance(caught, StageFailedError):
        assert "in fail\n    raise ValueError" in caught.remote_traceback
        assert caught.remote_traceback in caught.__notes__


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("moment", "act"), [("load", "die"), ("prefill", "fail"), ("decode", "die"), ("decode", "nan")]
)
def test_so_it_is_across_hosts(sabotage, tiny_model, capfd, stage, moment, act) -> None:
    sabotage(stage, moment, act)
    error, sentence = ERRORS[act]
    run_into(error, sentence.format(stage), tiny_model(), transport="distributed", timeout=600)
    assert "socket" not in capfd.readouterr().err


@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
@pytest.mark.parametrize(("stage", "act"), [(1, "freeze"), (2, "spin")])
def test_a_silent_stage_is_found(sabotage, tiny_model, transport, stage, act) -> None:
    sabotage(stage, "decode", act)
    error, sentence = ERRORS[act]
    run_into(error, sentence.format(stage), tiny_model(), transport=transport, timeout=0.5)


def test_a_worker_that_cannot_start_or_leaves_at_once(sabotage, tiny_model, monkeypatch) -> None:
    sabotage(1, "load", "die")
    monkeypatch.setattr(ForkedWorker, "sabotage", lambda _: os._exit(7))
    with pytest.raises(StageLostError, match=r"stage \d \(pid \d+\) exited with code 7"):
        open_llm(tiny_model())

    def no_more(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process.subprocess, "Popen", no_more)
    with pytest.raises(StageLostError, match=r"stage 1 cannot be started: .*temporarily unavail"):
        open_llm(tiny_model())


def test_a_stopped_start_is_given_up(sabotage, tiny_model) -> None:
    sabotage(2, "load", "freeze")
    with pytest.raises(PipelineTimeoutError, match=r"stages \[2\] not ready after 1 s"):
        open_llm(tiny_model(), init_timeout=1)


@pytest.mark.parametrize(("transport", "cycles"), [("shared-memory", 50), ("distributed", 5)])
def test_starting_again_and_again_leaves_nothing(sabotage, tiny_model, transport, cycles) -> None:
    del sabotage  # only its cheap workers are wanted
    params = SamplingParams(max_tokens=3)
    held = []
    for cycle in range(cycles):
        with LLM(str(tiny_model()), transport=transport, threads_per_stage=1) as llm:
            llm.generate(PROMPT, params)
        if cycle in (cycles // 2, cycles - 1):
            gc.collect()
            this = psutil.Process()
            held.append((this.num_fds(), this.num_threads(), this.memory_info().rss))
    (*halfway, memory_halfway), (*end, memory) = held
    assert end == halfway
    assert memory - memory_halfway < 8 << 20  # bytes; the segments of these cycles have 50 MiB
    with pytest.raises(PipelineError, match="this LLM is closed"):
        llm.generate(PROMPT)
