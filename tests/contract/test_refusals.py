"""What a stage refuses behind a wrong draft, or behind an answer's end, ends no request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from tests.support.tiny_models import save_perfect_head

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

RIGHT, WRONG = 1.0, -1.0
# One branch that any grammar reads, beside what is too much for one once an answer goes there.
TOO_MUCH = [{"type": "array", "items": {"type": "array", "items": {}}, "maxItems": 500 + i}
            for i in range(60)]  # fmt: skip
WORDS = {"anyOf": [{"enum": ["pack my box", "jugs", "fox"]}, *TOO_MUCH]}
MODES: list[dict[str, Any]] = [
    {"mode": "ppsd", "rows": 1},
    {"mode": "ppsd", "rows": 4},
    {"mode": "ppsd", "rows": 16},
    {"mode": "draft-then-verify", "block": 4, "rows": 1},
]
Opened = Callable[..., LLM]


@pytest.fixture
def opened(tiny_model: Callable[[], Path], tmp_path: Path) -> Iterator[Opened]:
    """Open pipelines of the same model, plain ones without a head."""
    found: list[LLM] = []

    def open_one(will: float = 0.0, exit_layer: int = 4, **settings: Any) -> LLM:
        common = {"dtype": "float64", "plan": "off", "transport": "inprocess", "gate": False}
        if will:
            head = save_perfect_head(tmp_path / f"{len(found)}", tiny_model(), exit_layer, will)
            common |= {"head": str(head), "exit_layer": exit_layer, "stages": 2}
        else:
            common |= {"stages": 1, "mode": "autoregressive", "rows": 1}
        found.append(LLM(str(tiny_model()), timeout=5.0, **common | settings))
        return found[-1]

    yield open_one
    for llm in found:
        llm.close()


def said(llm: LLM, schema: dict[str, Any], params: SamplingParams, prompt: str) -> Any:
    answer = llm.run(llm.encode(prompt), params, grammar=llm.json_grammar(schema))
    return answer.token_ids, answer.finish_reason


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_branch_beyond_a_grammars_limits_ends_no_answer_that_does_not_go_there(
    opened: Opened, settings: dict[str, Any]
) -> None:
    plain, drafting = opened(), opened(WRONG, lookup=False, **settings)
    quote = plain.encode('"')[-1]
    for seed in range(4):
        params = SamplingParams(temperature=0.8, seed=seed, max_tokens=12, logit_bias={quote: 4.0})
        wanted = said(plain, WORDS, params, "pack my box")
        assert said(drafting, WORDS, params, "pack my box") == wanted


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_wrong_draft_with_nothing_to_follow_ends_no_answer(
    opened: Opened, settings: dict[str, Any]
) -> None:
    """Behind the short words only the end is permitted, and that is banned for eight tokens."""
    schema = {"enum": ["a", "b", "cdefghijkl mnopqrstuv"]}
    plain, drafting = opened(), opened(WRONG, lookup=False, **settings)
    found = 0
    for seed in (3, 5, 8):
        params = SamplingParams(temperature=0.8, seed=seed, max_tokens=40, min_tokens=8)
        wanted = said(plain, schema, params, "pack my box")
        assert said(drafting, schema, params, "pack my box") == wanted
        found += wanted[1] == "stop"
    assert found == 3


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_what_is_refused_behind_the_end_is_not_waited_for(
    opened: Opened, settings: dict[str, Any]
) -> None:
    """Lookup puts the token that ends the answer, behind which too much opens, in one wave."""
    schema = {
        "type": "object",
        "properties": {"abc": WORDS},
        "required": ["abc"],
        "additionalProperties": False,
    }
    prompt = '{"abc": [1] {"abc": [2] {"abc": [3] '
    plain, drafting = opened(), opened(RIGHT, 2, **settings)
    end = plain.encode("[")[-1]
    params = SamplingParams(max_tokens=30, stop_token_ids=(end,), logit_bias={end: 30.0})
    wanted = said(plain, schema, params, prompt)
    assert wanted[1] == "stop"
    assert wanted[0][-1] == end
    for _ in range(2):
        assert said(drafting, schema, params, prompt) == wanted
