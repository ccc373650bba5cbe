"""L5: every planted bug is caught, and by the levels that docs/exactness.md says catch it.

Bugs of acceptance sampling are planted in tests/unit/test_accept.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ppsd import LLM, SamplingParams
from ppsd.engine.drafter import OracleDrafter
from ppsd.speculation.policy import Schedule
from tests.support.planted_bugs import BUGS
from tests.support.rig import VOCAB, Rig
from tests.support.tiny_models import VOCAB as TINY_VOCAB

DOC = Path(__file__).parents[2] / "docs" / "exactness.md"
TIMEOUT_S = 2.0  # a planted bug may leave everybody waiting
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.4}
SHARED = list(range(3, 30))
PROMPTS = [SHARED, [*SHARED[:20], 99, 98], [7, 9, 200]]
TINY_SAMPLINGS = [
    SamplingParams(max_tokens=16, ignore_eos=True),
    SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=4, **PENALISED),
]


def check_oracle_model() -> None:
    """L1 with fixed seeds: random requests over oracle stages say what plain decoding says."""
    rng = random.Random(20)
    for number in range(30):  # the last ten with pauses of speculation
        stages = rng.randint(2, 4)
        rig = Rig(stages, Schedule(rng.randint(1, 4), rng.randint(1, 4)), chunk=rng.randint(1, 5))
        rig.pipeline._timeout = TIMEOUT_S
        rig.move_while_stage_0_computes(lulls_and_bursts(rng, stages))
        if number >= 20:
            rig.pause_at_will([rng.random() < 0.3 for _ in range(9)])
        for _ in range(2):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
            penalties = PENALISED if rng.random() < 0.5 else {}
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]), seed=rng.randrange(9), max_tokens=12,
                **penalties,
            )  # fmt: skip
            stop = frozenset({3} if rng.random() < 0.5 else ())
            assert rig.decode(prompt, params, stop, alpha=0.6) == rig.plain(prompt, params, stop)


def lulls_and_bursts(rng: random.Random, stages: int) -> list[int]:
    """Turns in which workers rest, so that blocks pile up, and then answer several at once."""
    turns: list[int] = []
    for _ in range(5):
        turns += [0] * rng.randint(1, 8)
        turns += [rng.randrange(1, stages) for _ in range(rng.randint(1, 6))]
    return turns


class TinyCheck:
    """L2 in small: a float64 model in several schedules says what it said before the bug."""

    def __init__(self, model: Path) -> None:
        self._model = str(model)
        with self._open(mode="autoregressive", stages=1) as llm:
            self._plain = {
                (i, j): llm.run(prompt, params).token_ids
                for i, prompt in enumerate(PROMPTS)
                for j, params in enumerate(TINY_SAMPLINGS)
            }

    def _open(self, **settings) -> LLM:
        fixed = {
            "transport": "inprocess",
            "dtype": "float64",
            "prefill_chunk": 8,
            "gate": False,
            "head": "untrained",
        }
        return LLM(self._model, timeout=TIMEOUT_S, **fixed | settings)

    def __call__(self) -> None:
        with self._open(split=(2, 4), block=4, in_flight=3) as llm:
            for schedule in ((1, 3), (4, 1), (2, 3)):
                llm.use("ppsd", *schedule)
                self._leave_early(llm)
                llm.use("ppsd", *schedule)
                self._requests(llm)

    def _requests(self, llm: LLM) -> None:
        for (i, j), plain in self._plain.items():
            llm._pipeline.drafter = OracleDrafter([*PROMPTS[i], *plain], 0.6, TINY_VOCAB)
            assert llm.run(PROMPTS[i], TINY_SAMPLINGS[j], reuse=True).token_ids == plain

    def _leave_early(self, llm: LLM) -> None:
        """A client goes away while right drafts are under way."""
        llm._pipeline.drafter = OracleDrafter([*PROMPTS[2], *self._plain[2, 0]], 1.0, TINY_VOCAB)
        stream = llm.stream(PROMPTS[2], TINY_SAMPLINGS[0])
        for _ in range(3):
            next(stream)
        stream.close()


@pytest.fixture(scope="module")
def levels(tiny_model) -> dict[str, Callable[[], None]]:
    return {"L1": check_oracle_model, "L2": TinyCheck(tiny_model())}


def documented() -> dict[str, set[str]]:
    """The kill matrix of the page: which levels catch which bug."""
    lines = DOC.read_text().split("## Kill matrix")[1].split("##")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    header, _, *bugs = rows
    return {
        bug: {level for level, cell in zip(header[1:], cells, strict=True) if cell == "caught"}
        for bug, *cells in bugs
    }


def test_the_page_lists_exactly_the_planted_bugs() -> None:
    assert list(documented()) == list(BUGS)
    assert len(BUGS) >= 8
    assert all(documented().values()), "a bug that nothing catches"


def test_without_a_bug_all_checks_pass(levels) -> None:
    for check in levels.values():
        check()


@pytest.mark.parametrize("name", BUGS)
def test_the_documented_levels_catch(name, levels, monkeypatch) -> None:
    BUGS[name](monkeypatch)
    assert {level for level, check in levels.items() if fails(check)} == documented()[name]


def fails(check: Callable[[], None]) -> bool:
    """Whether the check notices: by other tokens, or because the pipeline itself refuses."""
    try:
        check()
    except Exception:  # any refusal counts: a bug shows in its own way
        return True
    return False
