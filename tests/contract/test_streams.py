"""Streams left early, stopped by a string, or competing: the next request is never touched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.llm import Chunk, Completion
from ppsd.errors import ConfigError
from ppsd.speculation.gate import Gate
from tests.support.tiny_models import save_perfect_head, save_tiny

PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=[1.0, -1.0], ids=["right drafts", "wrong drafts"])
def llm(request, tiny_model, tmp_path_factory) -> Iterator[LLM]:
    head = save_perfect_head(tmp_path_factory.mktemp("head"), tiny_model(), 2, request.param)
    settings = {"split": (2, 4), "dtype": "float64", "transport": "inprocess", "block": 4}
    with LLM(str(tiny_model()), head=str(head), prefill_chunk=8, **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(tiny_model) -> Iterator[LLM]:
    settings = {"stages": 1, "dtype": "float64", "mode": "autoregressive"}
    with LLM(str(tiny_model()), **settings) as llm:
        yield llm


def drain(stream) -> tuple[list[Chunk], Completion]:
    chunks = []
    while True:
        try:
            chunks.append(next(stream))
        except StopIteration as end:
            return chunks, end.value


def test_chunks_add_up_to_the_completion(llm, plain) -> None:
    chunks, completion = drain(llm.stream(PROMPT, PARAMS))
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == completion.token_ids
    assert tuple(f for chunk in chunks for f in chunk.accepted) == completion.accepted
    assert sum(completion.accepted) == completion.stats.counts.accepted
    expected = plain.run(PROMPT, PARAMS)
    assert (completion.token_ids, completion.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize("leave_after", [0, 1, 3])
@pytest.mark.parametrize("mode", ["ppsd", "autoregressive"])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_request_after_one_left_early(llm, plain, leave_after, mode, reuse) -> None:
    """Also in another mode, whose engine must not take the old one's answers for its own."""
    config = llm.config
    stream = llm.stream(PROMPT, PARAMS)
    for _ in range(leave_after):
        next(stream)
    stream.close()
    llm.use(mode, *((config.block, config.in_flight) if mode == "ppsd" else ()))
    completion = llm.run([*PROMPT, 50], PARAMS, reuse=reuse)
    llm.use(config.mode, config.block, config.in_flight)
    assert completion.token_ids == plain.run([*PROMPT, 50], PARAMS).token_ids


def test_rows_of_a_stream_left_early_are_kept(llm, plain) -> None:
    stream = llm.stream(PROMPT, PARAMS)
    tokens = [token for _ in range(3) for token in next(stream).token_ids]
    stream.close()
    turn = [*PROMPT, *tokens, 50]
    completion = llm.run(turn, PARAMS, reuse=True)
    fewest = len(turn) - 2  # the newest token was not fed yet, unless the engine is ahead
    assert completion.stats.cached_tokens in (fewest, fewest + 1)
    assert completion.token_ids == plain.run(turn, PARAMS).token_ids


def test_work_of_a_stream_left_early_is_not_counted_with_the_next(llm) -> None:
    stream = llm.stream(PROMPT, PARAMS)
    next(stream)
    stream.close()
    blocks = [
        stage.blocks for stage in llm.run(PROMPT[:8], SamplingParams(max_tokens=1)).stats.stages
    ]
    assert blocks[0] == {"forward": 1}
    assert blocks[1:] == [{"verify": 1}] * 2


def test_a_stream_may_outlive_its_llm(tiny_model) -> None:
    with LLM(str(tiny_model()), split=(3,), dtype="float64", head="untrained") as llm:
        stream = llm.stream(PROMPT, PARAMS)
        next(stream)
    stream.close()


def test_requests_are_served_in_the_order_they_come(llm, plain) -> None:
    want = plain.run(PROMPT, PARAMS).token_ids
    streams = [llm.stream(PROMPT, PARAMS) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert llm.run([5], PARAMS).token_ids == plain.run([5], PARAMS).token_ids
    for stream in reversed(streams):
        assert drain(stream)[1].token_ids == want
    mode = llm.config.mode, llm.config.block, llm.config.in_flight
    last = llm.stream(PROMPT, PARAMS)
    next(last)
    llm.use("autoregressive")  # for what comes after the open stream
    assert drain(last)[1].token_ids == want
    assert llm.run(PROMPT, PARAMS).stats.counts.drafted == 0
    llm.use(*mode)
    with pytest.raises(ConfigError, match="n must be 1 in a stream, got 2"):
        next(llm.stream(PROMPT, SamplingParams(n=2, temperature=1.0)))


@pytest.mark.parametrize("place", range(0, 20, 3))
def test_a_stop_string_ends_every_mode_in_the_same_place(llm, plain, place) -> None:
    """Also when the last token allowed comes in the same commit: the reason is the stop string."""
    whole = plain.run(PROMPT, PARAMS)
    stop = whole.text[place : place + 2]
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,))
    expected = plain.run(PROMPT, params)
    got = llm.run(PROMPT, params)
    assert expected.finish_reason == "stop"
    assert got.text == expected.text == whole.text[: whole.text.index(stop)]
    assert got.token_ids == expected.token_ids == whole.token_ids[: len(got.token_ids)]
    assert (got.finish_reason, got.stats.new_tokens) == ("stop", len(got.token_ids))
    last = SamplingParams(max_tokens=len(got.token_ids), ignore_eos=True, stop=(stop,))
    assert llm.run(PROMPT, last).finish_reason == "stop"


def test_min_tokens_holds_for_stop_strings_too(llm, plain) -> None:
    whole = plain.run(PROMPT, PARAMS)
    stops = tuple(set(whole.text))[:16]
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop=stops, min_tokens=7)
    assert len(plain.run(PROMPT, params).token_ids) >= 7
    assert llm.run(PROMPT, params).text == plain.run(PROMPT, params).text


def test_every_end_of_sequence_that_a_model_names_ends_an_answer(tmp_path) -> None:
    """Each of its three files may name one of its own, and none is lost to another."""
    model = save_tiny(tmp_path)
    for name, end in (("config.json", 5), ("generation_config.json", [7])):
        record = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(record | {"eos_token_id": end}))
    with LLM(str(model), stages=1, dtype="float64", mode="autoregressive") as llm:
        assert llm.tokenizer.eos_ids == (2,)
        for end in (5, 7, 2, 9):
            params = SamplingParams(max_tokens=8, min_tokens=4, logit_bias={end: 99.0})
            ended = llm.run(PROMPT, params)
            reason = "length" if end == 9 else "stop"
            assert (len(ended.token_ids), ended.finish_reason) == (8 if end == 9 else 5, reason)
            ignoring = replace(params, ignore_eos=True)
            assert llm.run(PROMPT, ignoring).token_ids == (end,) * 8
            told = replace(ignoring, stop_token_ids=(end,))
            assert llm.run(PROMPT, told).finish_reason == "stop"


def test_drafts_are_as_before_once_plain_decoding_is_over(llm) -> None:
    """The head has seen no row of a plain request, so none of them may be taken over."""
    config = llm.config
    ppsd = ("ppsd", config.block, config.in_flight)
    other = PROMPT[::-1]
    counts = []
    for before in (None, "autoregressive"):
        llm.use(*ppsd, gate=False)
        llm.run(other, PARAMS)
        if before:
            llm.use(before, gate=False)
            llm.run(PROMPT, PARAMS)
        llm.use(*ppsd, gate=False)
        counts.append(llm.run(PROMPT, PARAMS, reuse=True).stats.counts)
    llm.use(config.mode, config.block, config.in_flight, gate=config.gate)
    assert counts[0].judged > 0
    assert counts[1] == counts[0]


def test_a_schedule_keeps_its_gate(llm) -> None:
    config, gate = llm.config, llm._engine.engine.gate
    assert isinstance(gate, Gate)
    for mode, schedule, settings in (
        ("autoregressive", (), {}),
        ("ppsd", (1, 2), {}),
        ("ppsd", (1, 2), {"gate": False}),
    ):
        llm.use(mode, *schedule, **settings)
        other = llm._engine.engine.gate
        assert other is not gate
        assert (other is None) == (mode == "autoregressive" or bool(settings))
    llm.use(config.mode, config.block, config.in_flight, gate=config.gate)
    assert llm._engine.engine.gate is gate


def test_the_times_of_a_request_lie_within_it(llm) -> None:
    start = time.monotonic()
    stats = llm.run(PROMPT, PARAMS).stats
    taken = time.monotonic() - start
    assert min(stats.prefill_seconds, stats.decode_seconds) > 0
    assert stats.prefill_seconds + stats.decode_seconds <= taken
