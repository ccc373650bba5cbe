"""HTTP/1.1 as uvicorn speaks it, with bounds on what comes before a body, and when."""

from __future__ import annotations

import asyncio
from typing import Any

ABORT = "ppsd.abort"  # in a request's scope: drops its connection and what nobody has read
PATIENCE_S = 60.0  # with a request's line and headers, and with each piece of its body
MAX_HEAD = 1 << 16  # bytes of a request's line and headers, all but the newest piece received

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # uvicorn then takes h11, which has a bound of its own
    HTTP: Any = "auto"
else:

    class BoundedProtocol(HttpToolsProtocol):
        """Ends a connection whose headers do not end; httptools would hold all of them.

        It also ends one whose headers do not come. Uvicorn waits for the first ones for ever, and
        for later ones until their first byte.
        """

        _head = 0  # bytes received of headers that are not complete
        _late: asyncio.TimerHandle | None = None  # ends the connection

        # Uvicorn narrows the type in the same way.
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Wait for the first headers."""
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """Wait for nothing more."""
            self._stop_waiting()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(PATIENCE_S, self.timeout_keep_alive_handler)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def data_received(self, data: bytes) -> None:
            """Parse what has come, unless it is more of too much."""
            if self._head > MAX_HEAD:
                self._head = 0
                self.send_400_response("The headers are too long.")
                return
            self._head += len(data)
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:  # this began another request
                self._expect_head()

        def on_headers_complete(self) -> None:
            """Begin with the request."""
            self._head = 0
            self._stop_waiting()
            super().on_headers_complete()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]  # our own

        def on_body(self, body: bytes) -> None:
            """Take a part of the body, which routes bound."""
            self._head = 0
            super().on_body(body)

        def _unsupported_upgrade_warning(self) -> None:
            """Say nothing: who asks for HTTP/2 or a WebSocket is answered as if he had not."""

    HTTP = BoundedProtocol
