"""A client that times streams, many at once, in a process of its own if need be.

``python -m tests.stress.client`` reads one JSON line {"port", "bodies"} after another, sends the
bodies at once, and answers each line with what came.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

PATH = "/v1/chat/completions"


def timed(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a stream, its tokens, and the times from request to each piece of text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.connect()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body | options)
    begun = time.monotonic()
    connection.request("POST", PATH, data, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times, text, tokens = [], "", 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                times.append(time.monotonic() - begun)
                text += piece
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
    connection.close()
    return {"times": times, "text": text, "tokens": tokens}


def at_once(port: int, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what came of bodies that are sent at the same time."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda body: timed(port, body), bodies))


class Client(AbstractContextManager["Client"]):
    """The client as a process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.stress.client"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process: Any = subprocess.Popen(command, text=True, **pipes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def ask(self, port: int, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send bodies at once and return what came."""
        self._process.stdin.write(json.dumps({"port": port, "bodies": bodies}) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return found


if __name__ == "__main__":
    for asked in sys.stdin:
        print(json.dumps(at_once(**json.loads(asked))), flush=True)
