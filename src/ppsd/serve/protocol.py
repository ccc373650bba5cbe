"""HTTP/1.1 as uvicorn speaks it, with bounds on what comes before a body, and when."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

ABORT = "ppsd.abort"  # in a request's scope: drops its connection and what nobody has read
PATIENCE_S = 60.0  # with a request's line and headers, and with each piece of its body
MAX_HEAD = 1 << 16  # bytes of a request's line and headers, all but the newest piece received

try:
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # uvicorn then takes h11, which has a bound of its own
    HTTP: Any = "auto"
else:

    class BoundedProtocol(HttpToolsProtocol):
        """Ends a connection whose headers do not end; httptools would hold all of them.

        It also ends one whose headers do not come. Uvicorn waits for the first ones for ever, and
        for later ones until their first byte.

        Who asks for HTTP/2 or a WebSocket is answered as if he had not. At the end of such headers
        llhttp stops, and takes whatever follows for another protocol, a body too; so it reads them
        again without what asks for one.
        """

        _head = 0  # bytes received of headers that are not complete
        _stop: int | None = None  # where in what came llhttp stopped
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
            self._parse(data)
            if self.cycle is None or self.cycle.response_complete:  # this began another request
                self._expect_head()

        def _parse(self, data: bytes) -> None:
            """Parse what has come, all of it, and some headers twice."""
            rest = memoryview(data)
            while rest:
                self._stop = None
                super().data_received(rest)  # type: ignore[arg-type]  # httptools takes it
                if self._stop is None or self.transport.is_closing():
                    return
                rest, head = rest[self._stop :], self._head_again()
                self.parser = httptools.HttpRequestParser(self)  # it may have closed for good
                with suppress(AttributeError):  # of httptools < 0.6.3; uvicorn does the same
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                super().data_received(head)

        def _head_again(self) -> bytes:
            """Return a request's line and headers, but for what asks for another protocol."""
            version = self.parser.get_http_version().encode()
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
            lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            return b"\r\n".join([*lines, b"", b""])

        def _asks_for_another(self) -> bool:
            """Return True of headers that are to be read again; CONNECT is no such request."""
            return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

        def _unsupported_upgrade_warning(self) -> None:
            """Note where llhttp stopped, which uvicorn has caught and says nothing of."""
            self._stop = sys.exc_info()[1].args[0]  # type: ignore[union-attr]

        def on_headers_complete(self) -> None:
            """Begin with the request."""
            if self._asks_for_another():
                return
            self._head = 0
            self._stop_waiting()
            super().on_headers_complete()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]  # our own

        def on_body(self, body: bytes) -> None:
            """Take a part of the body, which routes bound."""
            self._head = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            """End the body of a request that has begun."""
            if not self._asks_for_another():
                super().on_message_complete()

    HTTP = BoundedProtocol
