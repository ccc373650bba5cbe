"""The last stage on its own: which rows of a wave it judges, and what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ppsd.errors import NonFiniteError, ProtocolError
from ppsd.speculation.waves import Row
from ppsd.types import SamplingParams
from ppsd.worker.judge import Judge, require_finite
from ppsd.worker.messages import Begin, Block, Refusal
from ppsd.worker.wave_messages import Verdicts

VOCAB = 8
PROMPT = (1, 2, 3)
ROOT = 10  # the node of a prompt's last row


class Scripted:
    """A stage whose logits say the token that a row's number names."""

    is_last = True

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].long(), VOCAB).float()

    row_logits = logits


def judge(slots: int, **params: object) -> Judge:
    """Return a judge that has heard a prompt in each slot, after which token 4 comes."""
    made = Judge(Scripted(), 1, max_context=32, slots=slots)  # type: ignore[arg-type]  # as a stage
    for slot in range(slots):
        begin = Begin(slot, SamplingParams(), len(PROMPT), (), VOCAB)
        made.begin(begin)
        block = Block(slot, ROOT, 0, -1, 1, PROMPT, torch.full((3, 1), 4.0))
        said = made.verdict(block, block.hidden)
        assert (said.tokens, said.logits, said.feedback) == ((4,), None, None)
        made.begin(replace(begin, params=SamplingParams(**params), stop_ids=tuple(range(VOCAB))))
    return made


def row(node: int, parent: int, position: int, token: int, *nodes: int, slot: int = 0) -> Row:
    return Row(slot, node, parent, position, token, position, nodes, nodes)


RIGHT, CHILD, OTHER, BELOW, LAST = 11, 12, 13, 14, 15
ROWS = [
    row(RIGHT, ROOT, 3, 4),
    row(OTHER, ROOT, 3, 5),
    row(CHILD, RIGHT, 4, 6, RIGHT),
    row(BELOW, OTHER, 4, 6, OTHER),
]


def test_only_rows_on_the_true_path_can_follow() -> None:
    assert judge(1).may_follow(ROWS) == [0, 2]
    assert judge(1).may_follow(ROWS[1:]) == []


def test_a_wave_is_judged_as_far_as_it_is_right() -> None:
    says = torch.tensor([[6.0], [1.0], [7.0], [1.0]])
    [verdicts] = judge(1).verdicts(ROWS, says)
    assert isinstance(verdicts, Verdicts)
    assert (verdicts.nodes, verdicts.tokens) == (((0, RIGHT), (0, CHILD)), (6, 7))
    [verdicts] = judge(1).verdicts(ROWS, torch.ones(4, 1))
    assert isinstance(verdicts, Verdicts)
    assert (verdicts.logits, verdicts.feedback) == (None, None)
    assert (verdicts.nodes, verdicts.tokens) == (((0, RIGHT),), (1,))


def test_a_request_that_cannot_go_on_is_refused_and_its_neighbours_are_judged() -> None:
    """All tokens end the first request, and may not for two more."""
    made = judge(2, min_tokens=3)
    made.begin(Begin(1, SamplingParams(), len(PROMPT), (), VOCAB))
    verdicts, refusal = made.verdicts([ROWS[0], row(21, ROOT, 3, 4, slot=1)], torch.ones(2, 1))
    assert isinstance(verdicts, Verdicts)
    assert isinstance(refusal, Refusal)
    assert (verdicts.nodes, verdicts.tokens) == (((1, 21),), (1,))
    assert (refusal.slot, refusal.epoch) == (0, RIGHT)
    assert "must leave a finite largest logit at position 4" in refusal.message


def test_rows_that_are_sure_to_be_judged_share_a_pass(monkeypatch) -> None:
    """Compiled kernels read an LM head once for all of them."""
    asked: list[int] = []
    score = Scripted.row_logits

    def noted(self: Scripted, hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return score(self, hidden)

    monkeypatch.setattr(Scripted, "row_logits", noted)
    monkeypatch.setattr("ppsd.model.kernels.reader", lambda x: object())
    monkeypatch.setattr("ppsd.model.kernels.largest", lambda x, among: None)
    chain = [*ROWS, row(LAST, CHILD, 5, 7, RIGHT, CHILD)]
    rows = [*chain, *map(elsewhere, chain)]
    made = judge(2)
    [verdicts] = made.verdicts(rows, torch.tensor([[6.0], [1.0], [7.0], [1.0], [2.0]] * 2))
    nodes = [RIGHT, CHILD, LAST]
    assert verdicts.nodes == (*((0, n) for n in nodes), *((1, n + 100) for n in nodes))
    assert verdicts.tokens == (6, 7, 2) * 2
    assert asked == [6]


def elsewhere(row: Row) -> Row:
    """Return the same row of another slot, with other numbers."""
    parent = row.parent if row.parent == ROOT else row.parent + 100
    nodes = tuple(node + 100 for node in row.nodes)
    return row._replace(slot=1, node=row.node + 100, parent=parent, nodes=nodes)


def test_tokens_of_a_shared_prompt_are_known() -> None:
    made = judge(2)
    made._slots[1].history.write(0, (7, 7, 7, 7))
    made.begin(Begin(1, SamplingParams(), 5, (), VOCAB, source=0, shared=2))
    assert made._slots[1].history.ids(0, 4) == (*PROMPT[:2], 7, 7)
    assert made._slots[0].history.ids(0, 3) == PROMPT


def test_the_first_row_that_is_not_finite_is_named() -> None:
    rows = torch.zeros(4, 2)
    rows[1:3, 1] = math.nan
    with pytest.raises(NonFiniteError, match="stage 2 computed NaN or infinity at position 8"):
        require_finite(rows, 2, 7)
    require_finite(torch.full((2, 2), 3e38), 2, 7)  # whose sum is not finite


def test_a_slot_that_is_not_there_is_named() -> None:
    hidden = torch.full((3, 1), 4.0)
    with pytest.raises(ProtocolError, match="slot 2 is none of the 2 there are"):
        judge(2).verdict(Block(2, ROOT, 0, -1, 1, PROMPT, hidden), hidden)


def test_an_answers_tokens_are_not_scored() -> None:
    made = judge(1)
    made.begin(Begin(0, SamplingParams(), len(PROMPT), (), VOCAB, scores=1))
    hidden = torch.tensor([[4.0], [5.0], [6.0]])
    scores = made.scores(Block(0, ROOT, 0, -1, 1, PROMPT, hidden), hidden)
    assert scores is not None
    assert (scores.position, scores.tokens) == (1, ((4,), (5,)))
    answer = Block(0, ROOT, len(PROMPT), 2, 1, (4,), hidden[:1])
    assert made.scores(answer, hidden[:1]) is None
