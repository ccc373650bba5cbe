"""L2 and L3 of waves: tiny models say what transformers and plain decoding say, in their bits.

The first head is untrained, so drafts come from lookup and from the heads on later boundaries,
which are perfect: trees have many branches, of which now one and now another is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine import choose
from ppsd.measure.verify import verify
from ppsd.model.head_files import read_head_config
from ppsd.model.head_library import FoundHead
from tests.contract.test_bitwise import TEXTS, check_bitwise, task
from tests.contract.test_exact_transformers import expected
from tests.support.tiny_models import save_perfect_head

SPLIT, INNER = (1, 3, 4), (3, 4)
TOKENS = 14
PROMPTS = [[5], [7, 9, 200, 31, 7, 9, 200], list(range(3, 40))]
MANY = [[*range(3, 3 + n), 99, n] for n in (3, 18, 20, 20, 33, 33, 37, 37)]
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, seed=11)
SETTINGS = {"dtype": "float64", "prefill_chunk": 16, "gate": False, "split": SPLIT}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Iterator[str]:
    with inner_heads(tiny_model(), tmp_path_factory):
        yield str(tiny_model())


@contextmanager
def inner_heads(path: Path, places: pytest.TempPathFactory) -> Iterator[None]:
    """Let heads on inner boundaries of a tiny model be found, and no others."""
    heads = []
    for layer in INNER:
        head = save_perfect_head(places.mktemp("head"), path, layer)
        heads.append(FoundHead(head, False, read_head_config(head)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "find_heads", lambda: heads)
        yield


def open_waves(model: str, rows: int, **settings) -> LLM:
    own = {"mode": "ppsd", "head": "untrained", "rows": rows, "transport": "inprocess"}
    return LLM(model, **SETTINGS | own | settings)


@pytest.fixture(scope="module")
def plain(model) -> Iterator[LLM]:
    with LLM(model, mode="autoregressive", transport="inprocess", **SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("transport", ["inprocess", "shared-memory"])
@pytest.mark.parametrize("rows", [4, 16])
def test_one_request_at_a_time(tiny_model, model, plain, rows, transport) -> None:
    with open_waves(model, rows, transport=transport) as llm:
        opinions = accepted = 0
        for prompt in PROMPTS:
            got = llm.run(prompt, GREEDY)
            assert list(got.token_ids) == expected(tiny_model(), tuple(prompt), TOKENS)
            counts = got.stats.counts
            assert counts.drafted == counts.judged + counts.discarded
            opinions, accepted = opinions + counts.opinions, accepted + counts.accepted
            assert llm.run(prompt, SAMPLED).token_ids == plain.run(prompt, SAMPLED).token_ids
    assert opinions > 0
    assert accepted > 0


@pytest.mark.parametrize("transport", ["inprocess", "shared-memory"])
def test_eight_at_a_time_with_shared_beginnings(model, plain, transport) -> None:
    with open_waves(model, 16, transport=transport, concurrent=8) as llm:
        for params in (GREEDY, SAMPLED):
            found = [answers[0].token_ids for answers in llm.generate(MANY, params)]
            assert found == [plain.run(prompt, params).token_ids for prompt in MANY]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 16])
def test_logits_are_bitwise_plain(model, rows, dtype) -> None:
    heads = {"heads": "auto"} if rows == 1 else {}
    with open_waves(model, rows, dtype=dtype, **heads) as llm:
        for params in (replace(GREEDY, max_tokens=12), replace(SAMPLED, max_tokens=12)):
            check_bitwise(verify(llm, [task(text) for text in TEXTS[:2]], params))
