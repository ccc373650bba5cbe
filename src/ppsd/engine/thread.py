"""The thread that rank 0 works on, and the jobs its callers hand it. Used by llm.py.

Python raises what signal handlers raise (Ctrl-C) in the main thread and nowhere else. On a thread
of its own the engine therefore never stops in the middle of a message: an interrupt ends the
caller's wait, and the engine ends that request in order before it takes the next. CPU pinning and
PyTorch's thread count belong to this thread too, so the caller's stay as they are.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from copy import copy
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ppsd.errors import PipelineError, PpsdError

AHEAD = 16  # chunks that may wait for a slow reader before the engine waits for it
READER_S = 0.002  # how often the engine looks whether a slow reader has caught up

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work; ``take`` gives what it ``put``s, and at last its outcome.

    ``cancelled`` is set once nobody wants the results any more; the work should look at it.
    """

    def __init__(self, work: Callable[[Job[T]], T]) -> None:
        self.cancelled = False
        self._work: Callable[[Job[T]], T] | None = work
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._outcome: tuple[str, Any] | None = None

    def put(self, chunk: object) -> None:
        """Hand a chunk to the reader; wait while too many are unread."""
        self._outbox.put(("chunk", chunk))
        while self._outbox.qsize() >= AHEAD and not self.cancelled:
            time.sleep(READER_S)

    def take(self) -> tuple[str, Any]:
        """Wait for what comes next: ``chunk``, ``result`` or ``error``, with its value."""
        item: tuple[str, Any] = self._outbox.get()
        return item

    def execute(self) -> PipelineError | None:
        """Do the work; return the error if it broke the pipeline."""
        assert self._work is not None
        try:
            self._outcome = "result", self._work(self)
        except BaseException as error:  # it is raised again, where the results are read
            self._outcome = "error", error
            return error if isinstance(error, PipelineError) else None
        finally:
            self._work = None  # which may hold the LLM: nothing here may keep that alive
        return None

    def finish(self, ended: PipelineError | None) -> None:
        """Let the reader have the outcome, or else the reason why there is none."""
        outcome, self._outcome = self._outcome, None  # nor may an error's frames keep it alive
        broken = outcome is not None and isinstance(outcome[1], PipelineError)
        if ended is not None and not broken:
            outcome = "error", copy(ended)
        if not self.cancelled or ended is not None:
            self._outbox.put(outcome)


class EngineThread:
    """Does jobs one after the other until ``close`` or until one breaks the pipeline.

    ``leave`` runs last, on the same thread. ``ended`` is the error that every later job gets.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self.ended: PipelineError | None = None
        self._leave = leave
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal handler may call while its thread holds it
        self._current: Job[Any] | None = None
        self._inbox: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="ppsd-engine", daemon=True)

    def call(self, work: Callable[[], T]) -> T:
        """Do ``work`` on the thread; return its result."""
        return self.result(Job(lambda _: work()))

    def result(self, job: Job[T]) -> T:
        """Do a job and return its result; it may put nothing."""
        reading = self.stream(job)
        try:
            next(reading)
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("a job that nobody streams put a chunk")

    def stream(self, job: Job[T]) -> Generator[Any, None, T]:
        """Yield a job's chunks and return its result; leaving early cancels the job."""
        try:
            self._submit(job)
            while True:
                kind, value = job.take()
                if kind == "chunk":
                    yield value
                    self._check_process()
                elif kind == "error":
                    raise value
                else:
                    result: T = value
                    return result
        finally:
            job.cancelled = True  # an assignment: no interrupt comes between it and ``finally``

    def check(self) -> None:
        """Raise if the thread is to end."""
        if self.ended is not None:
            raise copy(self.ended)  # what is raised gathers frames, and with them the LLM

    def close(self) -> None:
        """Cancel the job at work, then end the thread; may be called twice, and from any thread.

        A forked child has no such thread, and what it inherits is its parent's: nothing happens.
        """
        if os.getpid() != self._process:
            return
        self.ended = self.ended or PipelineError("this LLM is closed")
        self._inbox.put(None)
        if (job := self._current) is not None:
            job.cancelled = True
        if self._thread is not threading.current_thread():  # the collector may run there, too
            with suppress(RuntimeError):  # it was never started
                self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise PpsdError(
                f"this LLM belongs to process {self._process}; a forked child, as process "
                f"{os.getpid()} is, must open an LLM of its own"
            )

    def _submit(self, job: Job[Any]) -> None:
        self._check_process()
        with self._lock:
            self.check()
            if self._current is not None and not self._current.cancelled:
                raise PpsdError(
                    "this LLM is at work on another request; finish or close its stream"
                )
            self._current = job
            if self._thread.ident is None:
                self._thread.start()
            self._inbox.put(job)

    def _serve(self) -> None:
        job = None
        try:
            while (job := self._inbox.get()) is not None and self.ended is None:
                if (error := job.execute()) is not None:
                    self.ended = copy(error)
                if self.ended is not None:
                    break  # with this job still to be answered
                job.finish(None)
                job = None  # nor may the next wait keep it
        finally:
            try:
                self._leave()  # before the reader hears of an error: then all is free again
            finally:
                self._refuse(job)

    def _refuse(self, job: Job[Any] | None) -> None:
        """Let everyone who still waits have the error that ended the thread."""
        with self._lock:  # whoever came before ``ended`` was set has put a job by now
            while job is not None or not self._inbox.empty():
                if job is not None:
                    job.finish(self.ended)
                job = None if self._inbox.empty() else self._inbox.get()
