"""A server of a tiny model on a real socket, and a client for it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from ppsd import LLM
from ppsd.serve.app import create_app
from ppsd.serve.config import ServerConfig
from ppsd.serve.protocol import HTTP
from ppsd.serve.service import Service


class Served:
    """A server under way; ``service`` is what stands behind it."""

    def __init__(self, service: Service, url: str) -> None:
        self.service = service
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the objects of a stream, which has to end as OpenAI's do."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[Served]:
    """Serve a model on a free port of this machine."""
    service = Service(llm, ServerConfig(**settings))
    config = uvicorn.Config(create_app(service), lifespan="on", log_level="error", http=HTTP)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        served = Served(service, f"http://127.0.0.1:{bound.getsockname()[1]}")
        try:
            yield served
        finally:
            served.client.close()
            server.should_exit = True
            thread.join(60)
            service.close()
