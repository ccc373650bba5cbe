"""The thread that rank 0 works on, and the jobs its callers hand it.

Python raises what signal handlers raise (Ctrl-C) in the main thread and nowhere else. On a thread
of its own the engine therefore never stops in the middle of a message: an interrupt ends the
caller's wait, and the engine ends that request in order before it takes the next. CPU pinning and
PyTorch's thread count belong to this thread too, so the caller's stay as they are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from copy import copy
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from ppsd.errors import PipelineError, PpsdError

LOG = logging.getLogger(__name__)

T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """Call a function on a thread of its own and return its result.

    Where signal handlers run, an extension that calls back into Python may turn what one raises
    into an error of its own (safetensors: ValueError). Interrupted, the caller leaves at once.
    """
    outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:  # it is raised again, where the result is awaited
            outcome.put((None, error))

    threading.Thread(target=run, name="ppsd-plan", daemon=True).start()
    result, error = outcome.get()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only if the function returns that


class Work(Protocol):
    """What the thread goes on with between two jobs; ``busy`` while there is anything."""

    @property
    def busy(self) -> bool: ...

    def step(self) -> None:
        """Do a little of it; raises PipelineError when nothing more can be done at all."""

    def cancel(self, error: BaseException) -> None:
        """Drop it; whoever waits for it gets ``error``."""


class Job(Generic[T]):
    """Something a caller waits for; ``take`` gives what is ``put`` and at last the outcome.

    ``cancelled`` is set once nobody wants the results any more; the thread looks at it. What is
    put waits for its reader however long that takes: a reader that stops reading stalls nobody.
    ``notify`` is called after each.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.notify: Callable[[], object] = lambda: None
        self._outbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def can_begin(self) -> bool:
        """Return True if the thread may begin with this now."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin; what it raises is the outcome."""
        raise NotImplementedError

    def put(self, chunk: object) -> None:
        """Hand a chunk to the reader."""
        self._put("chunk", chunk)

    def finish(self, result: T) -> None:
        """Let the reader have the result."""
        self._put("result", result)

    def fail(self, error: BaseException) -> None:
        """Let the reader have the reason why there is no result."""
        self._put("error", error)

    def _put(self, kind: str, value: object) -> None:
        self._outbox.put((kind, value))
        try:
            self.notify()
        except RuntimeError:
            pass  # the reader's event loop is closed
        except Exception:  # its own fault, which no other job is to suffer for
            LOG.exception("a job's notify failed and is not called again")
            self.notify = lambda: None

    def take(self) -> tuple[str, Any]:
        """Wait for what comes next: ``chunk``, ``result`` or ``error``, with its value."""
        return self._outbox.get()

    def take_now(self) -> tuple[str, Any] | None:
        """Return what comes next, or None if nothing has come yet."""
        with suppress(Empty):  # nothing yet
            return self._outbox.get_nowait()
        return None


class Call(Job[T]):
    """A function to be called when nothing else is under way."""

    def __init__(self, function: Callable[[], T], work: Work) -> None:
        super().__init__()
        self._function: Callable[[], T] | None = function
        self._work = work

    def can_begin(self) -> bool:
        return not self._work.busy

    def begin(self) -> None:
        function, self._function = self._function, None  # it may hold the LLM
        assert function is not None
        self.finish(function())


class EngineThread:
    """Does jobs in the order they come, until ``close`` or until one breaks the pipeline.

    Between jobs it goes on with ``work``. ``leave`` runs last, on the same thread. ``ended`` is
    the error that every later job gets.
    """

    def __init__(self, work: Work, leave: Callable[[], None]) -> None:
        self.ended: PipelineError | None = None
        self._closed = False
        self._work = work
        self._leave = leave
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal handler may call while its thread holds it
        self._inbox: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._waiting: deque[Job[Any]] = deque()
        self._thread = threading.Thread(target=self._serve, name="ppsd-engine", daemon=True)

    def call(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the thread, after all that was asked before; return its result."""
        return self.result(Call(function, self._work))

    def result(self, job: Job[T]) -> T:
        """Do a job and return its result; what it puts meanwhile is dropped."""
        return self.results([job])[0]

    def results(self, jobs: Sequence[Job[T]]) -> list[T]:
        """Do jobs, at once where that is possible, and return their results.

        If one fails, the others are cancelled.
        """
        try:
            for job in jobs:
                self.submit(job)
            return [self._last(job) for job in jobs]
        finally:
            for job in jobs:
                job.cancelled = True

    def _last(self, job: Job[T]) -> T:
        reading = self._taken(job)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                result: T = end.value
                return result

    def stream(self, job: Job[T]) -> Generator[Any, None, T]:
        """Yield a job's chunks and return its result; leaving early cancels the job."""
        try:
            self.submit(job)
            return (yield from self._taken(job))
        finally:
            job.cancelled = True  # an assignment: no interrupt comes between it and ``finally``

    def _taken(self, job: Job[T]) -> Generator[Any, None, T]:
        while True:
            if self._closed:  # what has come before is dropped: else it depends on the moment
                self.check()
            kind, value = job.take()
            if kind == "chunk":
                yield value
                self._check_process()
            elif kind == "error":
                raise value
            else:
                result: T = value
                return result

    def check(self) -> None:
        """Raise if the thread is to end."""
        if self.ended is not None:
            raise copy(self.ended)  # what is raised gathers frames, and with them the LLM

    def close(self) -> None:
        """End the thread and all it works on; may be called twice, and from any thread.

        A forked child has no such thread, and what it inherits is its parent's: nothing happens.
        """
        if os.getpid() != self._process:
            return
        self.ended = self.ended or PipelineError("this LLM is closed")
        self._closed = True
        self._inbox.put(None)
        if self._thread is not threading.current_thread():  # the collector may run there, too
            with suppress(RuntimeError):  # it was never started
                self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise PpsdError(
                f"this LLM belongs to process {self._process}; a forked child, as process "
                f"{os.getpid()} is, must open an LLM of its own"
            )

    def submit(self, job: Job[Any]) -> None:
        """Let the thread do a job, and return at once."""
        self._check_process()
        if self._thread is threading.current_thread():
            raise PpsdError("an LLM cannot be used from within a callback of its own request")
        with self._lock:
            self.check()
            if self._thread.ident is None:
                self._thread.start()
            self._inbox.put(job)

    def _serve(self) -> None:
        try:
            while self.ended is None:
                if self._waiting or not self._work.busy or not self._inbox.empty():
                    self._attend()
                else:
                    self._step()
        except PipelineError as error:
            self.ended = self.ended or copy(error)
        except BaseException as error:  # a fault of ours, which is not to leave anyone waiting
            self.ended = self.ended or PipelineError(f"the engine's thread failed: {error!r}")
            raise
        finally:
            try:
                self._leave()  # before anyone hears of an error: then all is free again
            finally:
                self._refuse()

    def _attend(self) -> None:
        """Take the jobs that have come, and begin the next one if that is possible."""
        waited = len(self._waiting)
        while not self._inbox.empty() or not (self._waiting or self._work.busy):
            job = self._inbox.get()
            if job is None:
                return
            self._waiting.append(job)
        if len(self._waiting) > waited or self._waiting[0].cancelled:
            # Not the first alone: who leaves and asks again would fill the memory behind it.
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if not self._waiting:
            return
        job = self._waiting[0]
        if job.can_begin():
            self._begin(job)
            self._waiting.popleft()  # not before: if that broke the pipeline, it is to be answered
        else:
            self._step()

    def _begin(self, job: Job[Any]) -> None:
        try:
            job.begin()
        except PipelineError:
            raise
        except BaseException as error:  # it is raised again, where the results are read
            job.fail(error)

    def _step(self) -> None:
        try:
            self._work.step()
        except PipelineError:
            raise
        except BaseException as error:  # of these requests alone: the next finds all in order
            self._work.cancel(error)

    def _refuse(self) -> None:
        """Let everyone who still waits have the error that ended the thread."""
        assert self.ended is not None
        with self._lock:  # whoever came before ``ended`` was set has put a job by now
            self._work.cancel(self.ended)
            with suppress(Empty):  # that was the last
                while True:
                    job = self._inbox.get(block=False)
                    if job is not None:
                        self._waiting.append(job)
            for job in self._waiting:
                job.fail(copy(self.ended))
            self._waiting.clear()
