"""Requests that are refused: in OpenAI's shape, naming the field, and leaving all in order."""

from __future__ import annotations

import gzip
import json
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from pydantic import ValidationError
from transformers.utils.chat_template_utils import render_jinja_template

from ppsd.errors import ConfigError, ModelError
from ppsd.model.tokenizer import Tokenizer
from ppsd.serve import schema
from ppsd.serve.config import ServerConfig
from ppsd.serve.refusals import RefusedError, refusal_of_body
from ppsd.serve.schema import (
    MAX_BODY,
    MAX_NESTED,
    MAX_PROMPTS,
    MAX_TOKENS,
    ChatBody,
    DetokenizeBody,
    TextBody,
)
from tests.support.http_server import Served, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HI, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "hi", **fields}


MALFORMED: list[tuple[tuple[str, Any], str | None, str]] = [
    ((CHAT, b""), None, "not valid JSON"),
    ((CHAT, b"{"), None, "not valid JSON"),
    ((CHAT, b'{"messages": "\xff"}'), None, "not valid JSON"),
    ((CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}'), None, "not valid JSON"),
    ((CHAT, b"[" * 50_000), None, "not valid JSON"),
    ((CHAT, b"[" * 100_000), None, "the body must have at most 65536 lists and objects"),
    ((TEXT, {"prompt": [[5]] * 40_000}), "prompt", "must be at most 128 prompts, got 40000"),
    ((CHAT, b'{"messages": [], "metadata": {"a": NaN}}'), None, "NaN is no number"),
    ((TEXT, b'{"prompt": "hi", "metadata": {"a": NaN}}'), None, "NaN is no number"),
    ((TEXT, b'{"prompt": "hi", "temperature": -Infinity}'), None, "-Infinity is no number"),
    ((TEXT, b'{"prompt": "hi", "temperature": 1e999}'), "temperature", "finite"),
    ((CHAT, []), None, "the body"),
    ((CHAT, "hi"), None, "the body"),
    ((CHAT, {}), "messages", "required"),
    ((CHAT, {"messages": []}), "messages", "at least 1"),
    ((CHAT, {"messages": "hi"}), "messages", "array"),
    ((CHAT, {"messages": ["hi"]}), "messages[0]", "is wrong"),
    ((CHAT, {"messages": [{"role": "user"}]}), "messages[0].content", "required"),
    ((CHAT, {"messages": [{"content": "hi"}]}), "messages[0].role", "required"),
    ((CHAT, {"messages": [{"role": 1, "content": "hi"}]}), "messages[0].role", "string"),
    (
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "messages[0].content",
        "parts of type text",
    ),
    ((CHAT, {"messages": [{**HI[0], "tool_calls": [{}]}]}), "messages[0].tool_calls", "supported"),
    (chat(temprature=1), "temprature", "did you mean temperature?"),
    (chat(tools=[{"type": "function"}]), "tools", "not supported"),
    (chat(top_logprobs=2), "top_logprobs", "unless logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    (chat(max_tokens=3, max_completion_tokens=4), "max_tokens", "left out beside"),
    (chat(max_completion_tokens=0), "max_completion_tokens", "max_completion_tokens must be an"),
    (chat(stream_options={"include_usage": True}), "stream_options", "unless stream"),
    (chat(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown field"),
    (
        chat(stream=True, stream_options={"continuous_usage_stats": True}),
        "stream_options",
        "include_usage",
    ),
    (
        chat(stream=True, stream_options={"include_obfuscation": True}),
        "stream_options.include_obfuscation",
        "not supported",
    ),
    (chat(temperature="hot"), "temperature", "valid number"),
    (chat(temperature=-1), "temperature", "in [0, 100], got -1"),
    (chat(temperature=True), "temperature", "valid number"),
    (chat(top_p=0), "top_p", "in (0, 1]"),
    (chat(n=0), "n", "greater than or equal to 1"),
    (chat(n=1.5, temperature=1), "n", "integer"),
    (chat(n=2), "n", "temperature 0"),
    (chat(n=129, temperature=1), "n", "less than or equal to 128"),
    (chat(n=65, temperature=1), "n", "n must ask for at most 64 choices"),
    ((TEXT, {"prompt": ["a"] * 65}), "prompt", "prompt must ask for at most 64 choices"),
    (chat(seed=-1), "seed", "in [0, "),
    (chat(stop=""), "stop", "non-empty"),
    (chat(stop=["a"] * 17), "stop", "at most 16"),
    (chat(stop=[1]), "stop[0]", "string"),
    (text(**{f"x{i}": 1 for i in range(5000)}), None, "at most 4096 names, got 5001"),
    (text(metadata={str(i): 1 for i in range(5000)}), None, "at most 4096 names, got 5000"),
    (chat(logit_bias={"x": 1}), "logit_bias", "integers as names, got 'x'"),
    (chat(logit_bias={"5": 1, "05": 2}), "logit_bias", "integers as names, got '05'"),
    (chat(logit_bias={"1" * 5000: 1}), "logit_bias", "integers as names, got '1"),
    (chat(logit_bias={"5": True}), "logit_bias[5]", "valid number"),
    (chat(logit_bias={" 5": 1}), "logit_bias", "integers as names, got ' 5'"),
    ((TEXT, b'{"prompt": "hi", "n": 1, "n": 1}'), "n", "must be given once"),
    ((TEXT, b'{"prompt": "hi", "metadata": {"a": 1, "\\u0061": 2}}'), "a", "must be given once"),
    (chat(logit_bias={"5": 101}), "logit_bias", "in [-100, 100]"),
    (chat(logit_bias={"296": 1}), "logit_bias", "in [0, 295]"),
    (chat(stop_token_ids=[9999]), "stop_token_ids", "in [0, 295]"),
    (chat(min_tokens=5, max_tokens=4), "min_tokens", "in [0, 4]"),
    (chat(stream="yes"), "stream", "boolean"),
    (chat(timeout=0), "timeout", "greater than 0"),
    (chat(timeout="1"), "timeout", "valid number"),
    (chat(chat_template_kwargs=[]), "chat_template_kwargs", "be an object"),
    (chat(chat_template_kwargs={"tools": 1}), "chat_template_kwargs", "must not name tools"),
    (text(chat_template_kwargs={}), "chat_template_kwargs", "unknown field"),
    (chat(prompt="hi"), "prompt", "unknown field"),
    ((CHAT, {"messages": [{"role": "user", "content": "a" * 2000}]}), "messages", "512"),
    ((TEXT, {}), "prompt", "required"),
    ((TEXT, {"prompt": ""}), "prompt", "0 tokens"),
    ((TEXT, {"prompt": []}), "prompt", "a text, a list of token ids"),
    ((TEXT, {"prompt": [1, "a"]}), "prompt", "a text, a list of token ids"),
    ((TEXT, {"prompt": [True]}), "prompt", "a text, a list of token ids"),
    ((TEXT, {"prompt": [296]}), "prompt", "in [0, 295]"),
    ((TEXT, {"prompt": [5] * 512}), "prompt", "1 to 511 tokens"),
    ((TEXT, {"prompt": [5] * 40_000}), "prompt", "1 to 511 tokens"),
    ((TEXT, {"prompt": [5] * 40_000 + [5.5]}), "prompt", "a text, a list of token ids"),
    ((TEXT, {"prompt": ["a"] * 129}), "prompt", "128"),
    (text(echo=1), "echo", "boolean"),
    (text(max_tokens=0), "max_tokens", "in [1, "),
    (text(max_tokens=0, echo=False), "max_tokens", "in [1, "),
    (text(max_tokens=-1, echo=True), "max_tokens", "in [1, "),
    (chat(max_tokens=0), "max_tokens", "in [1, "),
    (chat(echo=True), "echo", "unknown field"),
    (text(best_of=3), "best_of", "equal to n"),
    (text(suffix="x"), "suffix", "not supported"),
    (text(logprobs=-1), "logprobs", "greater than or equal to 0"),
    (("/tokenize", {}), "prompt", "must be given"),
    (("/tokenize", {"prompt": "a", "content": "a"}), "prompt", "only one"),
    (("/detokenize", {"tokens": [-1]}), "tokens", "in [0, 295]"),
    (("/detokenize", {"tokens": [5] * (MAX_TOKENS + 1)}), "tokens", "at most 1048576 items"),
]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": HI, "stop": [1] * 5000}),
        (TextBody, {"prompt": "hi", "stop_token_ids": ["a"] * 5000}),
        (DetokenizeBody, {"tokens": ["a"] * 5000}),
    ],
)
def test_of_many_values_that_are_wrong_one_is_told(kind, body, monkeypatch) -> None:
    """To collect an error of each takes half a minute where a body is full of them."""
    seen: list[int] = []

    def counted(error: ValidationError, known: object) -> RefusedError:
        seen.append(error.error_count())
        return RefusedError(400, "no")

    monkeypatch.setattr("ppsd.serve.schema.refusal_of_body", counted)
    with pytest.raises(RefusedError):
        kind.read(json.dumps(body).encode())
    assert seen == [1]


@pytest.mark.parametrize("begin", [b"[0],", b"{},", b"[", b'"a[\\"[", [0],', b"[\n"])
def test_too_many_lists_are_refused_before_any_is_made(begin, monkeypatch) -> None:
    """Millions take a parser seconds, in which it lets nothing else run."""
    monkeypatch.setattr(schema, "json", None)
    monkeypatch.setattr(TextBody, "model_validate_json", None)
    for cut in (b"", b"0]}", b'"'):
        body = b'{"prompt":[' + begin * MAX_NESTED + cut
        with pytest.raises(RefusedError, match=f"at most {MAX_NESTED} lists and objects"):
            TextBody.read(body)


def test_brackets_in_texts_are_no_lists() -> None:
    code = 'a["\\"] = {"\n": [[]]}; ' * MAX_NESTED
    for text in (code, code + '"', "[" * MAX_NESTED + "\\", '"[{' * MAX_NESTED):
        body = json.dumps({"prompt": [text, '\\"[', text], "metadata": {"a": [{}] * 30_000}})
        assert TextBody.read(body.encode()).prompt == [text, '\\"[', text]


def test_prompts_are_counted_before_they_are_looked_at(monkeypatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(schema, "_is_ids", lambda value: looked.append(value) or False)
    with pytest.raises(RefusedError, match=f"at most {MAX_PROMPTS} prompts"):
        TextBody.read(json.dumps({"prompt": [[5]] * 5000}).encode())
    assert len(looked) == 1  # all as the ids of one prompt


def test_of_a_long_value_no_more_is_written_than_is_told() -> None:
    class Item:
        written = 0

        def __repr__(self) -> str:
            Item.written += 1
            return "0"

    line = {"type": "int_type", "loc": ("seed",), "msg": "no", "input": [[Item()] * 5000]}
    error = SimpleNamespace(errors=lambda include_url: [line])
    told = str(refusal_of_body(error, ["seed"]))  # type: ignore[arg-type]
    assert told == f"seed is wrong: no, got {str([[0] * 50])[:80]}…"
    assert Item.written < 50


def error_of(response: Any) -> dict[str, Any]:
    """Return the error of an answer, which is all that it has."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(("asked", "param", "told"), MALFORMED)
def test_a_malformed_body_is_refused_by_the_field(server: Served, asked, param, told) -> None:
    path, body = asked
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post(path, content=content)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param), error
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600
    assert server.service.active == 0


def test_what_is_not_there_is_refused_in_the_same_shape(server) -> None:
    for status, method, path, body in [
        (404, "GET", "/v1/nothing", None),
        (404, "GET", "/v1/models/other", None),
        (404, "POST", f"{CHAT}/", {"messages": HI}),
        (404, "POST", CHAT, {"messages": HI, "model": "other"}),
        (405, "GET", CHAT, None),
        (405, "DELETE", "/health", None),
        (413, "POST", CHAT, {"messages": "a" * MAX_BODY}),
    ]:
        response = server.client.request(method, path, json=body)
        assert response.status_code == status, path
        error_of(response)
    error = error_of(server.post(CHAT, {"messages": HI, "model": "other"}))
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["type"] == "not_found_error"


def test_compressed_bodies_are_refused(server) -> None:
    plain = json.dumps({"prompt": "hi", "max_tokens": 1}).encode()
    for coding, status in [("gzip", 415), ("identity, br", 415), ("Identity", 200), ("", 200)]:
        content = gzip.compress(plain) if status == 415 else plain
        response = server.client.post(TEXT, content=content, headers={"content-encoding": coding})
        assert response.status_code == status, response.text
        if status == 415:
            assert (
                f"Content-Encoding must be identity, or left out, got '{coding}'"
                in (error_of(response)["message"])
            )


def test_thousands_of_choices_are_refused_before_any_is_prepared(server, monkeypatch) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("prepared")

    monkeypatch.setattr("ppsd.serve.replies.StreamDecoder", made)
    response = server.post(TEXT, {"prompt": [[5]] * 128, "n": 128, "temperature": 1})
    assert (response.status_code, error_of(response)["param"]) == (400, "n")


def test_no_argument_of_the_templates_own_functions_can_be_overridden(server) -> None:
    functions = (transformers.PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    own = {name for each in functions for name in signature(each).parameters} - {"kwargs"}
    for name in own:
        response = server.post(CHAT, {"messages": HI, "chat_template_kwargs": {name: 1}})
        assert response.status_code == 400, name
        assert error_of(response)["param"] == "chat_template_kwargs"


def test_a_prompt_that_is_too_long_has_openais_code(server) -> None:
    error = error_of(server.post(TEXT, {"prompt": [5] * 512}))
    assert error["code"] == "context_length_exceeded"
    assert error_of(server.post(TEXT, {"prompt": ""}))["code"] is None


def test_a_model_without_a_chat_template_refuses_messages(server, monkeypatch) -> None:
    """So does a base model; its texts can be asked for all the same."""

    def none(*_: Any) -> str:
        raise ModelError("no template")

    monkeypatch.setattr(Tokenizer, "_template", none)
    for path in (CHAT, "/tokenize"):
        response = server.post(path, {"messages": HI})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "messages")
        assert "--chat-template" in error["message"]
    assert server.post(TEXT, {"prompt": "hi", "max_tokens": 1}).status_code == 200


def test_a_full_queue_is_refused_and_told_when_to_come_again(server) -> None:
    body = {"prompt": "hi", "n": 5, "temperature": 1, "max_tokens": 2}
    with server.service.room(SimpleNamespace(choices=60)):
        response = server.post(TEXT, body)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["type"] == "rate_limit_error"
        assert server.client.get("/health").status_code == 200
    assert server.post(TEXT, body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_cannot_go_on_ends_alone(server, stream) -> None:
    """All tokens end the answer, and none may: nothing is left to say."""
    body = {"prompt": "hi", "stop_token_ids": list(range(296)), "min_tokens": 2, "stream": stream}
    response = server.post(TEXT, body)
    if stream:  # 200 has been said
        event = response.text.split("\n\n")[-2].removeprefix("data: ")
        error = json.loads(event)["error"]
    else:
        assert response.status_code == 400
        error = error_of(response)
    assert "min_tokens' ban" in error["message"]
    assert server.post(TEXT, {"prompt": "hi", "max_tokens": 2}).status_code == 200


def test_a_key_is_asked_for_but_not_by_health(llm) -> None:
    with serving(llm, api_key="secret") as served:
        for given in ("", "Bearer other", "secret", "Basic secret", "Bearer"):
            headers = {"authorization": given} if given else {}
            response = served.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
            assert "secret" not in response.text
        for right in ("Bearer secret", "bearer secret"):
            headers = {"authorization": right}
            assert served.client.get("/v1/models", headers=headers).status_code == 200
        assert served.client.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "::1"])
def test_this_machine_has_several_names(server: Served, host: str) -> None:
    assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_a_name_made_to_lead_here_is_refused_without_a_key(server: Served, host: str) -> None:
    for path in ("/v1/models", "/", "/health"):
        response = server.client.get(path, headers={"host": host})
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "foreign_host"


def test_a_page_from_elsewhere_is_refused_without_a_key(server: Served) -> None:
    """A form of it may be sent here without asking first."""
    for origin, status in [
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example:8000", 403),
        ("null", 403),
        ("http://localhost:3000", 200),
        ("http://[::1]:8000", 200),
        (server.url, 200),
    ]:
        body = {"prompt": "hi", "max_tokens": 1}
        assert server.post(TEXT, body, headers={"origin": origin}).status_code == status, origin


@pytest.mark.parametrize("key", ["", " \n", "a\nb", "a\x00b", "clé"])
def test_a_key_that_no_header_can_hold_is_refused(key, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^api_key must be printable ASCII text in one line"):
        ServerConfig(api_key=key)
    file = tmp_path / "key"
    file.write_text(key, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"^api_key_file must be "):
        ServerConfig(api_key_file=str(file)).with_key()


def test_a_key_has_no_space_around_it_as_headers_have_none() -> None:
    assert ServerConfig(api_key=" a b\r\n").api_key == "a b"
