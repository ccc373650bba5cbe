"""L4 on the whole engine: ``rejection`` gives the target's joint distribution, not its tokens.

Drafts come from another distribution than the target's, so that acceptances, rejections and the
draws from the residual all happen; the seeds are the only thing that differs between runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from ppsd.engine.drafter import DraftState, Given
from ppsd.engine.rejection import redraw
from ppsd.speculation.policy import Schedule
from ppsd.speculation.sampling import Sampler
from ppsd.types import SamplingParams
from ppsd.worker.messages import Verdict
from tests.statistics import g_test
from tests.support.hash_model import HashStage, digest
from tests.support.rig import Rig

VOCAB, TOKENS, RUNS = 3, 3, 2500
CERTAIN_RUNS = 250
PROMPT = [1, 2]
STAGES = 3
ALPHA = 1e-4


class OtherOpinion:
    """A drafter whose distribution is that of the target's neighbour."""

    feedback = False

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        pass

    def draft(self, state: DraftState, given: Given) -> int:
        history = given.history
        word = digest(*history.tolist())
        logits = torch.tensor([((word >> (8 * i)) & 0xFF) / 64 for i in range(VOCAB)])
        state.drawn[history.numel()] = given.sampler.probabilities(logits, history)
        return given.sampler.draw(logits, history, given.stream)


def exact_joint(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The target's probability of every output of TOKENS tokens."""

    def next_token(prefix: list[int]) -> torch.Tensor:
        rows = torch.tensor(prefix)
        for rank in range(STAGES):
            stage = HashStage(rank, STAGES, VOCAB)
            rows = stage.forward(rows, 0)
        sampler = Sampler(params, len(PROMPT), frozenset(), VOCAB)
        return sampler.probabilities(stage.logits(rows[-1:])[0], torch.tensor(prefix))

    joint = {}
    for tokens in product(range(VOCAB), repeat=params.max_tokens):
        probability = 1.0
        for i, token in enumerate(tokens):
            probability *= float(next_token([*PROMPT, *tokens[:i]])[token])
        joint[tokens] = probability
    return joint


@pytest.mark.parametrize("wills", [None, (True, False, False, True, False, False, False)])
@pytest.mark.parametrize("schedule", [Schedule(1, 3), Schedule(3, 1)])
def test_the_joint_distribution_is_the_target_s(schedule, wills) -> None:
    """With pauses, too: then some positions are drawn by the last stage, without a draft."""
    rig = Rig(STAGES, schedule, acceptance="rejection", vocab=VOCAB)
    if wills:
        rig.pause_at_will(wills)
    drafter = OtherOpinion()
    seen: Counter[tuple[int, ...]] = Counter()
    accepted = judged = 0
    for seed in range(RUNS):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=TOKENS)
        seen[tuple(rig.decode(PROMPT, params, drafter=drafter))] += 1
        accepted += rig.sequence.policy.counts.accepted
        judged += rig.sequence.policy.counts.judged
    assert 0.2 < accepted / judged < 0.95, "both outcomes must be common for the test to mean much"
    joint = exact_joint(SamplingParams(temperature=1.0, max_tokens=TOKENS))
    assert sum(joint.values()) == pytest.approx(1.0)
    cells = sorted(joint)
    p_value = g_test([seen[c] for c in cells], [joint[c] for c in cells])
    assert p_value > ALPHA


class Certain:
    """A drafter that always says the same, so that a residual holds all other tokens."""

    feedback = False

    def __init__(self, token: int) -> None:
        self._token = token

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        pass

    def draft(self, state: DraftState, given: Given) -> int:
        return self._token


def check_certain_drafts() -> None:
    """Few runs are enough: about half the first tokens come from a residual of two tokens.

    What one token's drafts cannot show, another's do.
    """
    for token, temperature in ((0, 6.0), (1, 4.0)):
        params = SamplingParams(temperature=temperature, max_tokens=2)
        rig = Rig(STAGES, Schedule(1, 2), acceptance="rejection", vocab=VOCAB)
        rig.links._timeout = 2.0
        seen: Counter[tuple[int, ...]] = Counter()
        accepted = judged = 0
        for seed in range(CERTAIN_RUNS):
            tokens = rig.decode(PROMPT, replace(params, seed=seed), drafter=Certain(token))
            seen[tuple(tokens)] += 1
            accepted += rig.sequence.policy.counts.accepted
            judged += rig.sequence.policy.counts.judged
        assert 0.2 < accepted / judged < 0.6
        joint = exact_joint(params)
        cells = sorted(joint)
        assert g_test([seen[c] for c in cells], [joint[c] for c in cells]) > ALPHA


def test_certain_drafts_leave_the_distribution_alone() -> None:
    check_certain_drafts()


def test_a_verdict_judges_the_drafts_at_its_own_positions() -> None:
    """A draft that the target is sure of is accepted, whatever token came with the verdict."""
    params = SamplingParams(temperature=1.0, seed=3)
    sequence = SimpleNamespace(
        request=SimpleNamespace(params=params, vocab_size=VOCAB),
        sampler=Sampler(params, 1, frozenset(), VOCAB),
        chain=SimpleNamespace(draft_at={11: 2, 12: 1}.get),
        draft=DraftState(),
        history=SimpleNamespace(before=lambda at: torch.zeros(at, dtype=torch.int64)),
    )
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[0, 2] = logits[1, 1] = 0.0
    verdict = Verdict(slot=0, source=1, epoch=1, position=9, rows=3, tokens=(0, 0), logits=logits)
    assert redraw(sequence, verdict) == (2, 1)
