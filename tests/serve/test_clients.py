"""OpenAI's own Python client, unmodified, against the server."""

from __future__ import annotations

import pytest

from tests.support.http_server import Served, serving

openai = pytest.importorskip("openai", reason="the extra `clients` is not installed")
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
MORE = {"extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Served):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_and_its_stream_say_the_same(client) -> None:
    ask = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8, **MORE}
    answer = client.chat.completions.create(**ask)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    with client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
    deltas = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(deltas) == choice.message.content
    assert events[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_answers_validate_as_openais_types(client, server) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    ask = {"max_tokens": 3, "ignore_eos": True, "n": 2, "temperature": 1, "seed": 4}
    chat = {"messages": MESSAGES, **ask, "logprobs": True, "top_logprobs": 2}
    text = {"prompt": "pack", **ask, "logprobs": 2}
    whole = server.post("/v1/chat/completions", chat).text
    ChatCompletion.model_validate_json(whole, strict=True)
    Completion.model_validate_json(server.post("/v1/completions", text).text, strict=True)
    for event in server.events("/v1/chat/completions", chat):
        ChatCompletionChunk.model_validate(event)


def test_models_and_completions(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    answer = client.completions.create(model="alias", prompt=[5, 6], max_tokens=3, logprobs=1)
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens


def test_errors_are_the_clients_own(client, llm) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean temperature") as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={"temprature": 1}
        )
    assert refused.value.param == "temprature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    bad = {"min_tokens": 2, "stop_token_ids": list(range(296))}
    with pytest.raises(openai.APIError, match="min_tokens"):  # once the stream has begun
        list(client.completions.create(model="tiny", prompt="a", stream=True, extra_body=bad))
    with serving(llm, api_key="right") as served:
        wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
