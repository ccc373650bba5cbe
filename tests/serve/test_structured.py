"""Answers that follow a JSON schema: valid, and those of plain constrained decoding."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.engine import grammar
from ppsd.engine.first_stage import FirstStage
from ppsd.errors import ConfigError
from ppsd.speculation.waves import WavePolicy
from tests.serve.conftest import SETTINGS
from tests.support.http_server import Served
from tests.support.tiny_models import VOCAB, load_reference, save_perfect_head

llguidance = pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "pack my box"}]
REAL, EOS = VOCAB - 4, 2


def object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: list[dict[str, Any]] = [
    object_of(kind={"enum": ["fox", "dog", "jug"]}, ok={"type": "boolean"}),
    object_of(n={"type": "integer", "minimum": 0, "maximum": 999}, s={"type": "null"}),
    {"type": "array", "items": {"enum": [1, "quick", None]}, "minItems": 2, "maxItems": 4},
    object_of(text={"type": "string", "maxLength": 6}, deep=object_of(a={"const": [1, 2]})),
]


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return True if a value follows one of the schemas above."""
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if schema["type"] == "object":
        wanted = schema["properties"]
        return value.keys() == wanted.keys() and all(fits(value[k], wanted[k]) for k in wanted)
    if schema["type"] == "array":
        length = schema["minItems"] <= len(value) <= schema["maxItems"]
        return length and all(fits(each, schema["items"]) for each in value)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return type(value) is {"boolean": bool, "null": type(None)}[schema["type"]]


@functools.cache
def tokens_of(backend: str) -> Any:
    return llguidance.LLTokenizer(backend, eos_token=[EOS])


def matcher(llm: LLM, schema: dict[str, Any]) -> Any:
    """Return llguidance's own state of an answer that is still empty."""
    tokenizer = tokens_of(llm.tokenizer.backend)
    text = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides=grammar.SPACING
    )
    return llguidance.LLMatcher(tokenizer, text)


@pytest.fixture(scope="module")
def constrained(tiny_model, plain):
    """Plain constrained decoding by transformers and llguidance, a token at a time, greedy."""
    model = load_reference(tiny_model())

    def answer(prompt: list[int], schema: dict[str, Any], most: int) -> list[int]:
        state, said = matcher(plain, schema), list[int]()
        while len(said) < most and EOS not in said:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + said])).logits[0, -1, :REAL]
            bits = torch.tensor([bool(each) for each in state.compute_logit_bias()])[:REAL]
            said.append(int(logits.masked_fill(~bits, -torch.inf).argmax()))
            assert state.consume_token(said[-1])
        return said

    return answer


@pytest.fixture
def fed(monkeypatch):
    """Collect the answers so far that rows are fed with: right ones, and drafts."""
    rows: list[list[int]] = []
    feed, start = WavePolicy.feed, FirstStage.start

    def feed_and_note(self, parent, wave):
        node = feed(self, parent, wave)
        if node is not None:
            committed = self.tokens(self.committed - self.emitted, self.committed)
            rows.append([*committed, *(self.branch(node.id) or ())])
        return node

    def start_and_note(self, sequence, feed):
        work = start(self, sequence, feed)
        end = feed.position + len(feed.tokens)
        rows.append(list(sequence.history.ids(len(sequence.request.prompt), end)))
        return work

    monkeypatch.setattr(WavePolicy, "feed", feed_and_note)
    monkeypatch.setattr(FirstStage, "start", start_and_note)
    return rows


PARAMS = [
    SamplingParams(max_tokens=60),
    SamplingParams(max_tokens=60, temperature=0.9, seed=4),
    SamplingParams(max_tokens=60, temperature=1.3, seed=5, top_p=0.9, frequency_penalty=0.5),
    SamplingParams(max_tokens=60, repetition_penalty=1.3, logit_bias={93: 3.0}),
]
RIGHT, WRONG = 0.3, -1.0
VARIANTS: list[tuple[float, dict[str, Any]]] = [
    (RIGHT, {"split": None, "stages": 1, "mode": "autoregressive"}),
    (RIGHT, {"mode": "ppsd"}),
    (WRONG, {"mode": "ppsd"}),
    (RIGHT, {"mode": "draft-then-verify", "block": 3}),
    (RIGHT, {"mode": "ppsd", "rows": 4}),
    (WRONG, {"mode": "ppsd", "rows": 4, "transport": "auto"}),
    (WRONG, {"mode": "autoregressive", "concurrent": 2}),
]


def test_plain_decoding_follows_the_schema(plain, constrained) -> None:
    for schema in SCHEMAS:
        prompt = plain.encode("pack my box")
        found = plain.run(prompt, PARAMS[0], grammar=plain.json_grammar(schema))
        assert list(found.token_ids) == constrained(prompt, schema, 60)
        assert found.finish_reason == "stop"
        assert fits(json.loads(found.text), schema)


@pytest.mark.parametrize(("sign", "variant"), VARIANTS, ids=str)
def test_drafts_change_no_token_and_forbidden_ones_are_never_fed(
    tiny_model, plain, tmp_path, fed, variant, sign
) -> None:
    head = save_perfect_head(tmp_path, tiny_model(), 4, sign)
    settings = {**SETTINGS, "head": str(head), **variant}
    if variant["mode"] == "autoregressive":
        del settings["head"]
    prompt = plain.encode("the quick brown")
    with LLM(str(tiny_model()), **settings) as llm:
        for schema, params in [*zip(SCHEMAS, PARAMS, strict=True), (SCHEMAS[3], PARAMS[0])]:
            expected = plain.run(prompt, params, grammar=plain.json_grammar(schema))
            fed.clear()
            found = llm.run(prompt, params, grammar=llm.json_grammar(schema))
            assert found.token_ids == expected.token_ids
            assert fits(json.loads(found.text), schema)
            assert fed
            for answer in fed:
                until = answer[: answer.index(EOS) + 1] if EOS in answer else answer
                assert matcher(llm, schema).validate_tokens(until) == len(until)


def asked(index: int, **more: Any) -> dict[str, Any]:
    schema = {"name": "x", "schema": SCHEMAS[index % len(SCHEMAS)], "strict": True}
    body = {"messages": HI, "seed": index, "temperature": 0.8 * (index % 2), "max_tokens": 70}
    return {
        **body,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "return_token_ids": True,
        **more,
    }


def test_many_at_once_are_as_each_alone(server: Served, plain) -> None:
    """Beside free ones, whose rows share their waves."""
    bodies = [asked(i) if i % 3 else {"messages": HI, "max_tokens": 9} for i in range(12)]
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = list(clients.map(lambda body: server.post(CHAT, body).json(), bodies))
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        [choice] = answer["choices"]
        if "response_format" not in body:
            expected = plain.generate(HI, SamplingParams(max_tokens=9))[0]
            assert choice["message"]["content"] == expected.text
            continue
        schema = SCHEMAS[i % len(SCHEMAS)]
        params = SamplingParams(max_tokens=70, seed=i, temperature=body["temperature"])
        expected = plain.run(plain.encode(HI), params, grammar=plain.json_grammar(schema))
        assert tuple(choice["token_ids"]) == expected.token_ids
        assert fits(json.loads(choice["message"]["content"]), schema)
        assert choice["finish_reason"] == "stop"


def test_a_stream_says_the_same_with_the_models_own_logprobs(server) -> None:
    body = asked(3, logprobs=True, top_logprobs=1)
    [choice] = server.post(CHAT, body).json()["choices"]
    events = server.events(CHAT, body)
    parts = [c for event in events for c in event["choices"]]
    said = "".join(part["delta"].get("content", "") for part in parts)
    assert said == choice["message"]["content"]
    content = choice["logprobs"]["content"]
    assert any(entry["logprob"] < entry["top_logprobs"][0]["logprob"] for entry in content)


def test_a_json_object_is_one_as_far_as_it_goes(server) -> None:
    for path, prompt in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "pack"})):
        body = {**prompt, "response_format": {"type": "json_object"}, "max_tokens": 40}
        for seed in range(4):
            answer = server.post(path, body | {"temperature": 1, "seed": seed}).json()
            [choice] = answer["choices"]
            text = choice["text"] if path == TEXT else choice["message"]["content"]
            assert text.startswith("{")
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(text), dict)


def test_what_is_no_schema_is_refused(server) -> None:
    def wanting(schema: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    for given, param, told in [
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format", "if, and only if, its type"),
        ({"type": "text", "json_schema": {}}, "response_format", "if, and only if"),
        (wanting([]), "response_format.json_schema.schema", "be an object"),
        (wanting({"type": "wibble"}), "response_format", "Invalid type: wibble"),
        (wanting({"not": {}}), "response_format", "not"),
        (wanting({"enum": ["x" * 70_000]}), "response_format", "at most 65536 characters"),
        (wanting({"const": float("nan")}), None, "not valid JSON"),
        (wanting({"const": 1e999}), "response_format", "finite numbers"),
        ({"type": "json_object", "x": 1}, "response_format.x", "unknown field"),
    ]:
        body = json.dumps({"messages": HI, "response_format": given}).replace("Infinity", "1e999")
        response = server.client.post(CHAT, content=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert told in error["message"]
    body = asked(1, ignore_eos=True)
    error = server.post(CHAT, body).json()["error"]
    assert error["param"] == "ignore_eos"
    assert server.service.active == 0


def test_without_the_extra_it_is_named(plain, monkeypatch) -> None:
    monkeypatch.setattr(grammar, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ppsd-llm\[structured\]'"):
        grammar.Grammars(plain.tokenizer.backend, REAL, (EOS,))
