"""Take what comes as it comes, however slowly a client reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def taken_at_once(source: AsyncGenerator[T, None]) -> Iterator[AsyncGenerator[T, None]]:
    """Yield a generator of what ``source`` yields or raises, which runs ahead on its own task.

    What was not read yet waits in memory. Leaving ends the task.
    """
    arrived: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()

    async def take() -> None:
        try:
            async for part in source:
                arrived.put_nowait((part,))
            arrived.put_nowait(None)
        except Exception as error:  # it is raised again, where the parts are read
            arrived.put_nowait(error)

    async def read() -> AsyncGenerator[T, None]:
        while (taken := await arrived.get()) is not None:
            if isinstance(taken, BaseException):
                raise taken
            yield taken[0]

    task = asyncio.ensure_future(take())
    try:
        yield read()
    finally:
        task.cancel()
