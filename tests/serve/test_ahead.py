"""Clients that read slowly: what they do not read yet is made and counted all the same."""

from __future__ import annotations

import asyncio

import pytest

from ppsd.serve.ahead import taken_at_once
from ppsd.serve.app import Completions
from ppsd.serve.config import ServerConfig
from ppsd.serve.refusals import RefusedError
from ppsd.serve.replies import TextReply
from ppsd.serve.schema import TextBody
from ppsd.serve.service import Service

PATIENCE_S = 30.0


async def counted(most: int, seen: list[int]):
    for number in range(most):
        seen.append(number)
        yield number
        await asyncio.sleep(0)
    raise KeyError("over")


def test_parts_are_taken_before_they_are_read() -> None:
    async def run() -> None:
        seen: list[int] = []
        with taken_at_once(counted(5, seen)) as parts:
            while len(seen) < 5:
                await asyncio.sleep(0)
            assert [await anext(parts) for _ in range(5)] == seen == [0, 1, 2, 3, 4]
            with pytest.raises(KeyError, match="over"):
                await anext(parts)

    asyncio.run(run())


def test_leaving_ends_what_runs_ahead() -> None:
    async def run() -> None:
        seen: list[int] = []
        with taken_at_once(counted(10**9, seen)) as parts:
            assert await anext(parts) == 0
        for _ in range(3):
            await asyncio.sleep(0)
        count = len(seen)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(seen) == count

    asyncio.run(run())


@pytest.fixture
def service(llm):
    made = Service(llm, ServerConfig())
    yield made
    made.close()


def body_of(**fields: object) -> TextBody:
    body = {"prompt": [5, 6], "max_tokens": 20, "ignore_eos": True}
    return TextBody.model_validate(body | fields)


def test_a_client_that_does_not_read_holds_no_room(service) -> None:
    """Its answer is complete once the engine has made it; others find room, and times are true."""

    async def stalls(message: object) -> None:
        await asyncio.sleep(PATIENCE_S)

    async def run() -> float:
        route = Completions(service, TextBody, TextReply)
        reply = service.reply(TextReply, body_of(stream=True))
        with service.room(reply):
            task = asyncio.ensure_future(route._answer(reply, stalls))
            end = asyncio.get_running_loop().time() + PATIENCE_S / 2
            while reply.held:
                assert asyncio.get_running_loop().time() < end
                await asyncio.sleep(0.01)
            assert service.active == 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return service.active

    assert asyncio.run(run()) == 0


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
