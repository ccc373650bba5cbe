"""Every stage computes on CPUs of its own, where there are enough; one core for two looks the same
but for the time it takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ppsd import LLM
from ppsd.config import core_shares

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system pins nothing"
)


def allowed(pid: int) -> set[int]:
    return os.sched_getaffinity(pid)


def workers() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if "ppsd.worker" in c.cmdline()]


def engine_thread() -> int:
    (thread,) = (t for t in threading.enumerate() if t.name == "ppsd-engine")
    assert thread.native_id is not None
    return thread.native_id


@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_stages_have_cores_of_their_own(tiny_model: Callable[[str], Path], transport: str) -> None:
    before = allowed(0)
    shares = core_shares(2, 1)
    settings = {"stages": 2, "threads_per_stage": 1, "head": "untrained", "plan": "off"}
    with LLM(str(tiny_model("llama")), transport=transport, **settings):
        (worker,) = workers()
        pinned = [set(share) or before for share in shares]
        assert [allowed(engine_thread()), allowed(worker)] == pinned
        assert allowed(0) == before  # of the caller, who has work of its own


def test_too_few_cores_leave_all_stages_free(tiny_model: Callable[[str], Path]) -> None:
    before = allowed(0)
    stages = 2
    settings = {"stages": stages, "threads_per_stage": len(before), "head": "untrained"}
    with LLM(str(tiny_model("llama")), plan="off", **settings):
        assert [allowed(engine_thread()), *map(allowed, workers())] == [before] * stages


def test_shares_are_disjoint_and_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppsd.config.available_cores", lambda: [1, 3, 4, 6, 8])
    assert core_shares(2, 2) == ((1, 3), (4, 6))
    assert core_shares(3, 2) == ((), (), ())
