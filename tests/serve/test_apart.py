"""HTTP and the engine, neither of which waits for the other; told by counts, not by clocks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.responses import JSONResponse

from ppsd import LLM
from ppsd.engine.events import FedBlock, Made
from ppsd.engine.text_engine import TextEngine
from ppsd.model.tokenizer import Tokenizer
from ppsd.serve.replies import ChatReply, TextReply
from ppsd.serve.schema import SMALL_BODY
from tests.serve.test_behaviour import LONG
from tests.support.http_server import Served

PATH = "/v1/completions"


def holding(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, Callable[[], None]]:
    """Let the engine stop before its next step; return what says so, and what lets it go on."""
    stopped, free = threading.Event(), threading.Event()
    step = TextEngine.step

    def held(engine: TextEngine) -> None:
        stopped.set()
        free.wait(60)
        step(engine)

    monkeypatch.setattr(TextEngine, "step", held)
    return stopped, free.set


def test_everything_but_answers_comes_while_the_engine_stands(server, monkeypatch) -> None:
    stopped, go_on = holding(monkeypatch)
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.post, PATH, {"prompt": [5], "max_tokens": 2})
        assert stopped.wait(60)
        try:
            for path in (
                "/health",
                "/ready",
                "/metrics",
                "/v1/models",
                "/v1/pipeline",
                "/",
                "/docs",
            ):
                assert server.client.get(path).status_code == 200, path
            assert server.post("/tokenize", {"prompt": "pack my box"}).status_code == 200
            assert server.post(PATH, {"prompt": "hi", "temperature": -1}).status_code == 400
            assert not answer.done()
        finally:
            go_on()
        assert answer.result().status_code == 200


def test_the_engine_works_while_http_stands(server, monkeypatch) -> None:
    """A whole answer is made behind an event loop that does nothing at all."""
    standing, free, finished = threading.Event(), threading.Event(), threading.Event()
    finish = TextEngine._finish

    def stand() -> bytes:  # on the loop
        standing.set()
        free.wait(60)
        return b""

    def noted(*arguments: Any) -> None:
        finish(*arguments)
        finished.set()

    monkeypatch.setattr(server.service.metrics, "text", stand)
    monkeypatch.setattr(TextEngine, "_finish", noted)
    stopped, go_on = holding(monkeypatch)
    body = {"prompt": [5], "max_tokens": 20, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(2) as clients:
        answer = clients.submit(server.post, PATH, body)
        assert stopped.wait(60)
        clients.submit(server.client.get, "/metrics")
        assert standing.wait(60)
        go_on()
        try:
            assert finished.wait(60)
            assert not answer.done()
        finally:
            free.set()
        assert answer.result().text.endswith("data: [DONE]\n\n")


def test_a_long_prompt_lets_streams_go_on(server: Served, llm) -> None:
    """Of 31 pieces of a prompt, most are followed by something new in the streams beside it."""
    events: list[Any] = []
    stream = {"prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(2) as clients:
        streams = [clients.submit(server.post, PATH, stream) for _ in range(2)]
        while llm.totals().cache_used < 20 / (3 * 512):  # both are under way
            assert not any(each.done() for each in streams)
        llm.observe(events.append)
        try:
            answer = server.post(PATH, {**LONG, "max_tokens": 1})
        finally:
            llm.observe(None)
        assert not any(each.done() for each in streams)
        assert answer.status_code == 200
        assert all(each.result().status_code == 200 for each in streams)
    pieces = [i for i, event in enumerate(events) if isinstance(event, FedBlock)]
    assert len(pieces) == 31
    made = [e for e in events[pieces[0] : pieces[-1]] if isinstance(e, Made)]
    assert len(made) >= 16


def test_what_waits_for_its_tokens_waits(server: Served, monkeypatch) -> None:
    """It is not under way yet, and the time counts from when it was asked for."""
    held, free, encode = threading.Event(), threading.Event(), LLM.encode
    metrics = server.service.metrics

    def encoded(*arguments: Any) -> list[int]:
        held.set()
        free.wait(60)
        return encode(*arguments)

    def first() -> float:
        return metrics.first._sum.get()

    monkeypatch.setattr(LLM, "encode", encoded)
    before = first()
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.post, PATH, {"prompt": "hi", "max_tokens": 2})
        try:
            assert held.wait(60)
            begun = time.monotonic()
            told = server.client.get("/metrics").text
            assert "num_requests_running 0.0" in told
            assert "num_requests_waiting 1.0" in told
            time.sleep(0.2)
        finally:
            waited = time.monotonic() - begun
            free.set()
        assert answer.result().status_code == 200
    assert first() - before > waited


def test_short_texts_do_not_wait_for_long_ones(server: Served, monkeypatch) -> None:
    """Of another client, whose text takes its time."""
    long, free, encode = threading.Event(), threading.Event(), Tokenizer.encode

    def held(tokenizer: Tokenizer, text: str, **more: Any) -> list[int]:
        if len(text) > SMALL_BODY:
            long.set()
            free.wait(60)
        return encode(tokenizer, text, **more)

    monkeypatch.setattr(Tokenizer, "encode", held)
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.post, "/tokenize", {"prompt": "a" * (SMALL_BODY + 1)})
        try:
            assert long.wait(60)
            assert server.post("/tokenize", {"prompt": "a"}, timeout=10).status_code == 200
            assert server.post(PATH, {"prompt": "hi"}, timeout=10).status_code == 200
            assert not answer.done()
        finally:
            free.set()
        assert answer.result().status_code == 200


def test_long_answers_are_written_off_the_event_loop(server: Served, monkeypatch) -> None:
    """Also the scores of an echoed prompt, which a stream begins with."""
    threads: list[str] = []

    def noting(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def noted(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return method(*arguments)

        monkeypatch.setattr(kind, name, noted)

    noting(TextReply, "_logprobs")
    noting(ChatReply, "_logprobs")
    noting(JSONResponse, "render")
    noting(Tokenizer, "spelling")
    scored = {"prompt": [5] * 100, "echo": True, "max_tokens": 0, "logprobs": 5}
    messages = [{"role": "user", "content": "hi"}]
    many = {"logprobs": True, "top_logprobs": 20, "max_tokens": 60, "ignore_eos": True}
    for path, body in [
        ("/tokenize", {"prompt": "pack", "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6]}),
        (PATH, scored),
        (PATH, {**scored, "stream": True}),
        ("/v1/chat/completions", {"messages": messages, **many}),
    ]:
        threads.clear()
        assert server.post(path, body).status_code == 200
        assert threads
        assert all(name.startswith("ppsd-") for name in threads), path


def test_a_token_is_spelled_once_for_all_that_tells_it(server: Served, monkeypatch) -> None:
    alone: Counter[int] = Counter()
    piece = Tokenizer.piece

    def counted(tokenizer: Tokenizer, token: int) -> str:
        if threading.current_thread().name.startswith("ppsd-long-text"):
            alone[token] += 1
        return piece(tokenizer, token)

    monkeypatch.setattr(Tokenizer, "piece", counted)
    messages = [{"role": "user", "content": "hi"}]
    many = {"logprobs": True, "top_logprobs": 20, "max_tokens": 60, "ignore_eos": True}
    server.post("/v1/chat/completions", {"messages": messages, **many})
    assert set(alone.values()) == {1}
