"""Answers as server-sent events: within the time that they have, and with an end of their own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send

from ppsd.serve.protocol import ABORT
from ppsd.serve.refusals import RefusedError
from ppsd.serve.replies import Parts, Reply

LOG = logging.getLogger(__name__)
LAST_S = 5.0  # patience with a reader for the error that ends its stream
LINE_ENDS = "\x85\u2028\u2029"  # to httpx and str.splitlines; JSON itself escapes the others
END: Message = {"type": "http.response.body", "body": b""}


class Limit:
    """The time that a request gave itself, from when this was made; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else asyncio.get_running_loop().time() + seconds

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Refuse what is not done in time."""
        try:
            async with asyncio.timeout_at(self._end):
                yield
        except TimeoutError:
            message = f"timeout: no complete answer within {self._seconds:g} seconds"
            raise RefusedError(408, message, "timeout", "timeout") from None


async def stream(reply: Reply, parts: Parts, limit: Limit, send: Send) -> RefusedError | None:
    """Send server-sent events; return the error that ended them, which can only be one of them."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async with limit.held():
            async for chunk in reply.chunks(parts):
                await send(_part(as_event(chunk)))
        await send(_part("data: [DONE]\n\n"))
    except asyncio.CancelledError:  # the client has gone, and this goes nowhere; or the server ends
        await send(_part(as_event(ending().to_json())))
        await send(END)
    except RefusedError as error:
        reply.refused = True
        return error
    except Exception as error:  # our own fault, which the stream's last event is to say
        LOG.exception("a stream failed")
        return own_error(error)
    return None


class StreamEnd:
    """The end of a stream, with the error that ended it; who does not read that one is cut off."""

    def __init__(self, error: RefusedError | None) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as an ASGI application does."""
        try:
            async with asyncio.timeout(None if self._error is None else LAST_S):
                if self._error is not None:
                    await send(_part(as_event(self._error.to_json())))
                await send(END)
        except TimeoutError:
            if (abort := scope.get(ABORT)) is not None:
                abort()
                await asyncio.sleep(0)  # until then the server thinks that an answer is missing


def ending() -> RefusedError:
    """Return what those hear who were not answered before the server ends."""
    return RefusedError(503, "the server is ending")


def as_event(content: object) -> str:
    """Return a server-sent event of JSON that is one line to all readers."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for mark in LINE_ENDS:
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    return f"data: {data}\n\n"


def _part(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


def own_error(error: Exception) -> RefusedError:
    """Return what a client hears of a fault that is not its own."""
    return RefusedError(500, f"an error of the server's own: {type(error).__name__}")
