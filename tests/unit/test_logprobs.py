"""Log-probabilities of what is said: the target's, however its tokens were drafted."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.answer import Chunk
from ppsd.engine.logprobs import TokenLogprob
from tests.support.tiny_models import VOCAB, save_perfect_head

SETTINGS: dict[str, Any] = {"dtype": "float64", "transport": "inprocess", "threads_per_stage": 1}
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.7, seed=2)
PROMPT = [5, 9, 30, 31]


def ask(llm: LLM, logprobs: int | None) -> list[Chunk]:
    ended = threading.Event()

    def notify() -> None:
        ended.set()

    ticket = llm.submit(PROMPT, PARAMS, logprobs=logprobs, notify=notify)
    chunks = []
    while (taken := ticket.take())[0] == "chunk":
        chunks.append(taken[1])
    assert taken[0] == "result"
    assert ended.is_set()
    return chunks


def entries(llm: LLM, logprobs: int) -> list[TokenLogprob]:
    return [entry for chunk in ask(llm, logprobs) for entry in chunk.logprobs]


@pytest.fixture(scope="module")
def plain(tiny_model) -> list[TokenLogprob]:
    with LLM(str(tiny_model()), stages=1, mode="autoregressive", **SETTINGS) as llm:
        assert all(chunk.logprobs == () for chunk in ask(llm, None))
        rows: dict[int, Any] = {}
        said = llm.run(PROMPT, PARAMS, logits=rows.__setitem__).token_ids
        found = entries(llm, 3)
        for position, entry in enumerate(found, len(PROMPT)):
            expected = rows[position][: VOCAB - 4].log_softmax(0)
            assert entry.logprob == float(expected[entry.token])
            assert entry.top[0][1] == float(expected.max())
        assert tuple(entry.token for entry in found) == said
        return found


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["right drafts", "wrong drafts"])
@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("ppsd", {}),
        ("draft-then-verify", {"block": 3}),
        ("ppsd", {"rows": 3}),
        ("ppsd", {"concurrent": 2}),
    ],
    ids=str,
)
def test_drafts_leave_log_probabilities_alone(
    tiny_model, tmp_path, plain, sign, mode, more
) -> None:
    head = save_perfect_head(tmp_path, tiny_model(), 4, sign)
    settings = SETTINGS | more | {"head": str(head), "mode": mode, "split": (4,)}
    with LLM(str(tiny_model()), **settings) as llm:
        found = entries(llm, 3)
    assert [entry.token for entry in found] == [entry.token for entry in plain]
    assert [entry.logprob for entry in found] == pytest.approx([e.logprob for e in plain])
    for one, other in zip(found, plain, strict=True):
        assert dict(one.top) == pytest.approx(dict(other.top))
