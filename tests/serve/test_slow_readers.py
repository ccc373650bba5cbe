"""Clients that read slowly: what they do not read yet is made and counted all the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ppsd.errors import RequestError
from ppsd.serve import service as serving
from ppsd.serve import stream
from ppsd.serve.app import Completions, create_app
from ppsd.serve.config import ServerConfig
from ppsd.serve.metrics import Watch
from ppsd.serve.protocol import ABORT
from ppsd.serve.refusals import RefusedError
from ppsd.serve.replies import TextReply
from ppsd.serve.schema import TextBody
from ppsd.serve.service import Service
from ppsd.serve.stream import StreamEnd

PATIENCE_S = 30.0


@pytest.fixture
def service(llm):
    made = Service(llm, ServerConfig())
    yield made
    made.close()


def body_of(**fields: object) -> TextBody:
    body = {"prompt": [5, 6], "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    return TextBody.model_validate(body | fields)


async def stalls(message: object) -> None:
    """Send to a client that does not read."""
    await asyncio.sleep(PATIENCE_S)


async def served_while_stalled(service: Service, asked: TextBody, until) -> TextReply:
    """Stream an answer to a client that does not read, until something is so; then it leaves."""
    reply = service.reply(TextReply, asked)
    with service.logged(reply), service.room(reply):
        answer = Completions(service, TextBody, TextReply)._answer(reply, stalls)
        task = asyncio.ensure_future(answer)
        async with asyncio.timeout(PATIENCE_S / 2):
            while not until(reply):
                await asyncio.sleep(0.01)
        assert service.active == 0, "others find room"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert service.active == 0
    return reply


def test_a_client_that_does_not_read_holds_no_room(service, monkeypatch) -> None:
    """Its answer is complete once the engine has made it, and is counted and logged as such."""
    lines: list[dict[str, object]] = []
    monkeypatch.setattr(serving, "log_request", lines.append)
    asked = body_of(stream=True)
    reply = asyncio.run(served_while_stalled(service, asked, lambda reply: reply.held == 0))
    assert reply.done == {}, "nothing was read"
    assert (lines[0]["finish"], lines[0]["completion_tokens"]) == ("length", 20)
    told = service.metrics.text().decode()
    assert 'request_success_total{finished_reason="length"} 1.0' in told
    assert 'finished_reason="abort"' not in told


def test_an_error_that_nobody_reads_ends_all_choices(service, monkeypatch) -> None:
    def fails(self, index: int, part: object, *, first: bool) -> None:
        raise RequestError("no")

    monkeypatch.setattr(Watch, "see", fails)
    asked = body_of(stream=True, n=3, temperature=1.0)
    asyncio.run(served_while_stalled(service, asked, lambda reply: service.active == 0))


def test_an_error_of_our_own_is_a_streams_last_event(server, monkeypatch, caplog) -> None:
    async def fails(self, parts):
        yield {"choices": []}
        raise ZeroDivisionError("x")

    monkeypatch.setattr(TextReply, "chunks", fails)
    body = {"prompt": "hi", "max_tokens": 2, "stream": True}
    response = server.post("/v1/completions", body)
    events = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert "an error of the server's own: ZeroDivisionError" in events[-1]
    assert "a stream failed" in caplog.text


def test_heads_of_the_page_feed_end(server) -> None:
    response = server.client.head("/v1/pipeline/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert server.client.get("/health").status_code == 200
    assert server.service.llm._running.stage.recorder.observer is None


def test_a_stream_that_the_end_of_the_server_cuts_off_before_it_began_is_told(
    service, monkeypatch
) -> None:
    async def ends(self, reply, send):
        raise asyncio.CancelledError

    monkeypatch.setattr(Completions, "_answer", ends)
    bodies = [{"type": "http.request", "body": body_of(stream=True).model_dump_json().encode()}]
    scope = {"type": "http", "method": "POST", "headers": [], "state": {"request_id": "x"}}

    async def receive() -> object:
        return bodies.pop() if bodies else await asyncio.sleep(PATIENCE_S)

    async def send(message: object) -> None:
        raise AssertionError("nothing is sent")

    with pytest.raises(RefusedError, match="the server is ending"):
        asyncio.run(Completions(service, TextBody, TextReply)(scope, receive, send))
    assert service.active == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_a_body_still_coming_when_the_server_ends_is_told(service, path) -> None:
    """Uvicorn cancels what is not answered by then."""
    sent: list[Any] = []

    async def send(message: object) -> None:
        sent.append(message)

    async def ended() -> None:
        coming = asyncio.Event()

        async def receive() -> object:
            coming.set()
            return await asyncio.sleep(PATIENCE_S)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        task = asyncio.ensure_future(create_app(service)(scope, receive, send))
        await coming.wait()
        task.cancel()
        await task

    asyncio.run(ended())
    assert sent[0]["status"] == 503
    assert b"the server is ending" in sent[1]["body"]


def test_who_does_not_read_the_error_that_ended_a_stream_is_cut_off(monkeypatch) -> None:
    monkeypatch.setattr(stream, "LAST_S", 0.05)
    aborted: list[None] = []
    scope = {ABORT: lambda: aborted.append(None)}
    asyncio.run(StreamEnd(RefusedError(408, "late"))(scope, stalls, stalls))
    assert aborted == [None]
    sent: list[Any] = []

    async def send(message: object) -> None:
        await asyncio.sleep(0.1)  # a slow reader of a whole answer has all the time it wants
        sent.append(message)

    asyncio.run(StreamEnd(None)(scope, stalls, send))
    assert (sent, aborted) == ([stream.END], [None])
