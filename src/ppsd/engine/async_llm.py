"""``AsyncLLM``: an LLM for programs that run on asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
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

Part = Chunk | Completion
Numbered = tuple[int, Part]  # with the index of its request
See = Callable[[int, Part], Part]


def _unseen(index: int, part: Part) -> Part:
    return part


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
    requests: Sequence[Submit], see: See = _unseen, over: Callable[[], object] = lambda: None
) -> Iterator[AsyncGenerator[Numbered, None]]:
    """Submit requests at once, and yield what they bring; leaving ends them.

    Before anything is read they are on their way, and what they bring is taken as it comes, however
    late it is read. Each part has the index of its request; reading raises the error of the first
    that fails, which ends the others. ``see`` has a part first, and what it returns is read;
    ``over`` is called once all is complete or something has failed.
    """
    arrivals = _Arrivals(see, over)
    try:
        arrivals.begin(requests)
        yield arrivals.read()
    finally:
        arrivals.leave()


class _Arrivals:
    """What requests bring, taken by callbacks of the event loop."""

    def __init__(self, see: See, over: Callable[[], object]) -> None:
        self._see = see
        self._over = over
        self._tickets: list[Ticket] = []
        self._under_way: dict[int, Ticket] = {}
        self._parts: deque[Numbered | BaseException | None] = deque()  # None: all is complete
        self._arrived = asyncio.Event()
        self._left = False

    def begin(self, requests: Sequence[Submit]) -> None:
        """Submit the requests; callbacks come only later, as this is the loop's own thread."""
        loop = asyncio.get_running_loop()
        for submit in requests:
            ticket = submit(notify=lambda: loop.call_soon_threadsafe(self._take))
            self._under_way[len(self._tickets)] = ticket
            self._tickets.append(ticket)

    def leave(self) -> None:
        """Take nothing more, and end what is under way."""
        self._left = True
        for ticket in self._tickets:
            ticket.cancelled = True

    def _take(self) -> None:
        if self._left:
            return
        try:
            for index, ticket in list(self._under_way.items()):
                while (taken := ticket.take_now()) is not None:
                    kind, value = taken
                    if kind == "error":
                        raise value
                    if kind == "result":
                        del self._under_way[index]
                    self._parts.append((index, self._see(index, value)))
            if not self._under_way:
                self._end(None)
        except BaseException as error:  # it is raised again, where the parts are read
            self._end(error)
        self._arrived.set()

    def _end(self, last: BaseException | None) -> None:
        self._parts.append(last)
        self.leave()
        self._over()

    async def read(self) -> AsyncGenerator[Numbered, None]:
        """Yield parts until all requests are complete; raises the error that ended them."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._parts:
                part = self._parts.popleft()
                if part is None:
                    return
                if isinstance(part, BaseException):
                    raise part
                yield part
