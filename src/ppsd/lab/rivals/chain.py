"""The stages one behind the other, as rank 0 reaches them for a rival.

A draft crosses the stages up to its exit, a verification the rest, and the next draft needs the
last one's answer: one stage works at a time. Only shadow tokens are said while later stages work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ppsd.engine.blame import raise_failure, raise_if_lost
from ppsd.engine.build import RunningPipeline
from ppsd.engine.links import CHECK_S, Patience
from ppsd.errors import PipelineTimeoutError
from ppsd.lab.rivals.jobs import Job, Reply, decode, encode, is_rivals
from ppsd.lab.rivals.stage import RivalStage
from ppsd.worker import messages


class Chain(Protocol):
    """Stages, the first of which is rank 0's."""

    def ask(self, job: Job) -> list[Reply]:
        """Let a job run through the stages; return all that they say of it."""

    def now(self) -> float:
        """Return the time in seconds by rank 0's clock."""


def ranks_that_answer(job: Job, bounds: Sequence[int], exits: Sequence[int]) -> set[int]:
    """Return the ranks that have something to say of a job, where a rival uses ``exits``."""
    last = len(bounds) - 2
    owners = {e: next(r for r, end in enumerate(bounds[1:]) if e <= end) for e in exits}
    if job.ask == "setup":
        return set(range(last + 1))
    if job.ask == "draft":
        return {owners.get(job.exit, last)}
    if job.ask == "prompt" and not job.last:
        return set()
    return {last} | (set(owners.values()) if job.shadows else set())


class LocalChain:
    """All stages in this thread, each with a timer of its own."""

    def __init__(self, stages: Sequence[RivalStage], *, virtual: bool) -> None:
        self._stages = stages
        self._virtual = virtual
        self._now = 0.0
        for rank, stage in enumerate(stages):
            stage.rank = rank

    def now(self) -> float:
        return self._now if self._virtual else time.monotonic()

    def ask(self, job: Job) -> list[Reply]:
        moment, replies, heard = self.now(), [], self._now
        onward: Job | None = job
        for stage in self._stages:
            if onward is None:
                break
            stage.timer.arrive(moment)
            asked, onward = onward, None
            for message in stage.handle(asked):
                if isinstance(message, Job):
                    onward, moment = message, stage.timer.now()
                else:
                    replies.append(message)
                    heard = max(heard, stage.timer.now())
        self._now = heard
        return replies


class ProcessChain:
    """Rank 0's own stage, and those of the pipeline's worker processes (worker.py)."""

    def __init__(self, stage: RivalStage, running: RunningPipeline, timeout: float) -> None:
        self._bounds = running.layout.bounds
        self._stage = stage
        self._running = running
        self._endpoint = running.endpoint
        self._timeout = timeout
        self._exits: tuple[int, ...] = ()

    def now(self) -> float:
        return time.monotonic()

    def ask(self, job: Job) -> list[Reply]:
        if job.ask == "setup":
            self._exits = job.exits
        replies = []
        self._stage.timer.arrive(self.now())
        for message in self._stage.handle(job):
            if isinstance(message, Job):
                self._endpoint.send(1, encode(message), self._timeout)
            else:
                replies.append(message)
        waiting = ranks_that_answer(job, self._bounds, self._exits)
        waiting -= {reply.rank for reply in replies}
        while waiting:
            replies.append(self._next_reply())
            waiting.remove(replies[-1].rank)
        return replies

    def _next_reply(self) -> Reply:
        patience = Patience(self._timeout)
        while True:
            received = self._endpoint.receive(CHECK_S)
            if received is None:
                raise_if_lost(self._endpoint, self._running.check)
                if patience.ended():
                    raise PipelineTimeoutError(f"no stage answered for {self._timeout:g} s")
                continue
            if is_rivals(received[1]):
                found = decode(received[1], self._endpoint.rows)
                assert isinstance(found, Reply)
                return found
            # else a late answer to an engine's request, or a stage's last words
            raise_failure(messages.decode(received[1], self._endpoint.rows))
