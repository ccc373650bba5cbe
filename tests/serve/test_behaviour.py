"""The server at work: many clients, clients that leave, and the small routes."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.text_engine import TextEngine
from ppsd.serve import stream
from tests.support.http_server import Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHARES = ('stage_busy_share{stage="0"}', 'stage_busy_share{stage="1"}')
LONG = {"prompt": list(range(3, 250)), "max_tokens": 250, "ignore_eos": True}


class Ends(logging.Handler):
    """Waits for the log lines of requests that are over."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.arrived = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.arrived.release()


@pytest.fixture
def ends():
    handler, logger = Ends(), logging.getLogger("ppsd.serve")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def leave(
    server: Served,
    path: str,
    body: dict[str, Any],
    *,
    after: bytes = b"",
    until: Callable[[], object] = lambda: None,
) -> None:
    """Send a request, and go away once the answer has these bytes and ``until`` returns."""
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        seen = b""
        while after not in seen:
            received = connection.recv(1 << 16)
            assert received, seen  # else it would wait for ever
            seen += received
        until()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(server, llm, ends, monkeypatch, stream) -> None:
    """A stream in the middle of its text; a whole answer while its prompt is computed."""
    told, begun = [], threading.Event()
    take, begin = TextEngine._take, TextEngine.begin

    def counted(*arguments: Any) -> None:
        told.append(1)
        take(*arguments)

    def noted(*arguments: Any) -> None:
        begin(*arguments)
        begun.set()

    monkeypatch.setattr(TextEngine, "_take", counted)
    monkeypatch.setattr(TextEngine, "begin", noted)
    body = {**LONG, "stream": stream}
    after = b"data: " if stream else b""
    leave(server, TEXT, body, after=after, until=lambda: begun.wait(60))
    assert ends.arrived.acquire(timeout=60)
    assert ends.lines[0].endswith("finish=abort")
    assert server.service.active == 0
    llm._thread.call(lambda: None)  # which comes to its turn when nothing is under way
    assert len(told) < LONG["max_tokens"] / 2


def test_the_engine_is_at_work_before_a_stream_begins(server, monkeypatch) -> None:
    """Writing and reading events takes time, which the prompt need not wait for."""
    order: list[str] = []
    submit, part = LLM.submit, stream._part

    def submitted(*arguments: Any, **more: Any) -> Any:
        order.append("submitted")
        return submit(*arguments, **more)

    def written(text: str) -> Any:
        order.append("written")
        return part(text)

    monkeypatch.setattr(LLM, "submit", submitted)
    monkeypatch.setattr(stream, "_part", written)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": 2, "n": 2, "temperature": 1}
    server.events(CHAT, body)
    assert order[:4] == ["submitted"] * 2 + ["written"] * 2


def test_a_client_that_goes_away_while_it_waits_gives_up_its_place(server, ends) -> None:
    body = {**LONG, "stream": True}
    with ThreadPoolExecutor(5) as clients:
        list(clients.map(lambda _: leave(server, TEXT, body, after=b"\r\n\r\n"), range(5)))
    for _ in range(5):
        assert ends.arrived.acquire(timeout=60)
    assert server.service.active == 0


MIXED: list[dict[str, Any]] = [
    {"prompt": [*range(3, 40), 50 + i], "max_tokens": 6 + i % 3, "ignore_eos": True}
    | ({"temperature": 0.8, "seed": i} if i % 2 else {})
    | ({"stop_token_ids": [40 + i]} if i % 5 == 0 else {})
    for i in range(14)
]


def alone(plain: LLM, body: dict[str, Any]) -> tuple[int, ...]:
    fields = {name: value for name, value in body.items() if name != "prompt"}
    return plain.run(body["prompt"], SamplingParams(**fields)).token_ids


def test_answers_under_load_are_those_of_each_alone(server, plain, ends) -> None:
    """Greedy and seeded, streamed and not; some leave in the middle."""

    def ask(index: int) -> list[int] | None:
        body = {**MIXED[index], "return_token_ids": True}
        if index % 7 == 3:
            leave(server, TEXT, {**LONG, "stream": True}, after=b"data: ")
            return None
        if index % 3 == 0:
            events = server.events(TEXT, body)
            return [t for e in events for c in e["choices"] for t in c.get("token_ids", ())]
        return server.post(TEXT, body).json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(MIXED)) as clients:
        found = list(clients.map(ask, range(len(MIXED))))
    for index, ids in enumerate(found):
        if ids is not None:
            assert tuple(ids) == alone(plain, MIXED[index]), index
    for _ in MIXED:
        assert ends.arrived.acquire(timeout=60)
    assert server.service.active == 0


def test_logprobs_under_load_are_those_alone(server) -> None:
    bodies = [{**body, "logprobs": 2} if i % 2 else body for i, body in enumerate(MIXED[:6])]
    one_by_one = [server.post(TEXT, body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as clients:
        at_once = list(clients.map(lambda body: server.post(TEXT, body).json()["choices"], bodies))
    assert at_once == one_by_one
    assert [choices[0]["logprobs"] is not None for choices in at_once] == [False, True] * 3


def test_a_reader_that_stops_reading_holds_up_nobody(server, ends) -> None:
    """Its own request goes on, too, and its answer waits in the connection."""
    data = json.dumps({**LONG, "max_tokens": 30, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        with ThreadPoolExecutor(4) as clients:
            body = {"prompt": "hi", "max_tokens": 2}
            found = clients.map(lambda _: server.post(TEXT, body).status_code, range(8))
            assert set(found) == {200}
        for _ in range(9):
            assert ends.arrived.acquire(timeout=60)
        assert not any(line.endswith("abort") for line in ends.lines)


def test_160_requests_at_once_are_answered_or_refused(server, ends) -> None:
    """Each has a connection of its own, and all of them are sent together."""
    many, body = 160, {"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}
    [right] = server.post(TEXT, body).json()["choices"]
    together = threading.Barrier(many)

    def ask(_: int) -> tuple[int, dict[str, Any]]:
        host, port = server.url.removeprefix("http://").split(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=120)) as connection:
            connection.connect()
            together.wait(120)
            connection.request("POST", TEXT, json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    with ThreadPoolExecutor(many) as clients:
        found = list(clients.map(ask, range(many)))
    answered = [said["choices"] for status, said in found if status == 200]
    refused = [said["error"]["type"] for status, said in found if status == 429]
    assert answered == [[right]] * len(answered)
    assert refused == ["rate_limit_error"] * len(refused)
    assert len(answered) + len(refused) == many
    assert len(answered) >= server.service.capacity
    for _ in range(1 + many):
        assert ends.arrived.acquire(timeout=60)
    assert server.service.active == 0


def test_health_answers_while_requests_run(server, ends) -> None:
    """Many clients wait, with texts to turn into tokens."""
    body = {"prompt": "pack my box with five dozen jugs " * 10, "max_tokens": 4}
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(server.post, TEXT, body) for _ in range(6)]
        times = []
        while not all(request.done() for request in asked):
            begun = time.monotonic()
            assert server.client.get("/health").status_code == 200
            times.append(time.monotonic() - begun)
        assert {request.result().status_code for request in asked} == {200}
    assert sorted(times)[len(times) // 2] < 0.25


def test_metrics_count_what_was_answered(server, ends) -> None:
    """Also those who left; names are vLLM's, where they mean the same."""

    def told() -> dict[str, float]:
        text = server.client.get("/metrics").text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in samples}

    before = told()
    body = {"prompt": [5] * 20, "max_tokens": 4, "ignore_eos": True, "n": 2, "temperature": 1}
    server.post(TEXT, body)
    leave(server, TEXT, {**LONG, "stream": True}, after=b"data: ")
    for _ in range(2):
        assert ends.arrived.acquire(timeout=60)
    after = told()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["ppsd:prompt_tokens_total"] == 20
    assert grown["ppsd:generation_tokens_total"] >= 9
    assert grown['ppsd:request_success_total{finished_reason="length"}'] == 2
    assert grown['ppsd:request_success_total{finished_reason="abort"}'] == 1
    assert grown["ppsd:time_to_first_token_seconds_count"] == 3
    assert grown["ppsd:e2e_request_latency_seconds_count"] == 2
    assert grown["ppsd:request_queue_time_seconds_count"] == 2
    assert grown["ppsd:spec_decode_num_draft_tokens_total"] >= 1
    rows = grown["ppsd:spec_decode_num_drafts_total"]
    right = {name: n for name, n in grown.items() if "accepted_tokens_per_pos_total" in name}
    assert rows + sum(right.values()) == 8  # each token begins a row, or goes on with it
    assert sum(right.values()) == grown["ppsd:spec_decode_num_accepted_tokens_total"]
    assert after["ppsd:num_requests_running"] == after["ppsd:num_requests_waiting"] == 0


def test_metrics_tell_of_the_stages(server, llm) -> None:
    """Between two readings; also while requests follow each other without a pause."""
    names = ("kv_cache_usage_perc", "bubble_share", "rows_per_wave", *SHARES)

    def told() -> dict[str, float]:
        text = server.client.get("/metrics").text
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return {name: float(samples.get(f"ppsd:{name}", "nan")) for name in names}

    server.post(TEXT, {"prompt": [5] * 20, "max_tokens": 20, "ignore_eos": True})
    told()
    server.post(TEXT, {"prompt": [6] * 20, "max_tokens": 20, "ignore_eos": True})
    alone = told()
    assert 1 < alone["rows_per_wave"] < 4  # two and certain ones
    assert all(0 < alone[share] <= 1 for share in SHARES)
    assert alone["bubble_share"] == pytest.approx(1 - sum(alone[s] for s in SHARES) / 2)
    assert alone["kv_cache_usage_perc"] == 0
    assert told() == alone  # nothing was under way
    body = {**LONG, "max_tokens": 30, "stream": True}
    with server.client.stream("POST", TEXT, json=body) as response:
        readings = [told() for _ in response.iter_lines()]
    assert 247 <= 3 * 512 * max(r["kv_cache_usage_perc"] for r in readings) <= 277
    assert len({reading[SHARES[1]] for reading in readings}) > 2


def test_models_are_listed_by_all_their_names(server) -> None:
    listed = server.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "alias"]
    assert server.client.get("/v1/models/alias").json() == listed["data"][1]
    assert listed["data"][0]["max_model_len"] == 512
    body = {"prompt": "hi", "max_tokens": 1}
    assert server.post(TEXT, {**body, "model": "alias"}).json()["model"] == "alias"


def test_text_becomes_tokens_and_text_again(server, llm) -> None:
    text = "pack my böx 🦊"
    ids = llm.encode(text)
    told = server.post("/tokenize", {"prompt": text}).json()
    assert told == {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert server.post("/tokenize", {"content": text}).json() == told
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == text
    spelt = server.post("/tokenize", {"prompt": "pack", "return_token_strs": True}).json()
    assert len(spelt["token_strs"]) == spelt["count"]
    long = server.post("/tokenize", {"prompt": text * 100, "add_special_tokens": False}).json()
    assert long["count"] > 512  # more than the context
    assert server.post("/tokenize", {"prompt": ""}).json()["count"] == 0
    messages = [{"role": "user", "content": text}]
    told = server.post("/tokenize", {"messages": messages}).json()
    assert told["tokens"] == llm.encode(messages)


def test_the_tokenizer_is_described(server, llm) -> None:
    told = server.client.get("/tokenizer_info").json()
    assert (told["bos_token"], told["eos_token"], told["pad_token"]) == ("<s>", "</s>", None)
    assert told["vocab_size"] == llm.tokenizer.vocab_size
    assert told["model_max_length"] == 512
    assert told["chat_template"] == llm.config.chat_template


def test_it_is_not_ready_while_its_queue_is_full(server) -> None:
    assert server.client.get("/ready").status_code == 200
    with server.service.room(SimpleNamespace(choices=server.service.capacity)):
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_when_its_time_is_over(server, ends, stream) -> None:
    body = {**LONG, "timeout": 0.05, "stream": stream}
    response = server.post(TEXT, body)
    if stream:
        error = json.loads(response.text.split("data: ")[-1])["error"]
    else:
        assert response.status_code == 408
        error = response.json()["error"]
    assert (error["param"], error["code"]) == ("timeout", "timeout")
    assert error["message"] == "timeout: no complete answer within 0.05 seconds"
    assert ends.arrived.acquire(timeout=60)
    assert ends.lines[0].endswith("finish=refused")
    assert server.service.active == 0
    body = {"prompt": [5], "max_tokens": 1, "timeout": 60, "stream": stream}
    assert server.post(TEXT, body).status_code == 200
