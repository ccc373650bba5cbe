"""Stage 0 by itself: what a drafter is given, what becomes of its draft, and what is shipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppsd.engine.drafter import DraftState, Given
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.sequence import Request, Sequence, begin_message
from ppsd.errors import NonFiniteError
from ppsd.speculation.policy import UNVERIFIED, Drafted, Feed, Policy, Schedule
from ppsd.types import SamplingParams
from ppsd.worker.recorder import Recorder
from ppsd.worker.slot import TokenHistory, sampler_of

VOCAB = 8
PROMPT = (5, 6)
BOTH = b"\x0c"  # tokens 2 and 3


class Fixed:
    """A drafter that always says the same, and notes what it is given."""

    feedback = True

    def __init__(self, token: int) -> None:
        self._token = token
        self.given: list[Given] = []

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        raise AssertionError("nobody asks for this")

    def draft(self, state: DraftState, given: Given) -> int:
        self.given.append(given)
        return self._token


def stage_of(drafter: Fixed | None, head: Any = None) -> FirstStage:
    return FirstStage(SimpleNamespace(), drafter, Recorder(trace=True), head)


def answering(masks: Any = None) -> Sequence:
    """Return a sequence whose prompt has been answered with 1, 4, of which rows are known."""
    request = Request(PROMPT, SamplingParams(max_tokens=9), frozenset(), VOCAB, masks=masks)
    policy = Policy(Schedule(1, 2), max_tokens=9, stop_ids=frozenset())
    sampler = sampler_of(begin_message(0, request, feedback=True, logits=False))
    history = TokenHistory(16)
    history.write(0, (*PROMPT, 1, 4))
    sequence = Sequence(request, 0, 0, policy, history, sampler, DraftState())
    sequence.feedback = {p: torch.full((1, 2), float(p)) for p in range(4)}
    return sequence


def fed(verified: int = 2, *, position: int = 3, block: int = 3, ship: bool = True) -> Feed:
    return Feed(7, position, (4,), block, position - block + 1, ship, True, verified)


def test_a_stage_drafts_if_it_has_something_to_draft_with() -> None:
    head = SimpleNamespace()
    assert stage_of(Fixed(1), head).drafting
    assert stage_of(Fixed(1), head).head is head
    assert not stage_of(None).drafting


def test_a_drafter_is_given_the_newest_verified_row_and_what_may_follow() -> None:
    drafter = Fixed(3)
    stage, seen = stage_of(drafter), []
    sequence = answering(lambda answer: seen.append(tuple(answer)) or BOTH)
    assert stage.draft(sequence, fed()) == Drafted(7, 4, 3)
    (given,) = drafter.given
    assert given.history.tolist() == [*PROMPT, 1, 4]
    assert given.verified is sequence.feedback[2]
    assert (given.mask, seen) == (BOTH, [(1, 4)])
    assert [slice_[2:6] for slice_ in stage.recorder.take()["slices"]] == [("draft", 7, 4, 1)]
    stage.draft(sequence, fed(UNVERIFIED))
    assert drafter.given[1].verified is None
    stage.draft(answering(), fed())
    assert drafter.given[2].mask is None


@pytest.mark.parametrize(("mask", "token"), [(BOTH, 2), (b"\x20", 5), (b"\x00", 7)])
def test_in_place_of_a_forbidden_draft_the_lowest_token_that_may_come_is_taken(
    mask: bytes, token: int
) -> None:
    """If none may, it stays."""
    assert stage_of(Fixed(7)).draft(answering(lambda answer: mask), fed()).token == token


def test_a_block_is_shipped_once_it_is_whole() -> None:
    stage, sequence = stage_of(None), answering(lambda answer: bytes([len(answer)]))
    first, second = torch.ones(1, 2), torch.zeros(1, 2)
    assert stage.finish(sequence, fed(position=2, block=2, ship=False), first) is None
    block = stage.finish(sequence, fed(position=3, block=2), second)
    assert block is not None
    assert (block.epoch, block.position, block.parent, block.judge) == (7, 2, 1, 2)
    assert (block.tokens, block.masks) == ((1, 4), (b"\x01", b"\x02"))
    assert torch.equal(block.hidden, torch.cat([first, second]))
    assert sequence.open_rows == []
    with pytest.raises(NonFiniteError, match="stage 0 computed NaN or infinity at position 3"):
        stage.finish(sequence, fed(), torch.full((1, 2), torch.nan))
