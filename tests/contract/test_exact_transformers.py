"""L2: tiny float64 models equal ``transformers.generate``, token for token, in every split.

Float64 makes ties practically impossible, so every mismatch is a mistake in logic: no tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.model.source import ModelFiles, describe
from ppsd.model.weights import open_source
from ppsd.speculation.policy import Counts, Schedule
from tests.support.hurried_gate import Hurried
from tests.support.reference_model import reference_logits
from tests.support.tiny_models import (
    FAMILIES,
    LAYERS,
    load_reference,
    reference_generate,
    save_perfect_head,
)

NEW_TOKENS = 40
PROMPTS = [[5], [7, 9, 200, 31], list(range(3, 40))]
EVERY_SPLIT = [(), (2,), (5,), (1, 3), (1, 2, 4), (1, 2, 3, 4, 5)]
SCHEDULES = [(1, 2), (1, 5), (3, 1), (2, 3), (8, 1)]


@cache
def expected(model: Path, prompt: tuple[int, ...], new_tokens: int = NEW_TOKENS) -> list[int]:
    return reference_generate(model, list(prompt), new_tokens)


def open_tiny(model: Path, **settings) -> LLM:
    """With drafts, nearly always wrong, and without a gate: these tests are about drafting."""
    fixed = {"transport": "inprocess", "dtype": "float64", "prefill_chunk": 16, "gate": False}
    fixed |= {"head": "untrained"}
    return LLM(str(model), **fixed | settings)


def check(
    llm: LLM, model: Path, new_tokens: int = NEW_TOKENS, prompts: Sequence[list[int]] = PROMPTS
) -> list[Counts]:
    counts = []
    for prompt in prompts:
        got = llm.run(prompt, SamplingParams(max_tokens=new_tokens))
        assert list(got.token_ids) == expected(model, tuple(prompt), new_tokens)
        counts.append(got.stats.counts)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_model_equals_transformers(tiny_model, family) -> None:
    """The textbook forward and transformers agree on logits to float64 rounding."""
    path = tiny_model(family)
    tokens = torch.arange(3, 180)
    spec = describe(ModelFiles("tiny", path, is_gguf=False))
    ours = reference_logits(spec, open_source(path), tokens, torch.float64)
    with torch.no_grad():
        theirs = load_reference(path)(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_plain_and_ppsd(tiny_model, family) -> None:
    model = tiny_model(family)
    with open_tiny(model, split=(2, 4)) as llm:
        check(llm, model)
        llm.use("autoregressive")
        check(llm, model)


@pytest.mark.parametrize("split", EVERY_SPLIT)
def test_every_split_plain(tiny_model, split) -> None:
    model = tiny_model()
    settings = {"split": split} if split else {"stages": 1}
    with open_tiny(model, mode="autoregressive", **settings) as llm:
        check(llm, model)


@pytest.mark.parametrize("exit_layer", range(1, LAYERS))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_exit_and_schedule(tiny_model, tmp_path, exit_layer, sign) -> None:
    """A perfect head is always right; turned round it is nearly always wrong."""
    model = tiny_model()
    head = str(save_perfect_head(tmp_path / "head", model, exit_layer, sign))
    stages = min(3, LAYERS - exit_layer + 1)
    largest = {"block": 8, "in_flight": 5}
    with open_tiny(
        model, stages=stages, exit_layer=exit_layer, head=head, lookup=False, **largest
    ) as llm:
        for schedule in SCHEDULES:
            llm.use("ppsd", *schedule)
            for counts in check(llm, model, new_tokens=16):
                check_counts(counts, always_right=sign > 0)
            if exit_layer == 2:
                llm._engine.engine.gate = Hurried(Schedule(*schedule))
                check(llm, model, new_tokens=16)


def check_counts(counts: Counts, always_right: bool) -> None:
    assert counts.drafted == counts.judged + counts.discarded
    assert counts.judged > 0
    if always_right:
        assert (counts.resyncs, counts.accepted) == (0, counts.judged)
    else:
        assert counts.accepted < counts.judged / 4


@pytest.mark.parametrize(("split", "prompts"), [((3,), PROMPTS[1:2]), ((1, 3, 5), PROMPTS[2:])])
def test_a_long_output(tiny_model, tmp_path, split, prompts) -> None:
    model = tiny_model("qwen3")
    head = save_perfect_head(tmp_path / "head", model, split[0])
    with open_tiny(model, split=split, head=str(head), gate=True) as llm:
        check(llm, model, new_tokens=256, prompts=prompts)


def test_drafts_do_not_depend_on_the_number_of_stages(tiny_model) -> None:
    """A stage that corrupted what the head reads would only cost acceptance; this would see it."""
    seen = []
    for split in [(2,), (2, 4), (2, 3, 4, 5)]:
        with open_tiny(tiny_model(), split=split, in_flight=2) as llm:
            counts = llm.run(PROMPTS[1], SamplingParams(max_tokens=NEW_TOKENS)).stats.counts
            seen.append((counts.judged, counts.accepted, counts.resyncs))
    assert seen == [seen[0]] * 3
    assert seen[0][0] > 0


def test_n_samples_are_the_single_samples_of_their_seeds(tiny_model) -> None:
    params = SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=20)
    with open_tiny(tiny_model(), split=(2, 4)) as llm:
        together = [c.token_ids for c in llm.generate(list(range(3, 60)), params)]
    with open_tiny(tiny_model(), stages=1, mode="autoregressive") as llm:
        for i, tokens in enumerate(together):
            one = SamplingParams(temperature=0.9, seed=5 + i, max_tokens=20)
            assert llm.generate(list(range(3, 60)), one)[0].token_ids == tokens
    assert len(set(together)) == 3
