"""Ports for servers that are told which to listen at."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a TCP port of this host that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
