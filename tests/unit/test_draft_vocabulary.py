"""What heads score: each slot the draft vocabulary and its own prompt's tokens, exactly those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppsd.engine.drafter import DraftState, Given, HeadDrafter
from ppsd.engine.sequence import Request, begin_message
from ppsd.model.draft_vocabulary import NEWEST, TOGETHER, DraftVocabulary, prompt_ids
from ppsd.model.exit_head import load_head
from ppsd.model.names import lm_head_name
from ppsd.speculation.lookup import ODDS
from ppsd.speculation.sampling import Sampler
from ppsd.types import SamplingParams
from ppsd.worker.inner_head import InnerHead
from ppsd.worker.messages import Block
from tests.unit.test_exit_head import DRAFT_IDS, PLAN, WIDE, Tiny, hidden

VOCAB, WIDTH, CPU = 300, 64, torch.device("cpu")
DTYPES = [torch.float64, torch.bfloat16]
PROMPT = (3, 7, 250, 298)  # 3 is in the draft vocabulary
SCORED = [0, 3, 4, 7, 99, 200, 250, 298, 299]


@pytest.fixture(params=DTYPES, ids=str)
def table(request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB, WIDTH, dtype=WIDE, generator=generator).to(request.param)


def vocabulary(table: torch.Tensor) -> DraftVocabulary:
    return DraftVocabulary(torch.tensor(DRAFT_IDS), table[DRAFT_IDS], lambda ids: table[ids], CPU)


def rows(table: torch.Tensor, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, WIDTH, dtype=WIDE, generator=generator).to(table.dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    exact = found.dtype == WIDE
    torch.testing.assert_close(
        found, expected, rtol=0 if exact else 2e-2, atol=1e-9 if exact else 1
    )


def test_a_slot_scores_what_its_prompt_holds_and_no_other(table: torch.Tensor) -> None:
    scored, finished = vocabulary(table), rows(table, 1)
    scored.begin(1, PROMPT)
    assert scored.ids(0).tolist() == DRAFT_IDS
    assert scored.ids(1).tolist() == SCORED
    close(scored.scores(finished, 0), finished @ table[DRAFT_IDS].T)
    close(scored.scores(finished, 1), finished @ table[SCORED].T)
    same = scored.scores(finished, 1)[:, [SCORED.index(i) for i in DRAFT_IDS]]
    assert torch.equal(same, scored.scores(finished, 0)), "a prompt changes no other score"


@pytest.mark.parametrize("prompt", [(), (4, 99), (5,)])
def test_the_next_request_begins_anew(table: torch.Tensor, prompt: tuple[int, ...]) -> None:
    scored = vocabulary(table)
    scored.begin(0, PROMPT)
    scored.begin(0, prompt)
    assert scored.ids(0).tolist() == sorted({*DRAFT_IDS, *prompt})
    assert scored.scores(rows(table, 1), 0).shape == (1, len(scored.ids(0)))


def test_rows_of_many_requests_score_what_each_would_alone(table: torch.Tensor) -> None:
    scored, slots = vocabulary(table), [2, 0, 2, 1, 0, 2, 1, 1, 2, 2, 2]
    finished = rows(table, len(slots))
    scored.begin(1, (5,))
    scored.begin(2, PROMPT)
    scores, ids = scored.scores_of(finished, slots)
    assert scores.shape == (len(slots), TOGETHER)
    for row, slot in enumerate(slots):
        alone = scored.scores(finished[row : row + 1], slot)[0]
        order, count = ids[row].argsort(), len(ids[row])
        assert ids[row][order].tolist() == scored.ids(slot).tolist()
        assert torch.equal(scores[row, :count][torch.from_numpy(order)], alone)
        assert (scores[row, count:] == -torch.inf).all()


def test_without_prompts_rows_are_no_wider(table: torch.Tensor) -> None:
    scores, ids = vocabulary(table).scores_of(rows(table, 2), [0, 5])
    assert scores.shape == (2, len(DRAFT_IDS))
    assert [each.tolist() for each in ids] == [DRAFT_IDS] * 2


def test_a_prompts_tokens_are_those_of_its_newest_positions() -> None:
    assert prompt_ids((5, 3, 5, 9)) == (3, 5, 9)
    assert prompt_ids(()) == ()
    assert prompt_ids((*range(7), *[9] * (NEWEST - 1))) == (6, 9)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(tiny_model, request) -> Tiny:
    return Tiny(tiny_model(request.param))


@pytest.mark.parametrize("at_hand", [True, False], ids=["embedding", "file"])
def test_a_loaded_head_reads_the_models_own_rows(tiny: Tiny, tmp_path: Path, at_hand) -> None:
    """Whether its stage holds the embedding or its rows are in the file alone."""
    tiny.save(tmp_path, tiny.config(draft_vocab=len(DRAFT_IDS)))
    table = tiny.source.load("model.embed_tokens.weight", WIDE) if at_hand else None
    given = tiny.spec, PLAN, tiny.source, tiny.identity, table
    head, every = load_head(tmp_path, *given), tiny.load(tmp_path)
    finished = head.finish(head.forward(hidden(1), 0))
    head.begin(1, PROMPT)
    name = "model.embed_tokens.weight" if tiny.spec.tie_embeddings else "lm_head.weight"
    rows = tiny.source.load(name, WIDE)
    expected = torch.full((1, VOCAB), -torch.inf, dtype=WIDE)
    expected[:, SCORED] = finished @ rows[SCORED].T
    torch.testing.assert_close(head.logits(finished, 1), expected, rtol=0, atol=1e-12)
    best = head.likeliest(head.scores(finished, 1), None, ODDS, 1)
    assert best == expected.argmax() == head.opinions(finished, 1, [1])[0]
    assert head.drafts_below(300, 1)
    assert not head.drafts_below(299, 1)
    assert torch.equal(head.logits(finished, 0), every.logits(finished, 0)), "slot 0 has no request"


def test_a_candidate_of_a_prompt_has_its_probability_among_all(tiny: Tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.config(draft_vocab=len(DRAFT_IDS)))
    head = tiny.load(tmp_path, replace(PLAN, dtype=torch.float32))
    finished = head.finish(head.forward(hidden(3).float(), 0))
    head.begin(4, PROMPT)
    ids, probabilities = head.opinions(finished, len(SCORED) + 1, [4, 0, 4])
    chances = [head.logits(finished, slot)[i].softmax(0) for i, slot in enumerate((4, 0, 4))]
    expected = [each.topk(len(DRAFT_IDS)) for each in chances]
    assert ids.tolist() == [best.indices.tolist() for best in expected]
    torch.testing.assert_close(probabilities, torch.stack([best.values for best in expected]))
    assert set(ids.flatten().tolist()) & (set(PROMPT) - set(DRAFT_IDS)), "some come from the prompt"


def test_each_slot_drafts_from_its_own_prompt(tiny: Tiny, tmp_path: Path) -> None:
    """As a chain, greedily and with noise, and as candidates of trees."""
    tiny.save(tmp_path, tiny.config(draft_vocab=len(DRAFT_IDS)))
    head = tiny.load(tmp_path, replace(PLAN, slots=2))
    drafter, speaker, hidden_rows = HeadDrafter(head), InnerHead(head), hidden(40)
    whole = tiny.source.load(lm_head_name(tiny.spec), WIDE)
    prompts, drafted = (tuple(range(100, 140)), tuple(range(10, 60))), set()
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=3)
        for slot, prompt in enumerate(prompts):
            request = Request(prompt, params, frozenset(), VOCAB)
            speaker.begin(begin_message(slot, request, feedback=False, logits=False))
        for slot, prompt in enumerate(prompts):
            state, history = DraftState(slot), torch.tensor(prompt)
            sampler = Sampler(params, len(prompt), frozenset(), VOCAB)
            for row in hidden_rows.split(1):
                drafter.observe(state, 0, row)
                token = drafter.draft(state, Given(sampler, history))
                logits = torch.full((VOCAB,), -torch.inf, dtype=WIDE)
                ids = sorted({*DRAFT_IDS, *prompt})
                logits[ids] = whole[ids] @ head.finish(head.forward(row, 0, slot))[0]
                assert token == sampler.choose(logits, history)
                said = speaker.observe(0, Block(slot, 0, 0, -1, 1, (0,), row), row)
                assert said is not None
                assert params.temperature or said.tokens[0][0] == token
                drafted.add(token)
    assert drafted & {*prompts[0]} - {*DRAFT_IDS}
    assert drafted & {*prompts[1]} - {*DRAFT_IDS}
