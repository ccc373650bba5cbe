"""The engine over oracle stages: what becomes of requests that cannot go on."""

from __future__ import annotations

import pytest

from ppsd.errors import RequestError
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.policy import Finish, Schedule
from ppsd.types import SamplingParams
from tests.support.rig import VOCAB, Rig

PROMPT = [1, 2]


@pytest.mark.parametrize("turns", [[0], [2, 1, 0], [1, 2, 2, 0, 1, 0]])
def test_a_refusal_ends_the_request_whenever_it_comes(turns: list[int]) -> None:
    """While stage 0 computes, before it drafts, or when the engine waits."""
    rig = Rig(3, Schedule(1, 3))
    rig.move_while_stage_0_computes(turns)
    every = frozenset(range(VOCAB))
    doomed = SamplingParams(max_tokens=9, min_tokens=4)
    for _ in range(3):
        rig.decode(PROMPT, doomed, every, drafter=OracleDrafter([0] * 20, 1.0, VOCAB))
        assert isinstance(rig.sequence.error, RequestError)
        assert rig.output == Finish("error"), "the one who asked hears of it"
        params = SamplingParams(max_tokens=12)
        assert rig.decode(PROMPT, params) == rig.plain(PROMPT, params, frozenset())
