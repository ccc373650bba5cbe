"""Answers of the server: their shapes, their text, and what becomes of each field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.logprobs import TokenLogprob
from ppsd.model.tokenizer import Tokenizer
from ppsd.serve.replies import ChatReply, TextReply
from ppsd.serve.schema import TextBody
from tests.serve.conftest import SETTINGS
from tests.support.http_server import Served, serving
from tests.support.tiny_models import save_tiny
from tests.unit.test_tokenizer import END, _byte_fallback, _byte_level, _wrap

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
ASK: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
PROMPT = {TEXT: {"prompt": "pack my box"}, CHAT: {"messages": MESSAGES}}
SAMPLED = {"temperature": 0.9, "seed": 5}


def reference(plain: LLM, path: str, **params: Any) -> Any:
    prompt = MESSAGES if path == CHAT else "pack my box"
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    given = {f: getattr(sampling, f) for f in ("max_tokens", "ignore_eos")}
    return plain.generate(prompt, SamplingParams(**{**given, **params}))[0]


def text_of(path: str, choice: dict[str, Any]) -> str:
    return choice["text"] if path == TEXT else choice["message"]["content"]


def piece_of(path: str, choice: dict[str, Any]) -> str:
    return choice["text"] if path == TEXT else choice["delta"].get("content", "")


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        SAMPLED,
        {**SAMPLED, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": {"100": 5.0, "7": -100}},
        {"max_tokens": 3, "min_tokens": 2},
    ],
    ids=str,
)
def test_an_answer_is_plain_decodings(server: Served, plain, path, fields) -> None:
    """Whole and streamed, each field with its effect."""
    bias = {int(k): v for k, v in fields.get("logit_bias", {}).items()}
    expected = reference(plain, path, **{**fields, "logit_bias": bias})
    body = {**PROMPT[path], **ASK, **fields}
    answer = server.post(path, body).json()
    [choice] = answer["choices"]
    assert text_of(path, choice) == expected.text
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    assert answer["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert answer["model"] == "tiny"
    events = server.events(path, body)
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(piece_of(path, choice) for choice in choices) == expected.text
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_chat_stream_begins_with_the_role_and_ends_with_usage(server) -> None:
    body = {**PROMPT[CHAT], **ASK, "stream_options": {"include_usage": True}}
    events = server.events(CHAT, body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == ASK["max_tokens"]
    assert events[-2]["choices"][0]["delta"] == {}
    assert events[-2]["timings"]["predicted_n"] == ASK["max_tokens"]
    assert not any("usage" in event for event in server.events(CHAT, {**PROMPT[CHAT], **ASK}))
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    counts = [event["usage"]["completion_tokens"] for event in server.events(CHAT, body)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, ASK["max_tokens"])


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stop_string_never_leaks(server, plain, path) -> None:
    whole = reference(plain, path).text
    stop = whole[4:6]
    end = whole.index(stop)
    body = {**PROMPT[path], **ASK, "stop": stop}
    [choice] = server.post(path, body).json()["choices"]
    assert (text_of(path, choice), choice["finish_reason"]) == (whole[:end], "stop")
    choices = [c for event in server.events(path, body) for c in event["choices"]]
    assert "".join(piece_of(path, c) for c in choices) == whole[:end]
    assert choices[-1]["finish_reason"] == "stop"


def test_stop_token_ids_end_an_answer(server, plain) -> None:
    token = reference(plain, TEXT).token_ids[3]
    first = reference(plain, TEXT).token_ids.index(token)
    body = {**PROMPT[TEXT], **ASK, "stop_token_ids": [token], "return_token_ids": True}
    answer = server.post(TEXT, body).json()
    assert len(answer["choices"][0]["token_ids"]) == first + 1
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_choice_i_has_seed_plus_i(server, plain, path) -> None:
    expected = [reference(plain, path, temperature=0.9, seed=5 + i).text for i in range(3)]
    body = {**PROMPT[path], **ASK, **SAMPLED, "n": 3}
    answer = server.post(path, body).json()
    assert [text_of(path, choice) for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * ASK["max_tokens"]
    streamed = ["", "", ""]
    for event in server.events(path, body):
        for choice in event["choices"]:
            streamed[choice["index"]] += piece_of(path, choice)
    assert streamed == expected


def test_prompts_come_as_texts_ids_and_batches_of_both(server, plain) -> None:
    ids = plain.encode("pack my box")
    expected = reference(plain, TEXT).text
    for prompt in (ids, ["pack my box"], [ids, "pack my box"]):
        answer = server.post(TEXT, {"prompt": prompt, **ASK}).json()
        count = 2 if len(prompt) == 2 else 1
        assert [choice["text"] for choice in answer["choices"]] == [expected] * count
        assert answer["usage"]["prompt_tokens"] == count * len(ids)


def test_a_fresh_seed_is_told_and_repeats_the_answer(server) -> None:
    body = {**PROMPT[TEXT], **ASK, "temperature": 1.5}
    first, second = server.post(TEXT, body).json(), server.post(TEXT, body).json()
    seed = first["seed"]
    assert seed != second["seed"]
    again = server.post(TEXT, {**body, "seed": seed}).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_a_repeated_prompt_tells_its_cached_tokens(server) -> None:
    body = {"prompt": list(range(30, 60)), **ASK}
    server.post(TEXT, body)
    usage = server.post(TEXT, body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 24  # whole prompt chunks
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0


def test_messages_come_in_parts_and_with_fields_of_others(server) -> None:
    parts = [{"type": "text", "text": "the quick "}, {"type": "text", "text": "brown fox"}]
    messages = [{"role": "user", "content": parts, "name": "x", "refusal": None}]
    expected = server.post(CHAT, {**PROMPT[CHAT], **ASK}).json()["choices"]
    assert server.post(CHAT, {"messages": messages, **ASK}).json()["choices"] == expected


def test_null_and_neutral_values_are_as_if_left_out(server) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    none = dict.fromkeys(("stop", "seed", "logit_bias", "n", "stream", "stream_options", "top_p"))
    body = {**PROMPT[CHAT], **ASK, **neutral, **none, "user": "u", "metadata": {"a": "b"}}
    expected = server.post(CHAT, {**PROMPT[CHAT], **ASK}).json()["choices"]
    assert server.post(CHAT, body).json()["choices"] == expected


def test_max_tokens_is_cut_to_the_context_and_has_openais_defaults(server) -> None:
    body = {**PROMPT[TEXT], "ignore_eos": True}
    assert server.post(TEXT, body).json()["usage"]["completion_tokens"] == 16
    chat = {**PROMPT[CHAT], "ignore_eos": True, "max_completion_tokens": 4}
    assert server.post(CHAT, chat).json()["usage"]["completion_tokens"] == 4
    long = {"prompt": [5] * 500, "ignore_eos": True, "max_tokens": 99}
    answer = server.post(TEXT, long).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_logprobs_of_a_chat(server, plain) -> None:
    body = {**PROMPT[CHAT], **ASK, "logprobs": True, "top_logprobs": 3}
    answer = server.post(CHAT, body).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == ASK["max_tokens"]
    rows = _logits(plain, MESSAGES)
    for entry, (position, token) in zip(content, rows["tokens"], strict=True):
        expected = rows["logits"][position][:296].double().log_softmax(0)
        assert entry["logprob"] == pytest.approx(float(expected[token]), abs=1e-12)
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]  # greedy: the likeliest
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
    events = server.events(CHAT, body)
    choices = [c for event in events for c in event["choices"] if c["logprobs"]]
    assert [e for c in choices for e in c["logprobs"]["content"]] == content


def _logits(plain: LLM, prompt: Any) -> dict[str, Any]:
    rows: dict[int, Any] = {}
    ids = plain.encode(prompt)
    said = plain.run(ids, SamplingParams(max_tokens=8, ignore_eos=True), logits=rows.__setitem__)
    return {"logits": rows, "tokens": list(enumerate(said.token_ids, len(ids)))}


def test_logprobs_of_completions_have_their_own_shape(server) -> None:
    body = {**PROMPT[TEXT], **ASK, **SAMPLED, "logprobs": 2}
    told = server.post(TEXT, body).json()["choices"][0]["logprobs"]
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), ASK["max_tokens"]
    )
    assert all(math.isfinite(value) and value < 0 for value in told["token_logprobs"])
    assert told["text_offset"][0] == 0
    streamed = [c["logprobs"] for e in server.events(TEXT, body) for c in e["choices"]]
    joined = {name: [v for s in streamed if s for v in s[name]] for name in told}
    assert joined == told


def test_a_completion_continues_its_prompt_with_a_space_and_a_chat_begins(tmp_path) -> None:
    tokenizer = _wrap(_byte_fallback())
    tokenizer.save_pretrained(save_tiny(tmp_path))
    bias = {str(tokenizer.convert_tokens_to_ids("▁a")): 100.0}
    fields = {"max_tokens": 3, "ignore_eos": True, "logit_bias": bias}
    with LLM(str(tmp_path), **SETTINGS) as own, serving(own) as server:
        for echo, text in ((False, " a a a"), (True, "ab a a a")):
            body = {"prompt": "ab", **fields, "logprobs": 1, "echo": echo}
            [choice] = server.post(TEXT, body).json()["choices"]
            assert choice["text"] == text
            assert choice["logprobs"]["text_offset"][-3:] == [len(text) - n for n in (6, 4, 2)]
            pieces = [c["text"] for event in server.events(TEXT, body) for c in event["choices"]]
            assert "".join(pieces) == text
        body = {"messages": [{"role": "user", "content": "ab"}], **fields}
        [choice] = server.post(CHAT, body).json()["choices"]
        assert choice["message"]["content"] == "a a a"


def _of(shape: type[Any], body: Any, said: list[str], top: list[str]) -> dict[str, Any]:
    """The log-probabilities that a reply tells of tokens by their spellings."""
    inner = _wrap(_byte_fallback())
    ids, likely = inner.convert_tokens_to_ids(said), inner.convert_tokens_to_ids(top)
    tops = tuple((token, -float(rank)) for rank, token in enumerate(likely))
    reply = shape("m", Tokenizer(inner, "m"), body, SamplingParams(), None, [[*ids, *likely]])
    return reply._logprobs(0, [TokenLogprob(token, -1.0, tops) for token in ids])


def test_tokens_with_and_without_a_space_have_names_of_their_own() -> None:
    said, top = ["▁a", "▁", "a"], ["a", "▁a", "<0xC3>", "<0xE9>", "<0x61>", "<unk>"]
    body = TextBody.model_validate({"prompt": "x", "logprobs": 5})
    told = _of(TextReply, body, said, top)
    assert told["tokens"] == [" a", " ", "a"]
    byte = _wrap(_byte_fallback()).convert_tokens_to_ids("<0x61>")
    names = ["a", " a", "<0xC3>", "<0xE9>", f"token_id:{byte}", "<unk>"]
    assert (
        list(told["top_logprobs"][0].items()) == [(n, -float(i)) for i, n in enumerate(names)][::-1]
    )
    told = _of(ChatReply, None, said, top)["content"]
    assert [(entry["token"], bytes(entry["bytes"])) for entry in told] == [
        *((" a", b" a"), (" ", b" "), ("a", b"a"))
    ]


@pytest.mark.parametrize(
    ("inner", "said", "offsets"),
    [
        (_byte_level(), ["Ñ", "s"], [0, 1]),
        (_byte_level(), ["Ñ", "Ñ", "s", "s"], [0, 1, 2, 3]),
        (_byte_level(), ["â", "Ĥ", "¬", "s"], [0, 0, 0, 1]),  # a character and what follows
        (_byte_level(), ["â", "Ĥ", "s", "s"], [0, 0, 1, 2]),
        (_byte_level(), ["ï", "¿", "½", "s"], [0, 0, 0, 1]),  # U+FFFD itself
        (_byte_fallback(), ["a", "<0xE6>", "<0x97>", "<0xA5>", "b", "▁a"], [0, 1, 1, 1, 2, 3]),
        (_byte_fallback(), ["<0xE6>", "<0x97>", "a", "a"], [0, 0, 2, 3]),
        (_byte_fallback(), ["<0x61>", "<0x61>", END, "a"], [0, 0, 0, 2]),
        (_byte_fallback(), ["<0x61>", "<0x61>", END, "a", "a"], [0, 0, 2, 9, 10]),  # echoed
    ],
    ids=str,
)
def test_a_token_stands_behind_what_those_before_turned_out_to_be(inner, said, offsets) -> None:
    tokenizer = _wrap(inner)
    ids = tokenizer.convert_tokens_to_ids(said)
    echo = {"prompt": f"aa{END}aa", "echo": offsets[-1] == 10}
    body = TextBody.model_validate({"logprobs": 0, **echo})
    reply = TextReply("m", Tokenizer(tokenizer, "m"), body, SamplingParams(), None, [ids[-1:]])
    told = reply._logprobs(0, [TokenLogprob(token, -1.0, ()) for token in ids])
    assert told["text_offset"] == offsets


def test_a_chat_template_finds_what_the_request_gives_it(llm) -> None:
    template = "{{ messages[0].content }}{{ mood }}{% if deep.think %}!{% endif %}"
    given = {"mood": " fox", "deep": {"think": True}}
    with LLM(str(llm.config.model), **SETTINGS | {"chat_template": template}) as own:
        with serving(own) as server:
            body = {**PROMPT[CHAT], **ASK, "chat_template_kwargs": given, "return_token_ids": True}
            choice = server.post(CHAT, body).json()["choices"][0]
            told = server.post("/tokenize", {**PROMPT[CHAT], "chat_template_kwargs": given}).json()
        assert choice["prompt_token_ids"] == own.encode("the quick brown fox fox!")
        assert told["tokens"] == choice["prompt_token_ids"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_drafts_are_counted_by_their_place_in_a_row(server, llm, path) -> None:
    answer = server.post(path, {**PROMPT[path], **ASK}).json()
    told = answer["metrics"]["speculative_decoding"]
    right = answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert told["num_accepted_tokens"] == sum(told["num_accepted_tokens_per_pos"]) == right
    assert told["num_drafts"] == ASK["max_tokens"] - right
    by_position = told["num_accepted_tokens_per_pos"]
    assert by_position == sorted(by_position, reverse=True)
    assert answer["timings"]["draft_n"] == told["num_draft_tokens"]
