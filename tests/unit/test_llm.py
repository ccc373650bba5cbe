"""What an LLM makes of its settings: which engine, which requests, which refusals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.engine import Engine
from ppsd.engine.wave_engine import WaveEngine
from ppsd.errors import ConfigError
from ppsd.lab.oracle import OracleDrafter
from ppsd.model.catalog import find_models
from ppsd.speculation.policy import Schedule
from tests.support.tiny_models import LAYERS, VOCAB, save_tiny
from tests.unit.test_tokenizer import _byte_fallback, _wrap

SETTINGS: dict[str, Any] = {
    "dtype": "float64",
    "transport": "inprocess",
    "threads_per_stage": 1,
    "plan": "off",
    "split": (2, 4),
    "head": "untrained",
    "mode": "ppsd",
}
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = [5, 9, 30, 31]
Open = Callable[..., AbstractContextManager[LLM]]


@pytest.fixture
def opened(tiny_model) -> Open:
    return lambda **settings: LLM(str(tiny_model()), **SETTINGS | settings)


def engine_of(llm: LLM) -> Engine:
    return llm._engine.engine


@pytest.mark.parametrize(
    ("settings", "kind", "rows"),
    [
        ({"mode": "autoregressive"}, Engine, None),
        ({}, Engine, None),
        ({"rows": 2}, WaveEngine, 2),
        ({"rows": 2, "lookup": False}, WaveEngine, 2),
        ({"mode": "autoregressive", "concurrent": 2}, WaveEngine, 0),
        ({"mode": "autoregressive", "concurrent": 2, "rows": 1}, WaveEngine, 0),
        ({"concurrent": 2}, WaveEngine, 1),
        ({"mode": "draft-then-verify", "block": 2}, Engine, None),
    ],
    ids=str,
)
def test_the_engine_that_settings_ask_for(opened, settings, kind, rows) -> None:
    with opened(**settings) as llm:
        engine = engine_of(llm)
        assert type(engine) is kind
        assert engine.stage.drafting == (settings.get("mode") != "autoregressive")
        assert not engine.opinions
        assert (engine.gate is None) == (settings.get("mode") == "autoregressive")
        if isinstance(engine, WaveEngine):
            assert engine._rows == rows
            assert engine._lookup == (rows > 0 and settings.get("lookup", True))
            assert engine._loose == llm.layout.loose > 0
            assert len(engine._held) == settings.get("concurrent", 1)
        assert llm.run(PROMPT, PARAMS).stats.new_tokens == 4


def test_another_mode_on_the_same_workers(opened) -> None:
    with opened(rows=2) as llm:
        gate = engine_of(llm).gate
        assert gate is not None
        llm.use("autoregressive")
        assert (type(engine_of(llm)), engine_of(llm).gate) == (Engine, None)
        llm.use("ppsd", rows=1)
        assert type(engine_of(llm)) is Engine
        assert engine_of(llm).gate is not gate
        llm.use("ppsd")
        assert llm.config.rows == 1, "as before"
        llm.use("ppsd", gate=False, rows=2)
        assert engine_of(llm).gate is None
        llm.use("ppsd")
        assert engine_of(llm).gate is None
        llm.use("ppsd", gate=True)
        assert engine_of(llm).gate is gate, "it has learnt on these workers"
        llm.use("draft-then-verify", 2)
        assert engine_of(llm).schedule.block == 2
        assert llm.run(PROMPT, PARAMS).stats.new_tokens == 4
        with pytest.raises(ConfigError, match="rows must be at most 2, as set at the start"):
            llm.use("ppsd", rows=3)
        for block, in_flight in ((3, None), (1, 4)):
            with pytest.raises(ConfigError, match="within block 1 and in-flight 3 set at start"):
                llm.use("ppsd", block, in_flight)
        with pytest.raises(ConfigError):
            llm.use("auto")
        assert engine_of(llm).schedule.block == 2


def test_drafts_of_somebody_else(opened) -> None:
    """Of another drafter chains are made: it knows nothing of trees."""
    plain = [5, 9, 30, 31, *range(60)]
    with opened(rows=2) as llm:
        own = engine_of(llm).stage.drafter
        drafter = OracleDrafter(plain, 1.0, VOCAB)
        llm.draft_with(drafter)
        assert engine_of(llm).stage.drafter is drafter
        assert type(engine_of(llm)) is Engine
        llm.draft_with(None)
        assert engine_of(llm).stage.drafter is own
        assert type(engine_of(llm)) is WaveEngine
        for schedule in (Schedule(2, 1), Schedule(1, 2)):
            mode = "draft-then-verify" if schedule.block > 1 else "ppsd"
            llm.use(mode, schedule.block, schedule.in_flight)
            llm.draft_with(drafter)
            assert engine_of(llm).schedule == schedule
            llm.draft_with(None)
    with opened(head="none", mode="autoregressive") as llm:
        assert not llm.drafts
        with pytest.raises(ConfigError, match="without a head or lookup"):
            llm.use("ppsd")
        llm.draft_with(drafter)
        llm.use("ppsd")
        assert llm.drafts
    with opened(head="lookup") as llm:
        assert llm.drafts
    with opened(head="none", mode="auto", drafter=drafter) as llm:
        assert llm.drafts
        assert (llm.config.mode, engine_of(llm).stage.drafter) == ("ppsd", drafter)


def test_rows_are_reused_when_that_is_asked_for(opened) -> None:
    def submitted(llm: LLM, **more: Any) -> int:
        ticket = llm.submit(PROMPT, PARAMS, notify=lambda: None, **more)
        while (taken := ticket.take())[0] == "chunk":
            pass
        return taken[1].stats.cached_tokens

    def streamed(llm: LLM, **more: Any) -> int:
        stream = llm.stream(PROMPT, PARAMS, **more)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value.stats.cached_tokens

    ways: list[Callable[..., int]] = [
        submitted,
        streamed,
        lambda llm, **more: llm.run(PROMPT, PARAMS, **more).stats.cached_tokens,
        lambda llm, **more: llm.generate(PROMPT, PARAMS, **more)[0].stats.cached_tokens,
    ]
    with opened(mode="autoregressive") as llm:
        for cached in ways:
            llm.run(PROMPT, PARAMS)
            assert cached(llm) == 0, "of a prompt shorter than a chunk"
            assert cached(llm, reuse=True) == len(PROMPT) - 1
        llm.run(PROMPT, PARAMS)
        assert [c.stats.cached_tokens for c in llm.run_all([PROMPT], PARAMS)] == [0]


def test_several_samples_and_prompts(opened) -> None:
    sampled = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=3, n=2)
    with opened(mode="autoregressive") as llm:
        one = llm.generate(PROMPT, sampled)
        assert len(one) == 2
        alone = [llm.run(PROMPT, sampled.sample(i)).token_ids for i in range(2)]
        assert [c.token_ids for c in one] == alone
        both = llm.generate([PROMPT, [7, 8]], sampled)
        assert [len(answers) for answers in both] == [2, 2]
        assert [c.token_ids for c in both[0]] == alone
        with pytest.raises(ConfigError, match="n must be 1 at temperature 0"):
            llm.generate(PROMPT, SamplingParams(n=2))
        for act in (
            lambda: next(llm.stream(PROMPT, sampled)),
            lambda: llm.submit(PROMPT, sampled, notify=lambda: None),
        ):
            with pytest.raises(ConfigError, match="n must be 1 in a stream"):
                act()


def test_parameters_of_another_kind_are_refused(opened) -> None:
    with opened(mode="autoregressive") as llm:
        for given in ({}, {"max_tokens": 3}, 3):
            for act in (
                lambda given=given: llm.generate(PROMPT, given),
                lambda given=given: next(llm.stream(PROMPT, given)),
                lambda given=given: llm.submit(PROMPT, given, notify=lambda: None),
                lambda given=given: llm.run(PROMPT, given),
                lambda given=given: llm.run_all([PROMPT], given),
            ):
                with pytest.raises(ConfigError, match=r"^params must be SamplingParams or None"):
                    act()
        assert llm.run(PROMPT, PARAMS).stats.new_tokens == 4


def test_a_request_ends_where_the_context_does(opened) -> None:
    with opened(mode="autoregressive", max_context=8) as llm:
        made = llm._request(PROMPT, SamplingParams(max_tokens=9, min_tokens=7, n=3), reuse=True)
        assert (made.params.max_tokens, made.params.min_tokens, made.params.n) == (4, 4, 1)
        assert (made.reuse, made.logits, made.masks) == (True, None, None)
        assert made.stop_ids == frozenset(llm.layout.spec.eos_ids)
        params = SamplingParams(ignore_eos=True, stop_token_ids=(6,))
        assert llm._request(PROMPT, params, reuse=False).stop_ids == {6}
        assert llm.run(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True)).stats.new_tokens == 4


def test_log_probabilities_are_counted(opened) -> None:
    def ask(llm: LLM, **more: Any) -> Any:
        return llm.submit(PROMPT, PARAMS, notify=lambda: None, **more)

    with opened(mode="autoregressive") as llm:
        for count in (0, 2, 20):
            kind, chunk = ask(llm, logprobs=count, prompt_logprobs=True).take()
            assert kind == "chunk"
            assert [len(each.top) for each in chunk.prompt_logprobs] == [count] * 3
            assert len(chunk.logprobs[0].top) == count
        assert ask(llm).take()[1].logprobs == ()
        with pytest.raises(ConfigError, match=r"^logprobs must be"):
            ask(llm, logprobs=21, prompt_logprobs=True)
        for count in (-1, VOCAB, True, "2"):
            with pytest.raises(ConfigError, match=r"^logprobs must be .* \[0, 296\], got"):
                ask(llm, logprobs=count)
        assert len(ask(llm, logprobs=21).take()[1].logprobs[0].top) == 21
        with pytest.raises(ConfigError, match="prompt_logprobs must be used with logprobs"):
            ask(llm, prompt_logprobs=True)


class Evens:
    """A grammar that permits even tokens."""

    def start(self) -> Callable[[tuple[int, ...]], bytes]:
        return lambda answered: b"\x55" * (VOCAB // 8 + 1)


def test_answers_follow_a_grammar(opened) -> None:
    with opened(rows=2) as llm:
        assert all(t % 2 == 0 for t in llm.run(PROMPT, PARAMS, grammar=Evens()).token_ids)
        ticket = llm.submit(PROMPT, PARAMS, grammar=Evens(), notify=lambda: None)
        while (taken := ticket.take())[0] == "chunk":
            assert all(token % 2 == 0 for token in taken[1].token_ids)
        assert not all(t % 2 == 0 for t in llm.run(PROMPT, PARAMS).token_ids)
    with opened(acceptance="rejection") as llm:
        with pytest.raises(ConfigError, match="acceptance must be coupled where answers follow"):
            llm.run(PROMPT, PARAMS, grammar=Evens())
        assert llm.run(PROMPT, PARAMS).stats.new_tokens == 4


def test_who_looks_on_and_what_runs_between_requests(opened) -> None:
    events: list[Any] = []
    with opened() as llm:
        llm.observe(events.append)
        rows: dict[int, Any] = {}
        said = llm.run(PROMPT, PARAMS, logits=rows.__setitem__).token_ids
        assert [int(rows[4 + i].argmax()) for i in range(4)] == list(said)
        assert len(events) > 4
        count = len(events)
        llm.observe(None)
        sinks = [rows.__setitem__]
        rows.clear()
        assert llm.run_all([PROMPT], PARAMS, sinks)[0].token_ids == said
        assert len(rows) >= 4
        for sinks in ([], [print] * 2):
            with pytest.raises(ConfigError, match=r"^sinks must be as many as prompts, 1, got"):
                llm.run_all([PROMPT], PARAMS, sinks)
        assert len(events) == count
        assert llm.on_pipeline(lambda running: running.stage) is engine_of(llm).stage
        assert llm.layout.bounds == (0, 2, 4, LAYERS)


def test_an_answer_continues_a_text_with_its_space_and_begins_in_a_chat(tmp_path) -> None:
    """SentencePiece drops the space before a text's first word, and a continuation has none."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = _wrap(_byte_fallback(), chat_template=template)
    tokenizer.save_pretrained(save_tiny(tmp_path))
    word = tokenizer.convert_tokens_to_ids("▁a")
    params = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={word: 100.0})
    with LLM(str(tmp_path), **SETTINGS) as llm:
        for prompt, text in (
            ("ab", " a a a"),
            (llm.encode("ab"), " a a a"),
            ([{"role": "user", "content": "ab"}], "a a a"),
        ):
            assert llm.generate(prompt, params)[0].text == text
            assert "".join(chunk.text for chunk in llm.stream(prompt, params)) == text


def test_a_directory_may_be_named_like_a_gguf_file(tmp_path) -> None:
    path = save_tiny(tmp_path / "tiny.gguf")
    assert [model.layers for model in find_models(tmp_path) if model.path == path] == [LAYERS]
    with LLM(str(path), **SETTINGS) as llm:
        assert llm.generate(PROMPT, PARAMS)[0].stats.new_tokens == 4
