"""L5 of waves: every planted bug is caught, by the levels that docs/exactness.md says catch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ppsd import SamplingParams
from ppsd.engine.sequence import collect_logits
from tests.contract.test_exact_waves import MANY, inner_heads, open_waves
from tests.contract.test_planted_bugs import documented
from tests.support.planted_bugs import fails
from tests.support.planted_wave_bugs import WAVE_BUGS
from tests.support.wave_rig import check_at_random
from tests.unit import test_waves as policy_tests

SECTION = "## Bugs planted in waves"
CASES = 18
TIMEOUT_S = 0.3  # a planted bug may leave everybody waiting
SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, seed=11)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [*MANY[:5], [7, 9, 200, 31, 7, 9, 200]]  # some begin alike, one repeats itself

Bits = list[tuple[tuple[int, ...], torch.Tensor]]


def check_policy() -> None:
    """L0: the wave policy by itself."""
    policy_tests.check_opinions()
    policy_tests.test_a_node_never_has_the_number_of_one_that_died()
    policy_tests.test_no_cell_no_row()
    policy_tests.test_a_paused_policy_feeds_roots_only()
    policy_tests.test_moves_are_told_once_and_before_rows_above_them()


def check_oracle_model(timeout: float = TIMEOUT_S) -> None:
    """L1: trees, heads and several requests over oracle stages, with answers that come late."""
    for seed in range(CASES):
        check_at_random(seed, timeout)


class ModelCheck:
    """L2 and L3: a tiny model answers three at a time, in trees, as it does one by one, plainly.

    L2 compares tokens in float64, L3 all bits of the logits in ``dtype``.
    """

    def __init__(self, model: str, dtype: str) -> None:
        self._model, self._dtype = model, dtype
        with open_waves(model, 1, mode="autoregressive", dtype=dtype) as llm:
            self._alone = [
                said
                for params in (GREEDY, SAMPLED)
                for prompt in PROMPTS
                for said in answers(llm, [prompt], params)
            ]

    def __call__(self) -> None:
        with open_waves(self._model, 8, dtype=self._dtype, concurrent=3, timeout=2.0) as llm:
            both = [said for p in (GREEDY, SAMPLED) for said in answers(llm, PROMPTS, p)]
        for (tokens, logits), (own_tokens, own_logits) in zip(both, self._alone, strict=True):
            assert tokens == own_tokens
            assert self._dtype == "float64" or torch.equal(logits, own_logits)


def answers(llm, prompts: list[list[int]], params: SamplingParams) -> Bits:
    """Return tokens and logits of prompts that are answered together."""
    collected = [collect_logits() for _ in prompts]
    found = llm.run_all(prompts, params, [sink for sink, _ in collected])
    return [
        (c.token_ids, torch.stack([rows[len(prompt) + i] for i in range(len(c.token_ids))]))
        for prompt, c, (_, rows) in zip(prompts, found, collected, strict=True)
    ]


@pytest.fixture(scope="module")
def levels(tiny_model, tmp_path_factory) -> Iterator[dict[str, Callable[[], None]]]:
    model = tiny_model()
    with inner_heads(model, tmp_path_factory):
        yield {
            "L0": check_policy,
            "L1": check_oracle_model,
            "L2": ModelCheck(str(model), "float64"),
            "L3": ModelCheck(str(model), "bfloat16"),
        }


def test_the_page_lists_exactly_the_planted_bugs() -> None:
    table = documented(SECTION)
    assert list(table) == list(WAVE_BUGS)
    assert all(table.values()), "a bug that nothing catches"


@pytest.mark.parametrize("level", ["L0", "L1", "L2", "L3"])
def test_without_a_bug_every_check_passes(level, levels) -> None:
    if level == "L1":
        check_oracle_model(2.0)
    else:
        levels[level]()


@pytest.mark.parametrize("name", WAVE_BUGS)
def test_the_documented_levels_catch(name, levels, monkeypatch) -> None:
    WAVE_BUGS[name](monkeypatch)
    assert {level for level, check in levels.items() if fails(check)} == documented(SECTION)[name]
