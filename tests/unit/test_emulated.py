"""Emulated devices on virtual clocks: the real engine, weights and heads, at exactly their pace."""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from threading import Event

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.events import FedBlock, Made
from ppsd.errors import ConfigError
from ppsd.lab.emulated import EmulatedPipeline
from tests.support.command import lab
from tests.support.tiny_models import save_tiny

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 3  # says something for lookup to copy
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
PACE = (0.3, 0.2, 0.5)


@pytest.fixture(scope="module")
def llm(tiny_model):
    settings = {"stages": 3, "dtype": "float32", "head": "untrained", "mode": "ppsd", "rows": 8}
    with LLM(
        str(tiny_model()), **settings, gate=False, pace=PACE, pipeline=EmulatedPipeline
    ) as llm:
        yield llm


def test_plain_decoding_takes_just_the_pace(llm) -> None:
    llm.use("autoregressive")
    stats = llm.run(PROMPT, PARAMS).stats
    assert stats.decode_seconds / 23 == pytest.approx(sum(PACE))
    assert stats.prefill_seconds == pytest.approx(sum(PACE))
    busy = [stage.busy_seconds for stage in stats.stages]
    assert busy == pytest.approx([24 * pace for pace in PACE])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_all_ways_of_decoding_agree_and_take_the_same_time_again(llm, temperature) -> None:
    params = SamplingParams(temperature, max_tokens=24, ignore_eos=True, seed=5)
    llm.use("autoregressive")
    plain = llm.run(PROMPT, params)
    for rows in (1, 8):
        llm.use("ppsd", rows=rows)
        first, second = (llm.run(PROMPT, params) for _ in range(2))
        assert first.token_ids == second.token_ids == plain.token_ids
        assert first.stats.decode_seconds == pytest.approx(second.stats.decode_seconds)


def test_hits_of_copies_save_whole_passes(tiny_model) -> None:
    """A tiny model soon repeats itself, and to see that takes no time."""
    settings = {"stages": 3, "dtype": "float32", "head": "lookup", "mode": "ppsd", "rows": 8}
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    with LLM(
        str(tiny_model()), **settings, gate=False, pace=PACE, pipeline=EmulatedPipeline
    ) as llm:
        stats = llm.run(PROMPT, params).stats
    assert stats.counts.accepted > 0
    assert stats.decode_seconds < 47 * sum(PACE) - stats.counts.accepted * min(PACE)


def test_many_requests_share_waves(tiny_model) -> None:
    prompts = [[*PROMPT, i] for i in range(4)]
    settings = {"stages": 2, "dtype": "float32", "mode": "autoregressive", "pace": (0.1,)}
    with LLM(str(tiny_model()), **settings, concurrent=4, pipeline=EmulatedPipeline) as llm:
        alone = [llm.run(ids, PARAMS) for ids in prompts]
        start = llm.now()
        together = llm.run_all(prompts, PARAMS)
        taken = llm.now() - start
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    # four prompts and then 23 waves of two pairs, which follow each other without a gap
    assert taken == pytest.approx(0.1 * (4 + 2 * 23 + 1), rel=0.1)


@pytest.mark.parametrize("mode", ["autoregressive", "ppsd"])
def test_a_long_prompt_holds_streams_up_by_two_pieces_at_most(tmp_path, mode: str) -> None:
    """A prompt of 1,000 tokens begins while eight streams are decoded."""
    model, pace = save_tiny(tmp_path), 0.1
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    settings = {"stages": 4, "dtype": "float32", "mode": mode, "pace": (pace,), "concurrent": 9}
    heads = {"head": "untrained", "rows": 10} if mode == "ppsd" else {}
    made: dict[int, list[int]] = defaultdict(list)  # when each slot's tokens came
    pieces: list[int] = []  # when those of prompts began
    streaming = Event()

    def watch(event: object) -> None:
        if isinstance(event, Made):
            made[event.slot].append(event.time)
            if len(made) == 8:
                streaming.set()
        elif isinstance(event, FedBlock):
            pieces.append(event.start)

    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with (
        LLM(str(model), **settings, **heads, pipeline=EmulatedPipeline) as llm,
        ThreadPoolExecutor(1) as others,
    ):
        llm.observe(watch)
        streams = others.submit(llm.run_all, [[5, i] for i in range(8)], params)
        assert streaming.wait(60)
        llm.run([7] * 1000, SamplingParams(max_tokens=1))
        streams.result()
    long = pieces[8:]
    assert len(long) == 8
    last = max(time for times in made.values() for time in times)
    assert long[-1] < last, "the streams were over too early to be held up"
    held_up, usual = [0.0], [0.0]  # seconds from token to token
    for before, after in chain.from_iterable(pairwise(times) for times in made.values()):
        beside = before < long[-1] + 4e9 * pace and after > long[0]
        (held_up if beside else usual).append((after - before) / 1e9)
    undisturbed = 4 * pace if mode == "autoregressive" else max(usual)  # heads take their time
    assert max(held_up) <= undisturbed + 2 * pace + 1e-6


@pytest.mark.parametrize("settings", [{"stages": 2}, {"stages": 1, "pace": (0.1,)}])
def test_without_a_pace_or_a_second_stage_nothing_is_emulated(tiny_model, settings) -> None:
    with pytest.raises(ConfigError, match="pace"):
        LLM(str(tiny_model()), **settings, pipeline=EmulatedPipeline)


def test_tasks_on_virtual_clocks(tiny_model, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("say 1\n")
    flags = f"--model {tiny_model()} --dtype float32 --head untrained --pace 5 --virtual --rows 1,4"
    result = lab("tasks", *flags.split(), "--prompts", str(prompts), "-n", "8", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["settings"]["verb"] == "tasks --virtual"
    assert [row["differing"] for row in record["rows"]] == [0] * len(record["rows"])


def test_a_load_on_virtual_clocks(tiny_model, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("say 1\nsay 2\n")
    flags = f"--model {tiny_model()} --dtype float32 --head untrained --rows 4 --pace 5 --virtual"
    result = lab("load", *flags.split(), "--prompts", str(prompts), "--concurrent", "2", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["differing"] for row in rows] == [0, 0]
    assert rows[0]["seconds"] > 100  # of the stages' time, in hardly any of ours
