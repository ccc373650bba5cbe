"""What the live page is fed with, and that the engine works alone while nobody looks."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine import engine, events, wave_engine
from ppsd.engine.answer import Completion
from ppsd.serve.config import ServerConfig
from ppsd.serve.live import Live, facts
from ppsd.serve.pulse import Pulse
from ppsd.serve.scene import Scene
from ppsd.serve.service import Service
from ppsd.speculation.gate import Switches
from ppsd.speculation.policy import UNVERIFIED, Feed
from ppsd.speculation.waves import Row
from tests.serve.conftest import SETTINGS
from tests.serve.test_serve_verb import started
from tests.support.http_server import Served

PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
CHAT = {"messages": [{"role": "user", "content": "the quick fox"}], "max_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def chain(tiny_model, head) -> Iterator[LLM]:
    """Chains of drafts: the engine that is not of waves."""
    with LLM(str(tiny_model()), **SETTINGS, mode="ppsd", head=head, gate=False) as llm:
        yield llm


@contextmanager
def watched(server: Served) -> Iterator[Iterator[dict[str, Any]]]:
    """Give the updates of the page's feed, and leave it at the end."""
    with server.client.stream("GET", "/v1/pipeline/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line)
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def observer(llm: LLM) -> object:
    return llm._running.stage.recorder.observer


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def recorded(llm: LLM, params: SamplingParams = PARAMS) -> tuple[list[events.Event], Completion]:
    """Run a request, and return what an observer saw of it."""
    seen: list[events.Event] = []
    llm.observe(seen.append)
    try:
        return seen, llm.run(PROMPT, params)
    finally:
        llm.observe(None)


def observed(llm: LLM, params: SamplingParams = PARAMS):
    """Run a request; return what a page is told, the answer, and the trees after each event."""
    seen, completion = recorded(llm, params)
    scene = Scene(str)
    told, trees = [], []
    for event in seen:
        told.append(scene.take(event))
        trees.append(scene.trees())
    return told, completion, trees


def check(told: list[dict[str, Any]], completion, trees: list[Any]) -> None:
    """Check that what is drawn is what happened, and the trees what a page would have drawn."""
    fed: dict[int, tuple[int, str]] = {}
    final, dead = [], set()
    hits = 0
    for each, now in zip(told, trees, strict=True):
        if each["kind"] == "fed":
            for _, node, parent, position, text in each["rows"]:
                assert node not in dead
                assert fed.setdefault(node, (position, text)) == (position, text)
                if parent in fed:
                    assert fed[parent][0] == position - 1
        elif each["kind"] == "made":
            for node, _, position, text, hit in each["path"]:
                assert position == len(PROMPT) + len(final)
                assert node not in dead
                if node in fed:
                    assert fed[node] == (position, text)
                fed[node] = position, text
                final.append(int(text))
                hits += hit
            dead.update(each["dead"])
            assert not dead & {node for node, *_ in each["path"]}
            [tree] = now
            assert tree["root"] == each["path"][-1][:4]
            assert [text for text, _ in tree["trail"]] == [str(token) for token in final[-12:]]
            assert not dead & {node for node, *_ in tree["nodes"]}
            assert all(fed[node] == (place, text) for node, _, place, text in tree["nodes"])
    assert tuple(final) == completion.token_ids
    assert hits == completion.stats.counts.accepted > 0
    assert completion.stats.counts.judged > hits
    assert len(dead) > 0
    assert told[-1]["kind"] in ("left", "ran")


def test_a_piece_of_a_prompt_and_a_wave_of_one_pass_have_their_own_lanes() -> None:
    scene = Scene(str)
    row = Row(slot=1, node=9, parent=8, position=5, token=4, cell=5, nodes=(), cells=())
    feed = Feed(1, 0, (6, 7), 0, 0, True, False, UNVERIFIED)
    piece = scene.take(events.FedBlock(70, 0, feed))
    wave = scene.take(events.FedRows(70, [row]))
    ran = [scene.take((70, 90, *about)) for about in (("prefill", 1, 0, 2), ("forward", 8, 5, 1))]
    assert [each["wave"] for each in ran] == [piece["wave"], wave["wave"]] == [1, 2]
    assert scene.take((90, 95, "draft", 8, 6, 1))["wave"] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_tree_is_drawn_as_it_grew(llm, temperature) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=temperature, seed=3)
    told, completion, trees = observed(llm, params)
    check(told, completion, trees)
    assert trees[-1] == []
    waves = [each["wave"] for each in told if each["kind"] == "fed"]
    assert waves == list(range(1, len(waves) + 1))


@pytest.mark.parametrize(
    "settings",
    [{"mode": "ppsd"}, {"mode": "draft-then-verify", "block": 3}, {"acceptance": "rejection"}],
)
def test_a_chain_is_drawn_as_it_grew(tiny_model, head, settings) -> None:
    settings = SETTINGS | {"mode": "ppsd", "gate": False, "head": head} | settings
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.7, seed=1)
    with LLM(str(tiny_model()), **settings) as llm:
        told, completion, trees = observed(llm, params)
    check(told, completion, trees)
    prompts = [each["prompt"] for each in told if "prompt" in each]
    assert sum(prompts) == len(PROMPT)


def test_one_stage_without_guesses_is_drawn(tiny_model) -> None:
    settings = SETTINGS | {"split": None, "stages": 1, "mode": "autoregressive", "head": "none"}
    with LLM(str(tiny_model()), **settings) as llm:
        told, completion, _ = observed(llm)
        about = facts(Service(llm, ServerConfig()))
    path = [node for each in told if each["kind"] == "made" for node in each["path"]]
    assert tuple(int(text) for *_, text, _ in path) == completion.token_ids
    assert not any(hit for *_, hit in path)
    assert [(stage["layers"], stage["head"]) for stage in about["stages"]] == [((0, 6), None)]
    assert about["draft_source"] is None


def test_many_requests_are_drawn_each_by_itself(llm) -> None:
    """Seven requests in three slots, whose waves they share."""
    seen: list[events.Event] = []
    llm.observe(seen.append)
    try:
        completions = llm.run_all([[*range(3, 20), 30 + i] for i in range(7)], PARAMS)
    finally:
        llm.observe(None)
    scene, slots, ended = Scene(str), dict[int, list[int]](), []
    for told in map(scene.take, seen):
        if told["kind"] == "made":
            slots.setdefault(told["slot"], []).extend(int(text) for *_, text, _ in told["path"])
        elif told["kind"] == "left":
            ended.append(tuple(slots.pop(told["slot"])))
    assert slots == {}
    assert sorted(ended) == sorted(completion.token_ids for completion in completions)


def test_a_page_that_comes_at_any_time_finds_its_way(llm, chain) -> None:
    for each in (llm, chain):
        seen, completion = recorded(each)
        for after in range(len(seen)):
            scene = Scene(str)
            told = [scene.take(event) for event in seen[after:]]
            made = [node for e in told if e["kind"] == "made" for node in e["path"]]
            count = len(made)
            tokens = tuple(int(text) for *_, text, _ in made)
            assert tokens == completion.token_ids[len(completion.token_ids) - count :]
            hits = tuple(hit for *_, hit in made)
            assert hits == completion.accepted[len(completion.accepted) - count :]


def test_nobody_looks_and_nothing_is_made(llm, chain, monkeypatch) -> None:
    def made(*_: Any) -> None:
        raise AssertionError("an event for nobody")

    for module, name in (
        (engine, "FedBlock"),
        (engine, "Made"),
        (engine, "Left"),
        (wave_engine, "FedRows"),
    ):
        monkeypatch.setattr(module, name, made)
    for each in (llm, chain):
        assert observer(each) is None
        assert len(each.run(PROMPT, PARAMS).token_ids) == 24


def test_the_engine_is_observed_only_while_a_page_is_open(server, llm) -> None:
    assert observer(llm) is None
    with watched(server) as first:
        next(first)
        assert observer(llm) is not None
        with watched(server) as second:
            next(second)
        next(first)
        assert observer(llm) is not None
    until(lambda: observer(llm) is None)


def test_a_generation_appears_in_the_feed(server) -> None:
    """Its tokens, in order; and what the state says of it afterwards."""
    before = server.client.get("/v1/pipeline").json()
    with watched(server) as updates:
        first = next(updates)
        assert [stage["layers"] for stage in first["stages"]] == [[0, 4], [4, 6]]
        assert first["trees"] == []
        body = {"prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
        ids = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
        tokenizer = server.service.llm.tokenizer
        spelled = [tokenizer.piece(token) or tokenizer.spelling(token) for token in ids]
        made: list[str] = []
        times = []
        for update in updates:
            times.append(update["now"])
            made += [n[3] for e in update["events"] if e["kind"] == "made" for n in e["path"]]
            if any(e["kind"] == "left" for e in update["events"]):
                break
        assert made == spelled
        assert all(later - earlier > 90 for earlier, later in pairwise(times))
    after = server.client.get("/v1/pipeline").json()
    assert after["tokens"]["generated"] == before["tokens"]["generated"] + 24
    assert after["drafts"]["accepted"] > before["drafts"]["accepted"]
    assert 0 < after["drafts"]["acceptance_rate"] < 1
    assert len(after["busy_share"]) == 2


def test_one_who_reads_too_slowly_gets_the_newest_state(server) -> None:
    async def send() -> list[str]:
        live, updates = Live(server.service), asyncio.Queue[str](2)
        for update in "abc":
            await live._send(updates, update)
        return [updates.get_nowait() for _ in range(updates.qsize())]

    [only] = asyncio.run(send())
    assert json.loads(only.removeprefix("data: "))["trees"] == []


def test_plain_decoding_is_told_where_it_was_measured(chain) -> None:
    completion, pulse = chain.run(PROMPT, PARAMS), Pulse()
    pulse.see(completion)
    assert pulse.plain is None
    for plain in (0.02, None):  # of a later request that knew nothing
        switches = Switches(plain=plain, times=[(1.0, False), (2.0, True)] if plain is None else [])
        pulse.see(replace(completion, stats=replace(completion.stats, gate=switches)))
        assert pulse.paused is (plain is None)
    assert pulse.plain == 50.0
    assert pulse.judged == 3 * completion.stats.counts.judged


def test_the_pipeline_is_described(server, llm) -> None:
    told = server.client.get("/v1/pipeline").json()
    assert told["model"] == "tiny"
    assert told["mode"] == "ppsd"
    assert told["rows"] == 2
    assert told["requests"] == {"running": 0, "waiting": 0, "concurrent": 3, "max_queue": 61}
    assert told["stages"][0]["head"] == {"kind": "transformer", "layers": 2}
    until(lambda: server.client.get("/v1/pipeline").json()["tokens"]["per_second"] is None)
    assert told["memory"]["needed_bytes"] == list(llm.memory_needed)
    assert all(used > 0 for used in told["memory"]["used_bytes"])


def test_an_open_page_does_not_hold_up_the_end(tiny_model) -> None:
    with started(tiny_model(), "--transport", "inprocess") as (process, url):
        with httpx.stream("GET", f"{url}/v1/pipeline/events", timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if "error" in line] == []
        assert process.wait(15) == 0  # long before --drain-timeout


def test_a_tinted_chat_is_the_chat(server) -> None:
    """The pieces make the text, and as many are right drafts as the usage says."""
    body = {**CHAT, "ignore_eos": True, "stream_options": {"include_usage": True}}
    events = server.events("/v1/pipeline/chat", body)
    plain = server.events("/v1/chat/completions", body)

    def text(events: list[dict[str, Any]]) -> str:
        return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])

    pieces = [piece for e in events for c in e["choices"] for piece in c.get("pieces", ())]
    assert "".join(piece for piece, _ in pieces) == text(events) == text(plain)
    accepted = events[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert 0 < sum(hit for _, hit in pieces) <= accepted


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EMFILE])
def test_the_server_starts_where_no_process_can_be_watched(llm, monkeypatch, number) -> None:
    def refuse(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    async def start() -> None:
        async with Service(llm, ServerConfig()).watching():
            pass

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    monkeypatch.setattr(LLM, "pids", [os.getpid()])
    asyncio.run(start())
