"""L5: every planted bug is caught, and by the levels that docs/exactness.md says catch it.

Bugs of acceptance sampling are planted in tests/unit/test_accept.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.engine.sequence import collect_logits
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.policy import Schedule
from tests.contract.test_rejection import check_certain_drafts
from tests.support.planted_bugs import BUGS, fails
from tests.support.rig import VOCAB, Rig
from tests.support.tiny_models import VOCAB as TINY_VOCAB
from tests.support.tiny_models import save_tiny

DOC = Path(__file__).parents[2] / "docs" / "exactness.md"
TIMEOUT_S = 2.0  # a planted bug may leave everybody waiting
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.4}
SHARED = list(range(3, 30))
PROMPTS = [SHARED, [*SHARED[:20], 99, 98], [7, 9, 200]]
TINY_SAMPLINGS = [
    SamplingParams(max_tokens=16, ignore_eos=True),
    SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=4, **PENALISED),
]
ENDING = SamplingParams(max_tokens=16, min_tokens=4, logit_bias={2: 99.0})  # the fifth token ends


def check_oracle_model() -> None:
    """L1 with fixed seeds: random requests over oracle stages say what plain decoding says."""
    rng = random.Random(21)
    for number in range(30):  # the last ten with pauses of speculation
        stages = rng.randint(2, 4)
        rig = Rig(stages, Schedule(rng.randint(1, 4), rng.randint(1, 4)), chunk=rng.randint(1, 5))
        rig.links._timeout = TIMEOUT_S
        rig.move_while_stage_0_computes(lulls_and_bursts(rng, stages))
        if number >= 20:
            rig.pause_at_will([rng.random() < 0.3 for _ in range(9)])
        for _ in range(2):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
            penalties = PENALISED if rng.random() < 0.5 else {}
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.0, 0.7, 1.5]), seed=rng.randrange(9), max_tokens=12,
                min_tokens=rng.choice([0, 0, 4]), **penalties,
            )  # fmt: skip
            stop = frozenset(rng.choice([(), (3,), (1, 2, 5, 6)]))
            assert rig.decode(prompt, params, stop, alpha=0.6) == rig.plain(prompt, params, stop)


def lulls_and_bursts(rng: random.Random, stages: int) -> list[int]:
    """Turns in which workers rest, so that blocks pile up, and then answer several at once."""
    turns: list[int] = []
    for _ in range(5):
        turns += [0] * rng.randint(1, 8)
        turns += [rng.randrange(1, stages) for _ in range(rng.randint(1, 6))]
    return turns


SETTINGS = {"transport": "inprocess", "prefill_chunk": 8, "gate": False, "head": "untrained"}


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
            self._turn = [*PROMPTS[0], *self._plain[0, 0], 50]
            self._answer = llm.run(self._turn, TINY_SAMPLINGS[0]).token_ids

    def _open(self, **settings) -> LLM:
        return LLM(self._model, timeout=TIMEOUT_S, dtype="float64", **SETTINGS | settings)

    def __call__(self) -> None:
        with self._open(split=(2, 4), block=4, in_flight=3) as llm:
            for schedule in ((1, 3), (4, 1), (2, 3)):
                llm.use("ppsd", *schedule)
                self._leave_early(llm)
                llm.use("ppsd", *schedule)
                self._requests(llm)
            self._converse(llm)
            self._break_off(llm)
            ended = llm.run(PROMPTS[2], ENDING)
            assert (len(ended.token_ids), ended.finish_reason) == (5, "stop")

    def _requests(self, llm: LLM) -> None:
        for (i, j), plain in self._plain.items():
            llm._running.stage.drafter = OracleDrafter([*PROMPTS[i], *plain], 0.6, TINY_VOCAB)
            assert llm.run(PROMPTS[i], TINY_SAMPLINGS[j], reuse=True).token_ids == plain

    def _converse(self, llm: LLM) -> None:
        """The next turn begins with the whole answer, whose last token was never fed."""
        assert llm.run(PROMPTS[0], TINY_SAMPLINGS[0]).token_ids == self._plain[0, 0]
        assert llm.run(self._turn, TINY_SAMPLINGS[0], reuse=True).token_ids == self._answer

    def _break_off(self, llm: LLM) -> None:
        """A request that shares its beginning with the rows held fails before its first token."""
        assert llm.run(PROMPTS[0], TINY_SAMPLINGS[0]).token_ids == self._plain[0, 0]
        other = [*PROMPTS[0][:20], *[99] * len(self._turn)]
        with pytest.raises(ZeroDivisionError):
            llm.run(other, TINY_SAMPLINGS[0], reuse=True, logits=lambda position, row: 1 // 0)
        assert llm.run(self._turn, TINY_SAMPLINGS[0], reuse=True).token_ids == self._answer

    def _leave_early(self, llm: LLM) -> None:
        """A client goes away while right drafts are under way."""
        llm._running.stage.drafter = OracleDrafter(
            [*PROMPTS[2], *self._plain[2, 0]], 1.0, TINY_VOCAB
        )
        stream = llm.stream(PROMPTS[2], TINY_SAMPLINGS[0])
        for _ in range(3):
            next(stream)
        stream.close()


class BitCheck:
    """L3 in small: requests that begin alike have the bits of requests that stand alone."""

    def __init__(self, model: Path) -> None:
        self._model = str(model)
        with self._open() as llm:
            answer = llm.run(PROMPTS[0], TINY_SAMPLINGS[0]).token_ids
            turn = [*PROMPTS[0], *answer, 50, 51]
            self._prompts = [PROMPTS[0], turn, PROMPTS[1], [*turn[:-1], 60], PROMPTS[0][:12], turn]
            self._alone = []
            for prompt in self._prompts:
                llm.use("ppsd")  # forgets all rows
                self._alone.append(self._bits(llm, prompt))

    def _open(self) -> LLM:
        return LLM(self._model, timeout=TIMEOUT_S, dtype="float32", split=(2, 4), **SETTINGS)

    def _bits(self, llm: LLM, prompt: list[int]) -> tuple[tuple[int, ...], torch.Tensor]:
        sink, rows = collect_logits()
        tokens = llm.run(prompt, TINY_SAMPLINGS[0], logits=sink).token_ids
        return tokens, torch.stack([rows[len(prompt) + i] for i in range(len(tokens))])

    def __call__(self) -> None:
        with self._open() as llm:
            for prompt, (tokens, logits) in zip(self._prompts, self._alone, strict=True):
                got_tokens, got_logits = self._bits(llm, prompt)
                assert got_tokens == tokens
                assert torch.equal(got_logits, logits)


def without_end(model: Path) -> Path:
    """Leave only the tokenizer to say where an answer ends."""
    for name in ("config.json", "generation_config.json"):
        record = json.loads((model / name).read_text())
        record["eos_token_id"] = None  # what is missing has a default
        (model / name).write_text(json.dumps(record))
    return model


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> dict[str, Callable[[], None]]:
    model = without_end(save_tiny(tmp_path_factory.mktemp("llama")))
    return {
        "L1": check_oracle_model,
        "L2": TinyCheck(model),
        "L3": BitCheck(model),
        "L4": check_certain_drafts,
    }


def documented(section: str = "## Kill matrix") -> dict[str, set[str]]:
    """Return a kill matrix of the page: which levels catch which bug."""
    lines = DOC.read_text().split(section)[1].split("##")[0].splitlines()
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


@pytest.mark.parametrize("level", ["L1", "L2", "L3", "L4"])
def test_without_a_bug_every_check_passes(level, levels) -> None:
    levels[level]()


@pytest.mark.parametrize("name", BUGS)
def test_the_documented_levels_catch(name, levels, monkeypatch) -> None:
    BUGS[name](monkeypatch)
    assert {level for level, check in levels.items() if fails(check)} == documented()[name]
