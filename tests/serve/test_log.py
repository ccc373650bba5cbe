"""The lines of the log, and the ids by which requests are found in them."""

from __future__ import annotations

import logging

from ppsd.model.tokenizer import Tokenizer
from ppsd.serve.schema import MAX_BODY
from tests.serve.test_behaviour import CHAT, TEXT, ends

__all__ = ["ends"]  # a fixture
CLOSE = {"connection": "close"}  # as the server does after an error of its own


def test_a_request_has_an_id_its_own_or_one_that_is_made(server, ends) -> None:
    """The log tells it as well."""
    headers = {"x-request-id": "mine-1"}
    given = server.post(TEXT, {"prompt": [5], "max_tokens": 1}, headers=headers)
    assert given.headers["x-request-id"] == "mine-1"
    assert ends.arrived.acquire(timeout=60)
    assert " request_id=mine-1 " in ends.lines[0]
    made = [server.client.get("/v1/nothing").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]


def test_an_error_of_our_own_has_the_requests_id(server, monkeypatch) -> None:
    def fails() -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(server.service.metrics, "text", fails)
    response = server.client.get("/metrics", headers=CLOSE | {"x-request-id": "mine-2"})
    assert response.status_code == 500
    assert response.headers.get_list("x-request-id") == ["mine-2"]
    assert "ZeroDivisionError" in response.json()["error"]["message"]


def test_requests_that_are_refused_have_a_line_each(server, ends, monkeypatch) -> None:
    """Of its own making, with the id and without the text; a completion has but the one it has."""
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: 1 / 0)
    host, compressed = {"host": "evil.example"}, {"content-encoding": "gzip"}
    for status, method, path, body, headers in [
        (400, "POST", CHAT, {"secret": 1}, {}),
        (404, "POST", TEXT, {"prompt": "hi", "model": "other"}, {}),
        (404, "GET", "/v1/no%0Aline", None, {}),
        (405, "GET", CHAT, None, {}),
        (413, "POST", CHAT, "a" * MAX_BODY, {}),
        (415, "POST", CHAT, {}, compressed),
        (403, "GET", "/v1/models", None, host),
        (500, "POST", "/tokenize", {"prompt": "secret"}, {}),
    ]:
        named = {**CLOSE, "x-request-id": f"mine-{status}", **headers}
        response = server.client.request(method, path, json=body, headers=named)
        assert response.status_code == status
        assert ends.arrived.acquire(timeout=60)
        line = (
            f"request_id=mine-{status} method={method} path={path} status={status} finish=refused"
        )
        assert ends.lines.pop() == line
    assert server.post(TEXT, {"prompt": [999]}).status_code == 400
    assert ends.arrived.acquire(timeout=60)
    assert server.client.get("/health").status_code == 200
    [line] = ends.lines
    assert line.startswith("cmpl-")


def test_who_asks_for_another_protocol_is_answered_without_a_word(server, caplog) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.error")
    asked = {"connection": "Upgrade, HTTP2-Settings, close", "upgrade": "h2c"}
    assert server.client.get("/health", headers=asked).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.name[:7] == "uvicorn"] == []
