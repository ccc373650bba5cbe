"""``AsyncLLM``: an LLM for programs that run on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.llm import LLM
from ppsd.engine.prompt import Prompt
from ppsd.types import SamplingParams


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
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        ticket = self.llm.submit(
            prompt, params, reuse=reuse, notify=lambda: loop.call_soon_threadsafe(arrived.set)
        )
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                while (taken := ticket.take_now()) is not None:
                    kind, value = taken
                    if kind == "error":
                        raise value
                    yield value
                    if kind == "result":
                        return
        finally:
            ticket.cancelled = True
