"""HTTP/1.1 as uvicorn speaks it, with a bound on what comes before a body."""

from __future__ import annotations

from typing import Any

ABORT = "ppsd.abort"  # in a request's scope: drops its connection and what nobody has read
MAX_HEAD = 1 << 16  # bytes of a request's line and headers, all but the newest piece received

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # uvicorn then takes h11, which has a bound of its own
    HTTP: Any = "auto"
else:

    class BoundedProtocol(HttpToolsProtocol):
        """Ends a connection whose headers do not end; httptools would hold all of them."""

        _head = 0  # bytes received of headers that are not complete

        def data_received(self, data: bytes) -> None:
            """Parse what has come, unless it is more of too much."""
            if self._head > MAX_HEAD:
                self._head = 0
                self.send_400_response("The headers are too long.")
                return
            self._head += len(data)
            super().data_received(data)

        def on_headers_complete(self) -> None:
            """Begin with the request."""
            self._head = 0
            super().on_headers_complete()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]  # our own

        def on_body(self, body: bytes) -> None:
            """Take a part of the body, which routes bound."""
            self._head = 0
            super().on_body(body)

    HTTP = BoundedProtocol
