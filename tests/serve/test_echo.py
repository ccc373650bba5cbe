"""Prompts that come back with their log-probabilities, by which evaluations score."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ppsd import LLM
from tests.serve.conftest import SETTINGS
from tests.support.http_server import Served, serving
from tests.support.tiny_models import VOCAB, load_reference

TEXT = "/v1/completions"
REAL = VOCAB - 4  # the others have no token
PROMPT = [5, 9, 30, 31, *range(40, 60), 7, 7, 250]  # three prompt chunks and a little
SCORE: dict[str, Any] = {"echo": True, "logprobs": 3}


@pytest.fixture(scope="module")
def reference(tiny_model):
    """The log-probabilities that transformers gives each next token, [n, REAL]."""
    model = load_reference(tiny_model())

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, :, :REAL].log_softmax(1)

    return logprobs


def check(told: dict[str, Any], ids: list[int], expected: torch.Tensor) -> None:
    """Compare the log-probabilities of ``ids`` with what was expected before each."""
    assert {len(values) for values in told.values()} == {len(ids)}
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for i, token in enumerate(ids[1:]):
        row = expected[i]
        own = told["token_logprobs"][i + 1]
        assert own == pytest.approx(float(row[token]), abs=1e-9)
        top = told["top_logprobs"][i + 1]
        values = list(top.values())[::-1]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-9)
        assert (own == max(values)) == (token == int(row.argmax()))  # what lm_eval looks at


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
@pytest.mark.parametrize("count", [1, 2, 8, 9, len(PROMPT)])
def test_a_prompts_tokens_are_scored_as_transformers_does(
    server: Served, reference, max_tokens, count
) -> None:
    """At the edges of prompt chunks, which have eight tokens here, and of new tokens behind."""
    prompt = PROMPT[:count]
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **SCORE}
    answer = server.post(TEXT, body | {"return_token_ids": True}).json()
    [choice] = answer["choices"]
    new = choice["token_ids"]
    assert len(new) == max_tokens == answer["usage"]["completion_tokens"]
    assert answer["usage"]["prompt_tokens"] == count
    assert choice["finish_reason"] == "length"
    check(choice["logprobs"], prompt + new, reference(prompt + new))


def test_prompts_are_texts_ids_and_batches_of_both(server, llm, reference) -> None:
    text = "pack my böx 🦊 now"
    ids = llm.encode(text)
    body = {"prompt": [text, ids, PROMPT], "max_tokens": 0, **SCORE}
    choices = server.post(TEXT, body).json()["choices"]
    for choice, of in zip(choices, (ids, ids, PROMPT), strict=True):
        check(choice["logprobs"], of, reference(of))
    assert choices[0]["text"] == choices[1]["text"] == text
    assert choices[2]["text"] == llm.tokenizer.decode(PROMPT)
    told = choices[0]["logprobs"]
    for token, name, offset in zip(ids, told["tokens"], told["text_offset"], strict=True):
        if "\ufffd" not in llm.tokenizer.decode([token]):  # no part of a character
            assert text[offset : offset + len(name)] == name


def test_special_tokens_of_an_echoed_text_have_their_place_in_it(server) -> None:
    body = {"prompt": "<s>pack my</s> box", "max_tokens": 1, "logit_bias": {"7": 100.0}, **SCORE}
    [choice] = server.post(TEXT, body).json()["choices"]
    told = choice["logprobs"]
    places = zip(told["tokens"], told["text_offset"], strict=True)
    assert [choice["text"][at : at + len(name)] for name, at in places] == told["tokens"]
    assert "</s>" in told["tokens"]


def test_a_stream_says_the_same(server) -> None:
    for fields in ({"max_tokens": 0}, {"max_tokens": 5, "ignore_eos": True}):
        body = {"prompt": ["pack my box", PROMPT], **fields, **SCORE, "return_token_ids": True}
        whole = server.post(TEXT, body).json()["choices"]
        events = server.events(TEXT, body)
        for index, choice in enumerate(whole):
            parts = [c for e in events for c in e["choices"] if c["index"] == index]
            assert "".join(part["text"] for part in parts) == choice["text"]
            told = [part["logprobs"] for part in parts if part["logprobs"]]
            joined = {name: [v for t in told for v in t[name]] for name in told[0]}
            assert joined == choice["logprobs"]
            assert parts[-1]["finish_reason"] == "length"


def test_an_echo_without_logprobs_is_text_alone(server) -> None:
    body = {"prompt": "pack my box", "max_tokens": 4, "ignore_eos": True}
    alone = server.post(TEXT, body).json()["choices"][0]["text"]
    [choice] = server.post(TEXT, body | {"echo": True}).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("pack my box" + alone, None)
    answer = server.post(TEXT, body | {"echo": True, "max_tokens": 0}).json()
    assert (answer["timings"]["predicted_n"], answer["timings"]["predicted_per_second"]) == (0, 0)
    body = {"prompt": "pack my box", "max_tokens": 2, "echo": True, "n": 2, "temperature": 1}
    choices = server.post(TEXT, body).json()["choices"]
    assert all(choice["text"].startswith("pack my box") for choice in choices)


def test_scores_are_the_same_under_load_and_leave_shared_rows_alone(server, reference) -> None:
    """A prompt that is there already is computed again, and lets others share its rows later."""
    bodies = [
        {"prompt": [*PROMPT, 60 + i], "max_tokens": i % 2, **SCORE} if i % 3 else
        {"prompt": [*PROMPT, 60 + i], "max_tokens": 4}
        for i in range(9)
    ]  # fmt: skip
    alone = [server.post(TEXT, body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as clients:
        found = list(clients.map(lambda body: server.post(TEXT, body).json()["choices"], bodies))
    assert found == alone
    check(found[4][0]["logprobs"], bodies[4]["prompt"], reference(bodies[4]["prompt"]))
    again = server.post(TEXT, bodies[0]).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
    assert again["choices"] == alone[0]


@pytest.mark.parametrize(
    "settings",
    [{"stages": 1, "mode": "autoregressive"}, {"mode": "autoregressive", "split": (2, 4)}],
    ids=str,
)
def test_one_stage_and_three_score_alike(tiny_model, reference, settings) -> None:
    given = {**SETTINGS, "split": None, **settings}
    with LLM(str(tiny_model()), **given) as llm, serving(llm) as served:
        answer = served.post(TEXT, {"prompt": PROMPT, "max_tokens": 0, **SCORE}).json()
        check(answer["choices"][0]["logprobs"], PROMPT, reference(PROMPT))
        assert all(map(math.isfinite, answer["choices"][0]["logprobs"]["token_logprobs"][1:]))


def test_a_reader_that_ends_lines_where_python_does_gets_whole_events(server: Served) -> None:
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1ce"
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with server.client.stream("POST", TEXT, json=body) as response:
        lines = [line for line in response.iter_lines() if line]  # by str.splitlines
    assert lines.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["choices"][0]["text"] for event in events).startswith(text)
