"""``AsyncLLM``: an LLM for programs that run on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.llm import LLM
from ppsd.engine.prompt import Prompt
from ppsd.engine.text_engine import Ticket
from ppsd.types import SamplingParams


class Submit(Protocol):
    """Begin a request whose ticket calls ``notify``; LLM.submit, but for this argument."""

    def __call__(self, *, notify: Callable[[], object]) -> Ticket: ...


class AsyncLLM:
    """An LLM whose requests are awaited; many may be under way, ``concurrent`` of them decoding.

    ``AsyncLLM(model, stages=2, …)`` takes LLM's arguments and raises what it raises. Loading
    blocks; make it before the event loop has other work, or in a thread.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.llm = LLM(*arguments, **settings)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the workers and free everything; may be called twice."""
        await asyncio.to_thread(self.llm.close)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> Completion:
        """Return one completion; cancelling the task ends the request."""
        async for part in self.stream(prompt, params, reuse=reuse):
            if isinstance(part, Completion):
                return part
        raise AssertionError("a stream ends with its completion")

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """Yield one completion as it grows, and at last the whole of it.

        Leaving early, or cancelling the task, ends the request.
        """
        request = partial(self.llm.submit, prompt, params, reuse=reuse)
        with begun([request]) as parts:
            async for _, part in parts:
                yield part


@contextmanager
def begun(
    requests: Sequence[Submit],
) -> Iterator[AsyncGenerator[tuple[int, Chunk | Completion], None]]:
    """Submit requests at once, and yield what they bring; leaving ends them.

    Before anything is read they are on their way. Each part has the index of its request; reading
    raises the error of the first that fails.
    """
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    tickets: list[Ticket] = []
    try:
        for submit in requests:
            tickets.append(submit(notify=lambda: loop.call_soon_threadsafe(arrived.set)))
        yield _as_they_come(tickets, arrived)
    finally:
        for ticket in tickets:
            ticket.cancelled = True


async def _as_they_come(
    tickets: Sequence[Ticket], arrived: asyncio.Event
) -> AsyncGenerator[tuple[int, Chunk | Completion], None]:
    """Yield what tickets bring until all are complete; ``arrived`` is set whenever one does."""
    under_way = dict(enumerate(tickets))
    while under_way:
        await arrived.wait()
        arrived.clear()
        for index, ticket in list(under_way.items()):
            while (taken := ticket.take_now()) is not None:
                kind, value = taken
                if kind == "error":
                    raise value
                if kind == "result":
                    del under_way[index]
                yield index, value
