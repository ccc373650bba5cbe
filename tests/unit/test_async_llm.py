"""Requests on an event loop: what they bring is taken as it comes, and leaving ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ppsd.engine.async_llm import begun
from ppsd.engine.thread import Job


def submitted(jobs: list[Job[Any]]) -> list[Callable[..., Any]]:
    """Return what begins each of some jobs."""

    def submit(job: Job[Any], notify: Callable[[], object]) -> Job[Any]:
        job.notify = notify
        return job

    return [lambda notify, job=job: submit(job, notify) for job in jobs]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_parts_are_taken_before_they_are_read() -> None:
    async def run() -> None:
        jobs: list[Job[Any]] = [Job(), Job()]
        seen, ends = [], []

        def see(index: int, part: Any) -> Any:
            seen.append((index, part))
            return part.upper()

        with begun(submitted(jobs), see, lambda: ends.append(None)) as parts:
            jobs[1].put("a")
            jobs[0].put("b")
            jobs[1].finish("c")
            await turns()
            assert (sorted(seen), ends) == ([(0, "b"), (1, "a"), (1, "c")], [])
            jobs[0].finish("d")
            await turns()
            assert ends == [None], "though nothing was read"
            read = [part async for part in parts]
        assert sorted(read) == [(0, "B"), (0, "D"), (1, "A"), (1, "C")]
        assert len(ends) == 1

    asyncio.run(run())


def test_an_error_ends_the_others_before_it_is_read() -> None:
    async def run() -> None:
        jobs: list[Job[Any]] = [Job(), Job()]
        ends: list[None] = []
        with begun(submitted(jobs), over=lambda: ends.append(None)) as parts:
            jobs[0].put("a")
            jobs[0].fail(KeyError("odd"))
            await turns()
            assert ([job.cancelled for job in jobs], ends) == ([True, True], [None])
            jobs[1].finish("b")
            await turns()
            assert await anext(parts) == (0, "a")
            with pytest.raises(KeyError, match="odd"):
                await anext(parts)

    asyncio.run(run())


def test_leaving_ends_what_is_under_way() -> None:
    async def run() -> None:
        jobs: list[Job[Any]] = [Job()]
        seen: list[Any] = []
        with begun(submitted(jobs), lambda index, part: seen.append(part) or part):
            jobs[0].put("a")
            await turns()
        assert jobs[0].cancelled
        jobs[0].put("b")
        await turns()
        assert seen == ["a"]

    asyncio.run(run())


def test_a_refused_request_ends_those_before_it() -> None:
    async def run() -> None:
        jobs: list[Job[Any]] = [Job()]

        def refused(notify: object) -> Any:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"), begun([*submitted(jobs), refused]):
            raise AssertionError("nothing has begun")
        assert jobs[0].cancelled

    asyncio.run(run())
