"""HTTP as clients and proxies speak it, well and badly, over plain sockets."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

from ppsd.serve import app, protocol
from ppsd.serve.protocol import HTTP, MAX_HEAD
from tests.serve.test_behaviour import LONG, Ends, ends
from tests.support.http_server import Served

__all__ = ["ends"]  # a fixture
PATH = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}


def request(body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {PATH} HTTP/{version}", "host: localhost", *headers]
    if not any(line.startswith("transfer-encoding") for line in headers):
        lines.append(f"content-length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 60)


def answer(server: Served, *pieces: bytes) -> bytes:
    """Send pieces apart, and return all that comes until the server closes."""
    with connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)
        received = b""
        while more := connection.recv(1 << 16):
            received += more
    return received


def texts(received: bytes) -> list[str]:
    """Return the texts of whole answers that stand one after another."""
    bodies = [part.split(b"\r\n\r\n", 1)[1] for part in received.split(b"HTTP/1.1 200 OK")[1:]]
    return [json.loads(body)["choices"][0]["text"] for body in bodies]


def test_requests_may_be_old_cut_up_or_in_a_row(server) -> None:
    """HTTP/1.0, chunks, an expected 100 Continue, and pipelined requests."""
    [text] = texts(answer(server, request(SHORT, version="1.0")))
    close = "connection: close"
    chunked = request(SHORT, close, "transfer-encoding: chunked")
    head, data = chunked.split(b"\r\n\r\n", 1)
    pieces = [b"%x\r\n%b\r\n" % (len(each), each) for each in (data[:9], data[9:], b"")]
    assert texts(answer(server, head + b"\r\n\r\n", *pieces)) == [text]
    expecting = request(SHORT, close, "expect: 100-continue")
    head, data = expecting.split(b"\r\n\r\n", 1)
    received = answer(server, head + b"\r\n\r\n", data)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert texts(received) == [text]
    assert texts(answer(server, request(SHORT) + request(SHORT, close))) == [text, text]


@pytest.mark.parametrize(
    "headers",
    [
        ("content-length: 3",),
        ("transfer-encoding: chunked", "content-length: 3"),
        ("content-length: -1",),
        ("bad header: x",),
    ],
)
def test_requests_that_proxies_could_read_in_two_ways_are_refused(server, headers) -> None:
    assert answer(server, request(SHORT, *headers)).startswith(b"HTTP/1.1 400 ")
    assert server.post(PATH, SHORT).status_code == 200


@pytest.mark.skipif(HTTP == "auto", reason="httptools is not installed")
@pytest.mark.parametrize("headers", [b"x: " + b"a" * (1 << 20), b"x: a\r\n" * (1 << 18)])
def test_headers_without_end_are_not_held(server, headers) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\n".encode()
    with connected(server) as connection:
        sent = 0
        with suppress(ConnectionError):  # the server hangs up, as it should
            connection.sendall(head)
            while sent < 64 << 20:
                connection.sendall(headers)
                sent += len(headers)
        assert sent < 64 << 20
    allowed = "x: " + "a" * (MAX_HEAD // 2)
    assert len(texts(answer(server, request(SHORT, "connection: close", allowed)))) == 1


H2C = ("Connection: Upgrade, HTTP2-Settings", "uPgRaDe: h2c", "HTTP2-Settings: AAMAAABk")
WEBSOCKET = ("UPGRADE: WebSocket", "connection: keep-alive, upgrade", "sec-websocket-version: 13")


@pytest.mark.skipif(HTTP == "auto", reason="httptools is not installed")
@pytest.mark.parametrize("asked", [H2C, WEBSOCKET])
def test_who_asks_for_another_protocol_is_answered_as_if_he_had_not(server, asked) -> None:
    """Java's HttpClient does so at first, and curl --http2; wherever the network cuts a request."""
    close = "connection: close"
    [text] = texts(answer(server, request(SHORT, close)))
    whole = request(SHORT, *asked, close)
    body, name = whole.index(b"\r\n\r\n") + 4, whole.lower().index(b"upgrade: ")
    for cut in (0, name + 3, name + 9, body - 3, body - 1, body, body + 1, len(whole) - 1):
        assert texts(answer(server, whole[:cut], whole[cut:])) == [text], whole[:cut]
    row = request(SHORT, *asked) + request(SHORT) + request(SHORT, *asked) * 2 + whole
    assert texts(answer(server, row)) == [text] * 5
    assert texts(answer(server, *[row[i : i + 100] for i in range(0, len(row), 100)])) == [text] * 5
    got = "\r\n".join(["GET /v1/models HTTP/1.1", "host: localhost", *asked, "", ""]).encode()
    assert answer(server, got, got + whole).count(b"HTTP/1.1 200 OK") == 3
    head, data = request(SHORT, *asked, close, "transfer-encoding: chunked").split(b"\r\n\r\n", 1)
    chunks = [b"%x\r\n%b\r\n" % (len(each), each) for each in (data[:9], data[9:], b"")]
    for pieces in ([head + b"\r\n\r\n" + b"".join(chunks)], [head + b"\r\n\r\n", *chunks]):
        assert texts(answer(server, *pieces)) == [text]
    expecting = request(SHORT, *asked, close, "expect: 100-continue")
    received = answer(server, expecting[: expecting.index(data)], data)
    assert received.count(b"HTTP/1.1 100 Continue\r\n\r\n") == 1
    assert texts(received) == [text]


def test_a_body_that_does_not_come_holds_nothing(server, ends: Ends) -> None:
    for cut in (1, len(request(LONG)) - 20):
        with connected(server) as connection:
            connection.sendall(request(LONG)[:-cut])
    assert server.post(PATH, SHORT).status_code == 200
    assert server.service.active == 0


def test_a_connection_that_sends_nothing_or_half_is_ended(server, monkeypatch) -> None:
    """A head has its time as a whole, a body for each of its pieces."""
    monkeypatch.setattr(protocol, "PATIENCE_S", 0.3)
    monkeypatch.setattr(app, "PATIENCE_S", 0.3)
    whole = request(SHORT)
    for pieces in ([], [whole[:30]], [whole[i : i + 1] for i in range(10)]):
        assert answer(server, *pieces) == b""
    received = answer(server, whole, whole[:30])  # and later ones, from their first byte on
    assert len(texts(received)) == 1
    received = answer(server, request(SHORT, "connection: close")[:-9])
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"the body must come without a pause of 0.3 seconds" in received
    head, data = request(SHORT, "connection: close").split(b"\r\n\r\n")
    slow = [data[i : i + 2] for i in range(0, len(data), 2)]  # takes longer than a pause may
    assert len(texts(answer(server, head + b"\r\n\r\n", *slow))) == 1


def test_one_who_closes_the_sending_half_counts_as_gone(server, ends: Ends) -> None:
    """From here, one who is gone altogether looks the same until something is sent."""
    with connected(server) as connection:
        connection.sendall(request(LONG))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert ends.arrived.acquire(timeout=60)
    assert ends.lines[0].endswith("finish=abort")
    assert server.service.active == 0
