"""Many requests at once: from lists, threads and asyncio, each answered as if it were alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ppsd import LLM, AsyncLLM, SamplingParams
from ppsd.engine.llm import Completion
from ppsd.errors import ConfigError, PpsdError
from tests.support.tiny_models import save_perfect_head

SHARED = list(range(3, 40))
PROMPTS = [[*SHARED, 50 + i, 7, *range(60, 60 + 3 * i)] for i in range(7)]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = replace(PARAMS, temperature=0.8, seed=3)
SETTINGS = {"split": (2, 4), "dtype": "float64", "prefill_chunk": 8}
CONCURRENT = 3


@pytest.fixture(scope="module")
def head(tiny_model, tmp_path_factory) -> str:
    return str(save_perfect_head(tmp_path_factory.mktemp("head"), tiny_model(), 2, 0.3))


@pytest.fixture(scope="module", params=[(1, "inprocess"), (4, "inprocess"), (4, "auto")], ids=str)
def llm(request, tiny_model, head) -> Iterator[LLM]:
    rows, transport = request.param
    settings = SETTINGS | {"transport": transport, "rows": rows, "concurrent": CONCURRENT}
    with LLM(str(tiny_model()), head=head, mode="ppsd", gate=False, **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(tiny_model) -> dict[float, list[tuple[int, ...]]]:
    """Return what plain decoding says to each prompt."""
    settings = SETTINGS | {"transport": "inprocess"}
    with LLM(str(tiny_model()), mode="autoregressive", **settings) as llm:
        return {
            params.temperature: [llm.run(ids, params).token_ids for ids in PROMPTS]
            for params in (PARAMS, SAMPLED)
        }


@pytest.mark.parametrize("params", [PARAMS, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["ppsd", "autoregressive"])
def test_a_list_is_answered_as_each_alone(llm, alone, params, mode) -> None:
    llm.use(mode)
    found = llm.generate(PROMPTS, params)
    assert [answers[0].token_ids for answers in found] == alone[params.temperature]
    assert [len(answers) for answers in found] == [1] * len(PROMPTS)
    counts = [answers[0].stats.counts for answers in found]
    assert all(c.drafted == c.judged + c.discarded for c in counts)
    assert any(c.drafted for c in counts) == (mode == "ppsd")
    llm.use("ppsd")


@pytest.mark.parametrize("mode", ["autoregressive", "auto"])
@pytest.mark.parametrize("params", [PARAMS, SAMPLED], ids=["greedy", "sampled"])
def test_one_stage_answers_many_too(tiny_model, alone, params, mode) -> None:
    settings = {"stages": 1, "dtype": "float64", "prefill_chunk": 8, "concurrent": CONCURRENT}
    with LLM(str(tiny_model()), mode=mode, **settings) as llm:
        found = llm.generate(PROMPTS, params)
    assert [answers[0].token_ids for answers in found] == alone[params.temperature]


def test_prompts_share_their_first_chunks(llm, alone) -> None:
    """Also with a request that is still under way, and with another slot's former one."""
    llm.use("ppsd")  # nothing is held any more
    found = [answers[0] for answers in llm.generate(PROMPTS, PARAMS)]
    assert [answer.token_ids for answer in found] == alone[0.0]
    whole = len(SHARED) // SETTINGS["prefill_chunk"] * SETTINGS["prefill_chunk"]
    assert [answer.stats.cached_tokens for answer in found[CONCURRENT:]] == [whole] * 4


def test_samples_of_a_list_stay_together(llm) -> None:
    found = llm.generate(PROMPTS[:2], replace(SAMPLED, n=3))
    one = [llm.generate(ids, replace(SAMPLED, n=3)) for ids in PROMPTS[:2]]
    ids = [[answer.token_ids for answer in answers] for answers in found]
    assert ids == [[answer.token_ids for answer in answers] for answers in one]


def test_a_list_with_a_bad_prompt_begins_nothing(llm, alone) -> None:
    with pytest.raises(ConfigError, match="prompt token id"):
        llm.generate([PROMPTS[0], [10**9]], PARAMS)
    assert llm.generate(PROMPTS[0], PARAMS)[0].token_ids == alone[0.0][0]


def test_threads_stream_at_once(llm, alone) -> None:
    """Each leaves a stream in the middle, too, whose neighbours go on."""
    found: dict[int, tuple[int, ...]] = {}
    all_under_way = threading.Barrier(CONCURRENT)

    def read(index: int) -> None:
        left = llm.stream(PROMPTS[index], PARAMS)
        next(left)
        all_under_way.wait(60)
        left.close()
        stream = llm.stream(PROMPTS[index], PARAMS)
        found[index] = tuple(t for chunk in stream for t in chunk.token_ids)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(CONCURRENT)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert found == dict(enumerate(alone[0.0][:CONCURRENT]))


async def _ask(llm: AsyncLLM, alone: list[tuple[int, ...]]) -> None:
    found = await asyncio.gather(*(llm.generate(ids, PARAMS) for ids in PROMPTS))
    assert [answer.token_ids for answer in found] == alone

    async def left_early() -> None:
        async for _ in llm.stream(PROMPTS[0], replace(PARAMS, max_tokens=60)):
            return

    cancelled = asyncio.create_task(llm.generate(PROMPTS[1], replace(PARAMS, max_tokens=60)))
    await left_early()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    parts = [part async for part in llm.stream(PROMPTS[2], PARAMS)]
    assert isinstance(parts[-1], Completion)
    assert parts[-1].token_ids == alone[2]
    assert tuple(t for part in parts[:-1] for t in part.token_ids) == alone[2]
    with pytest.raises(ConfigError, match="prompt token id"):
        await llm.generate([10**9], PARAMS)


def test_asyncio_asks_many_at_once(tiny_model, head, alone) -> None:
    async def main() -> None:
        settings = SETTINGS | {"transport": "inprocess", "rows": 4, "concurrent": CONCURRENT}
        async with AsyncLLM(str(tiny_model()), head=head, mode="ppsd", **settings) as llm:
            await _ask(llm, alone[0.0])
        with pytest.raises(PpsdError, match="closed"):
            await llm.generate(PROMPTS[0], PARAMS)

    asyncio.run(main())


def test_more_rows_than_at_the_start_are_refused(llm) -> None:
    with pytest.raises(ConfigError, match="rows must be at most"):
        llm.use("ppsd", rows=64)
