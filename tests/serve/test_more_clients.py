"""Other clients of OpenAI's interface, unmodified; one that is not installed is skipped.

``make clients`` installs them all in the versions of the extra ``clients``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.http_server import Served
from tests.support.tiny_models import VOCAB, load_reference

TEXT = "the quick brown fox"
MESSAGES = [{"role": "user", "content": TEXT}]
MISSING = "the extra `clients` is not installed"
NODE = Path(sys.prefix, "node")  # where `make clients` puts OpenAI's package for JavaScript
SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: process.argv[3] }];
const ask = { model: "tiny", max_tokens: 6, messages };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const event of await client.chat.completions.create({ ...ask, stream: true })) {
  text += event.choices[0]?.delta?.content ?? "";
}
const models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify([whole.choices[0].message.content, text, models]));
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path) -> None:
    """Keep clients from asking the internet for prices, models or data."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "LITELLM_LOCAL_MODEL_COST_MAP"):
        monkeypatch.setenv(name, "True")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    # The package with the default model's weights is a plugin, whose imports are not installed.
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")


def expected(server: Served, **fields: Any) -> str:
    """Return the answer to the messages above, asked without a client."""
    body = {"messages": MESSAGES, "max_tokens": 6, **fields}
    answer = server.post("/v1/chat/completions", body).json()
    text: str = answer["choices"][0]["message"]["content"]
    assert text
    return text


def done(command: list[str]) -> str:
    """Run a command, which has to succeed, and return what it says."""
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said: str = ended.stdout
    return said


def test_litellm(server) -> None:
    litellm = pytest.importorskip("litellm", reason=MISSING)
    ask = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "max_tokens": 6,
    }
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content == expected(server)
    deltas = [
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)
    ]
    assert "".join(deltas) == expected(server)


def test_langchain(server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason=MISSING)
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=6
    )
    assert chat.invoke(TEXT).content == expected(server)
    assert "".join(chunk.content for chunk in chat.stream(TEXT)) == expected(server)


def test_smolagents(server) -> None:
    smolagents = pytest.importorskip("smolagents", reason=MISSING)
    model = smolagents.OpenAIServerModel(
        model_id="tiny", api_base=f"{server.url}/v1", api_key="none", max_tokens=6
    )
    content = [{"type": "text", "text": TEXT}]
    said = model.generate([smolagents.ChatMessage(role="user", content=content)])
    assert said.content == expected(server)


def test_llm(server, tmp_path) -> None:
    pytest.importorskip("llm", reason=MISSING)
    models = [{"model_id": "mine", "model_name": "tiny", "api_base": f"{server.url}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # which is YAML, too
    for flags in ((), ("--no-stream",)):
        command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "max_tokens", "6", *flags, TEXT]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.stdout.rstrip("\n") == expected(server).rstrip("\n"), done.stderr


def test_instructor(server) -> None:
    instructor = pytest.importorskip("instructor", reason=MISSING)
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    from typing import Literal

    import openai
    from pydantic import BaseModel, Field

    class Animal(BaseModel):
        kind: Literal["fox", "dog"]
        legs: int = Field(ge=0, le=9)

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        mode = instructor.Mode.JSON_SCHEMA
        wrapped = instructor.from_openai(client, mode=mode)
        found = wrapped.chat.completions.create(
            model="tiny", messages=MESSAGES, response_model=Animal, max_retries=0, max_tokens=60
        )
        assert isinstance(found, Animal)


PAIRS = [(f"{TEXT} jumps", f" over the lazy {noun}") for noun in ("dog", "fox", "jug")] * 4


@pytest.mark.parametrize("at_once", [1, 8])
def test_lm_eval_scores_as_transformers_does(server, tiny_model, at_once) -> None:
    clients = pytest.importorskip("lm_eval.models.openai_completions", reason=MISSING)
    from lm_eval.api.instance import Instance

    lm = clients.LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(tiny_model()),
        tokenizer_backend="huggingface",
        num_concurrent=at_once,
        batch_size=1 if at_once > 1 else 4,
        max_length=256,
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found = lm.loglikelihood(requests)
    model = load_reference(tiny_model())
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before, after = lm.tok_encode(context), lm.tok_encode(context + continuation)
        with torch.no_grad():
            logits = model(torch.tensor([after])).logits[0, :, : VOCAB - 4].log_softmax(1)
        rows, tokens = logits[len(before) - 1 : -1], after[len(before) :]
        want = sum(float(row[token]) for row, token in zip(rows, tokens, strict=True))
        assert value == pytest.approx(want, abs=1e-6)
        assert greedy == (rows.argmax(1).tolist() == tokens)


def test_lm_eval_chats(server) -> None:
    clients = pytest.importorskip("lm_eval.models.openai_completions", reason=MISSING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr

    lm = clients.LocalChatCompletion(
        model="tiny", base_url=f"{server.url}/v1/chat/completions", tokenizer_backend=None
    )
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    asked = (JsonChatStr(json.dumps(MESSAGES)), settings)
    [said] = lm.generate_until([Instance("generate_until", {}, asked, 0)])
    assert said == expected(server, stop=["\n\n"])


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
def test_guidellm(server, tmp_path) -> None:
    """It brings a PyTorch of its own, so `make clients` leaves it out."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text(f"{TEXT}\n" * 4)
    command = ["guidellm", "run", "--disable-console", "--data", f"kind=text_file,path={prompts}"]
    command += ["--backend", f"kind=openai_http,target={server.url},max_tokens=6"]
    command += ["--profile", "kind=concurrent,streams=2", "--output", f"kind=json,path={out}"]
    command += ["--constraint", "kind=max_requests,count=4"]
    subprocess.run(command, check=True, timeout=300)
    [benchmark] = json.loads(out.read_text())["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert (counts["successful"], counts["errored"]) == (4, 0)


@pytest.mark.skipif(shutil.which("aiperf") is None, reason="aiperf is not installed")
def test_aiperf(server, tiny_model, monkeypatch, tmp_path) -> None:
    """It wants other versions than these clients do, so `make clients` leaves it out, too."""
    monkeypatch.delenv("HF_HUB_OFFLINE")  # with which it finds no tokenizer in a directory
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": TEXT}) + "\n")
    command = ["aiperf", "profile", "--model", "tiny", "--url", server.url, "--streaming"]
    command += ["--endpoint-type", "chat", "--tokenizer", str(tiny_model()), "--ui-type", "none"]
    command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
    command += ["--concurrency", "2", "--request-count", "6", "--extra-inputs", "max_tokens:6"]
    done([*command, "--use-server-token-count", "--output-artifact-dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 6
    assert "error_request_count" not in found
    assert found["output_sequence_length"]["avg"] == 6


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk(server, tmp_path) -> None:
    """Eight connections ask again and again for two seconds."""
    script, body = tmp_path / "post.lua", json.dumps({"messages": MESSAGES, "max_tokens": 2})
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = '{body}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )
    command = ["wrk", "-t", "1", "-c", "8", "-d", "2s", "--timeout", "30s", "-s", str(script)]
    said = done([*command, f"{server.url}/v1/chat/completions"])
    assert int(re.search(r"(\d+) requests in", said)[1]) >= 8
    assert not re.search("Non-2xx|Socket errors", said), said


@pytest.mark.skipif(shutil.which("hey") is None, reason="hey is not installed")
def test_hey(server) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 2})
    command = ["hey", "-n", "16", "-c", "8", "-m", "POST", "-T", "application/json", "-d", body]
    said = done([*command, f"{server.url}/v1/chat/completions"])
    assert re.findall(r"\[(\d+)\]\s+(\d+) responses", said) == [("200", "16")], said


def test_openai_for_javascript(server, tmp_path) -> None:
    if shutil.which("node") is None or not (NODE / "node_modules" / "openai").is_dir():
        pytest.skip(f"node, or OpenAI's package in {NODE}, is not installed")
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    script = tmp_path / "client.mjs"
    script.write_text(SCRIPT)
    command = ["node", "--preserve-symlinks", str(script), f"{server.url}/v1", TEXT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected(server), expected(server), ["tiny", "alias"]]
