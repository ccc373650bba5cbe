"""The engine's thread on its own: jobs in their order, what ends them, and what ends the thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from ppsd.engine.thread import Call, EngineThread, Job, apart
from ppsd.errors import PipelineError, PpsdError


class Steps:
    """Work of so many steps, the last of which ends it or raises ``error``."""

    def __init__(self) -> None:
        self.left = 0
        self.error: BaseException | None = None
        self.dropped: list[BaseException] = []

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self) -> None:
        self.left -= 1
        if self.error is not None:
            raise self.error
        time.sleep(0.001)

    def cancel(self, error: BaseException) -> None:
        self.left = 0
        self.dropped.append(error)


class Told(Job[str]):
    """A job that puts two chunks and then does something."""

    def __init__(self, act: Callable[[Told], object] = lambda job: job.finish("done")) -> None:
        super().__init__()
        self._act = act
        self.ready, self.begun = True, False

    def can_begin(self) -> bool:
        return self.ready

    def begin(self) -> None:
        self.begun = True
        self.put("a")
        self.put("b")
        self._act(self)


@pytest.fixture
def work() -> Steps:
    return Steps()


@pytest.fixture
def left() -> list[str]:
    return []


@pytest.fixture
def thread(work, left):
    made = EngineThread(work, lambda: left.append(threading.current_thread().name))
    yield made
    made.close()


def here() -> tuple[str, bool]:
    return threading.current_thread().name, threading.current_thread().daemon


def fail(error: BaseException) -> Callable[..., object]:
    def failing(*_: object) -> object:
        raise error

    return failing


def test_a_function_has_a_thread_of_its_own_that_keeps_no_process_alive() -> None:
    assert apart(here) == ("ppsd-plan", True)
    with pytest.raises(KeyError, match="missing"):
        apart(fail(KeyError("missing")))


def test_calls_run_on_the_engines_thread_once_nothing_is_under_way(thread, work) -> None:
    assert thread.call(here) == ("ppsd-engine", True)
    work.left = 5
    assert thread.call(lambda: work.left) == 0
    with pytest.raises(KeyError, match="missing"):
        thread.call(fail(KeyError("missing")))
    assert thread.call(lambda: 3) == 3
    with pytest.raises(PpsdError, match="within a callback"):
        thread.call(lambda: thread.call(here))


def test_a_reader_has_chunks_and_the_result(thread) -> None:
    job, told = Told(), []
    job.notify = lambda: told.append(threading.current_thread().name)
    reading = thread.stream(job)
    assert next(reading) == "a"
    assert not job.cancelled
    assert next(reading) == "b"
    with pytest.raises(StopIteration) as end:
        next(reading)
    assert end.value.value == "done"
    assert job.cancelled
    assert told == ["ppsd-engine"] * 3
    job = Told()
    thread.submit(job)
    assert [job.take() for _ in range(3)] == [("chunk", "a"), ("chunk", "b"), ("result", "done")]
    assert job.take_now() is None
    assert thread.result(Told()) == "done"
    assert thread.results([Told(), Told(lambda job: job.finish("else"))]) == ["done", "else"]


def test_a_closed_event_loop_of_a_reader_is_no_error(thread) -> None:
    job = Told()
    job.notify = fail(RuntimeError("the loop is closed"))
    assert thread.result(job) == "done"


def test_if_one_fails_the_others_are_cancelled(thread) -> None:
    jobs = [Told(fail(KeyError("bad"))), Told()]
    with pytest.raises(KeyError, match="bad"):
        thread.results(jobs)
    assert all(job.cancelled for job in jobs)
    reading = thread.stream(other := Told())
    next(reading)
    reading.close()
    assert other.cancelled


def test_jobs_begin_in_their_order_and_cancelled_ones_never(thread, work) -> None:
    first, second, third = Told(), Told(), Told()
    first.ready = False
    work.left = 10**6
    for job in (first, second, third):
        thread.submit(job)
    second.cancelled = True
    time.sleep(0.02)
    assert not third.begun, "it waits for the first"
    first.ready = True
    assert thread.result(Told()) == "done"
    assert (first.begun, second.begun, third.begun) == (True, False, True)
    work.left = 0


def test_an_error_of_the_work_ends_what_is_under_way_alone(thread, work) -> None:
    work.error, error = ValueError("odd"), ValueError("odd")
    thread.call(lambda: setattr(work, "left", 3))
    assert thread.call(lambda: 5) == 5
    assert [repr(dropped) for dropped in work.dropped] == [repr(error)]
    assert thread.ended is None


def test_who_leaves_takes_no_memory_behind_one_that_waits(thread, work) -> None:
    first = Told()
    first.ready = False
    work.left = 10**6
    thread.submit(first)
    for _ in range(50):
        job = Told()
        job.cancelled = True
        thread.submit(job)
    end = time.monotonic() + 10
    while len(thread._waiting) != 1 or not thread._inbox.empty():
        assert time.monotonic() < end
    first.ready = True
    assert thread.result(Told()) == "done"
    work.left = 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(
    thread, work, left, monkeypatch
) -> None:
    work.error = ValueError("odd")
    cancel, seen = work.cancel, []

    def fails_once(error: BaseException) -> None:
        seen.append(error)
        if len(seen) == 1:
            raise KeyError("slot")
        cancel(error)

    monkeypatch.setattr(work, "cancel", fails_once)
    thread.call(lambda: setattr(work, "left", 3))
    with pytest.raises(PipelineError, match=r"the engine's thread failed: KeyError\('slot'\)"):
        thread.call(lambda: time.sleep(0))
    assert left == ["ppsd-engine"]
    with pytest.raises(PipelineError, match="the engine's thread failed"):
        thread.check()


def test_a_broken_pipeline_ends_the_thread_and_all_jobs(thread, work, left) -> None:
    gone = PipelineError("stage 1 is gone")
    all_there = threading.Event()
    waiting, begun = Told(), Told(lambda job: (all_there.wait(5.0), fail(gone)()))
    thread.submit(begun)
    assert begun.take() == ("chunk", "a")  # so the next is not taken from the inbox
    thread.submit(waiting)
    all_there.set()
    for job in (begun, waiting):
        while (taken := job.take())[0] == "chunk":
            pass
        assert taken[0] == "error"
        assert isinstance(taken[1], PipelineError)
        assert str(taken[1]) == "stage 1 is gone"
    assert left == ["ppsd-engine"]
    assert [str(error) for error in work.dropped] == ["stage 1 is gone"]
    for act in (thread.check, lambda: thread.call(here)):
        with pytest.raises(PipelineError, match="stage 1 is gone") as caught:
            act()
        assert caught.value is not thread.ended
    thread.close()
    with pytest.raises(PipelineError, match="stage 1 is gone"):
        thread.check()


def test_close_ends_what_waits_and_may_be_called_twice(thread, work, left) -> None:
    waiting = Told()
    waiting.ready = False
    work.left = 10**6
    thread.submit(waiting)
    time.sleep(0.02)
    thread.close()
    thread.close()
    assert left == ["ppsd-engine"]
    kind, error = waiting.take()
    assert (kind, str(error)) == ("error", "this LLM is closed")
    with pytest.raises(PipelineError, match="this LLM is closed"):
        thread.result(Told())
    unused = EngineThread(Steps(), lambda: left.append("unused"))
    unused.close()
    assert left == ["ppsd-engine"]


def test_the_thread_may_close_itself(thread, left) -> None:
    """As the garbage collector does, wherever it runs."""
    with pytest.raises(PipelineError, match="this LLM is closed"):
        thread.result(Told(lambda job: thread.close()))
    thread._thread.join(5.0)
    assert left == ["ppsd-engine"]


def test_what_a_closed_thread_had_said_before_is_dropped(thread) -> None:
    job = Told()
    reading = thread.stream(job)
    assert next(reading) == "a"
    thread.close()
    with pytest.raises(PipelineError, match="this LLM is closed"):
        next(reading)


def test_a_forked_child_has_no_thread(thread, monkeypatch) -> None:
    thread.call(here)
    reading = thread.stream(Told())
    next(reading)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    thread.close()
    assert thread.ended is None
    for act in (lambda: thread.call(here), lambda: next(reading)):
        with pytest.raises(PpsdError, match=f"belongs to process {parent}; a forked child, as"):
            act()
    monkeypatch.undo()
    assert thread.call(lambda: 1) == 1


def test_a_call_forgets_its_function(work) -> None:
    call = Call(here, work)
    call.begin()
    assert call._function is None
    assert call.can_begin()
    work.left = 1
    assert not call.can_begin()


def test_a_notify_that_raises_harms_nobody(thread: EngineThread) -> None:
    """It is the caller's own: all jobs have their outcome, and those after it, too."""
    calls: list[int] = []

    def notify() -> None:
        calls.append(1)
        raise ValueError("mine")

    rude = Told()
    rude.notify = notify
    thread.submit(rude)
    assert thread.result(Told()) == "done"
    assert [rude.take() for _ in range(3)] == [("chunk", "a"), ("chunk", "b"), ("result", "done")]
    assert len(calls) == 1
    thread.check()
