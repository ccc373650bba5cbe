"""What the live page is fed with: the pipeline as it stands, as it works, and a tinted chat.

The engine is observed only while somebody looks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from ppsd.engine.answer import Chunk
from ppsd.engine.events import Event
from ppsd.serve.replies import ChatReply, Parts
from ppsd.serve.scene import Json, Scene
from ppsd.serve.service import Service
from ppsd.serve.stream import as_event

UPDATE_S = 0.1
IDLE_UPDATES = 10  # after so many without news, one is sent all the same
MEMORY_S = 2.0  # measuring it reads files of every process
MOST_EVENTS = 20_000  # between two updates
MOST_UPDATES = 32  # that wait for a slow reader
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Live:
    """The routes of the live page."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._facts = facts(service)
        self._memory: tuple[float, list[int]] = (0.0, [])
        self._viewers: set[asyncio.Queue[str]] = set()
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self._scene = Scene(self._spell)
        self._texts: dict[int, str] = {}
        self._ticking: asyncio.Task[None] | None = None

    async def pipeline(self, request: Request) -> Response:
        """Describe the pipeline, and what it does now."""
        return JSONResponse(self._facts | await self._state())

    async def events(self, request: Request) -> Response:
        """Stream what the pipeline does, at most ten updates a second."""
        if request.method == "HEAD":  # a stream without end, unseen, would hold its connection
            return Response(media_type="text/event-stream", headers=HEADERS)
        return _Stream(self._watch(), media_type="text/event-stream", headers=HEADERS)

    async def _watch(self) -> AsyncGenerator[str, None]:
        updates: asyncio.Queue[str] = asyncio.Queue(MOST_UPDATES)
        if not self._viewers:
            self._look()
        self._viewers.add(updates)
        try:
            yield as_event(self._facts | await self._update([], whole=True))
            while not (self._service.ending or self._ticking is None or self._ticking.done()):
                with suppress(TimeoutError):  # nothing new: see whether the server ends
                    yield await asyncio.wait_for(updates.get(), 1.0)
        finally:
            self._viewers.discard(updates)
            if not self._viewers:
                self._look_away()

    def _look(self) -> None:
        self._events.clear()
        self._scene = Scene(self._spell)
        self._service.llm.observe(self._events.append)
        self._ticking = asyncio.ensure_future(self._tick())

    def _look_away(self) -> None:
        self._service.llm.observe(None)
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    async def _tick(self) -> None:
        """Send an update to all viewers, again and again."""
        quiet = 0
        while True:
            await asyncio.sleep(UPDATE_S)
            told = [self._scene.take(self._events.popleft()) for _ in range(len(self._events))]
            quiet = 0 if told else quiet + 1
            if quiet % IDLE_UPDATES == 0:
                viewers = list(self._viewers)  # who joins meanwhile begins with the state of then
                update = as_event(await self._update(told))
                for viewer in viewers:
                    await self._send(viewer, update)

    async def _send(self, viewer: asyncio.Queue[str], update: str) -> None:
        """Hand on an update; one who reads too slowly gets the newest state instead."""
        if viewer.full():
            while not viewer.empty():
                viewer.get_nowait()
            update = as_event(await self._update([], whole=True))
        viewer.put_nowait(update)

    async def _update(self, told: list[Json], *, whole: bool = False) -> Json:
        trees = {"trees": self._scene.trees()} if whole else {}
        now = {"now": time.monotonic_ns() / 1e6}
        return await self._state() | now | {"events": told} | trees

    async def _state(self) -> Json:
        """Return what changes while requests run."""
        service, pulse = self._service, self._service.pulse
        return {
            "healthy": service.broken is None,
            "paused": pulse.paused,
            "requests": {
                "running": service.running(),
                "waiting": service.waiting(),
                "concurrent": service.llm.config.concurrent,
                "max_queue": service.config.max_queue,
            },
            "tokens": {
                "generated": pulse.generated,
                "per_second": pulse.speed,
                "plain_per_second": pulse.plain,
            },
            "drafts": {
                "drafted": pulse.drafted,
                "judged": pulse.judged,
                "accepted": pulse.accepted,
                "acceptance_rate": pulse.accepted / pulse.judged if pulse.judged else None,
            },
            "busy_share": [stage.busy_share for stage in pulse.stages] or None,
            "memory": {
                "used_bytes": await self._used(),
                "needed_bytes": list(service.llm.memory_needed),
            },
        }

    async def _used(self) -> list[int]:
        measured, used = self._memory
        if not used or time.monotonic() - measured > MEMORY_S:
            used = await asyncio.get_running_loop().run_in_executor(None, self._measured)
            self._memory = time.monotonic(), used
        return used

    def _measured(self) -> list[int]:
        return self._service.llm.memory

    def _spell(self, token: int) -> str:
        if (text := self._texts.get(token)) is None:
            tokenizer = self._service.llm.tokenizer
            text = tokenizer.piece(token) or tokenizer.spelling(token) or ""
            self._texts[token] = text
        return text


class _Stream(StreamingResponse):
    """A response whose source is closed at once when the client has gone."""

    def __init__(self, source: AsyncGenerator[str, None], **settings: Any) -> None:
        super().__init__(source, **settings)
        self._source = source

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._source):
            await super().stream_response(send)


def facts(service: Service) -> Json:
    """Return what was decided when the pipeline was loaded."""
    llm = service.llm
    config, layout = llm.config, llm.layout
    inner = (found.config if found else None for found in layout.inner[1:])
    heads = [layout.head, *inner]
    return {
        "object": "pipeline",
        "model": service.names[0],
        "stages": [
            {
                "layers": bounds,
                "device": config.device(rank),
                "cores": list(layout.cores[rank]),
                "kernels": layout.kernels[rank],
                "head": head and {"kind": head.kind, "layers": head.layers},
                "pace_seconds": config.pace_of(rank) or None,
            }
            for rank, (bounds, head) in enumerate(zip(pairwise(layout.bounds), heads, strict=False))
        ],
        "plan": layout.reason,
        "mode": config.mode,
        "block": config.schedule.block,
        "in_flight": config.schedule.in_flight,
        "rows": config.most_rows if config.waves else None,
        "draft_source": Path(config.head).name if config.schedule.drafts else None,
        "acceptance": config.acceptance,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "max_context": layout.max_context,
    }


class TintedReply(ChatReply):
    """A chat whose stream also says of each piece of text if it was a right draft."""

    _newest: Chunk

    async def chunks(self, parts: Parts) -> AsyncIterator[Json]:
        """Yield the objects of a stream."""

        async def noted() -> Any:
            async for index, part in parts:
                if isinstance(part, Chunk):
                    self._newest = part
                yield index, part

        async for chunk in super().chunks(noted()):
            yield chunk

    def _piece(self, text: str) -> Json:
        pieces = [[piece.text, piece.accepted] for piece in self._newest.pieces if piece.text]
        return super()._piece(text) | {"pieces": pieces}
