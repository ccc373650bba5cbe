"""Paced stages: what they wait for, when they stop, and what counts as an overrun."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.errors import ConfigError
from ppsd.lab.oracle import OracleDrafter
from ppsd.model.passes import Watch
from ppsd.worker.pace import PacedStage
from ppsd.worker.recorder import OVERRUN, Recorder
from tests.support.tiny_models import VOCAB, save_perfect_head

ROW = torch.zeros(1, 2)
ODD = list(range(3, 23))


class FakeStage:
    """Four layers that take ``work`` seconds each; notes when they began."""

    def __init__(self, work: float = 0.0, is_last: bool = False) -> None:
        self.work, self.is_last = work, is_last
        self.began: list[float] = []

    def start(self, inputs, position, slot=0):
        return FakePass(self, inputs)

    def logits(self, hidden):
        time.sleep(self.work)
        return hidden

    row_logits = logits


class FakePass:
    def __init__(self, stage: FakeStage, hidden: torch.Tensor) -> None:
        self.stage, self.hidden = stage, hidden
        self.left = 4

    def advance(self, watch=None):
        self.stage.began.append(time.monotonic())
        time.sleep(self.stage.work)
        self.left -= 1
        return not self.left


def forward(wrapped: PacedStage, rows: torch.Tensor, looks: int = 10**9) -> torch.Tensor | None:
    """Run a pass; None if it is not done after so many looks of its caller."""
    work = wrapped.start(rows, 0)
    for _ in range(looks):
        if work.advance(Watch()):
            return work.hidden
    return None


def paced(stage: FakeStage, seconds: float, **changes) -> tuple[PacedStage, Recorder]:
    recorder = Recorder()
    head_layers = 4 if stage.is_last else 0
    settings = {"layers": 4, "head_layers": head_layers, "rows": 1, "recorder": recorder}
    return PacedStage(stage, seconds, **settings | changes), recorder


def test_a_block_takes_at_least_its_pace_and_layers_begin_at_their_time() -> None:
    stage = FakeStage()
    wrapped, recorder = paced(stage, 0.04)
    start = time.monotonic()
    assert forward(wrapped, ROW) is ROW
    assert time.monotonic() - start >= 0.04
    assert all(began - start >= i * 0.01 for i, began in enumerate(stage.began))
    assert all(b - a >= 0.005 for a, b in pairwise(stage.began))
    assert recorder.blocks[OVERRUN] == 0


def test_the_last_stage_shares_its_pace_with_the_lm_head() -> None:
    wrapped, recorder = paced(FakeStage(is_last=True), 0.04)
    start = time.monotonic()
    hidden = forward(wrapped, ROW)
    half = time.monotonic() - start
    assert half >= 0.02
    wrapped.logits(hidden)
    assert time.monotonic() - start >= 0.04
    assert recorder.blocks[OVERRUN] == 0


def test_stale_work_stops_while_it_waits() -> None:
    """A pace of an hour: only its caller's look can end the wait."""
    for looks in (1, 5):
        stage = FakeStage()
        wrapped, recorder = paced(stage, 3600.0)
        start = time.monotonic()
        assert forward(wrapped, ROW, looks) is None
        assert time.monotonic() - start < 60.0
        assert len(stage.began) == 1
        assert recorder.blocks[OVERRUN] == 0


def test_work_that_outlasts_its_pace_is_counted_in_every_place() -> None:
    late, early = paced(FakeStage(0.005), 0.01), paced(FakeStage(0.005), 10.0)
    forward(late[0], ROW)
    assert forward(early[0], ROW, looks=1) is None
    assert (late[1].blocks[OVERRUN], early[1].blocks[OVERRUN]) == (1, 0)
    wrapped, recorder = paced(FakeStage(0.005, is_last=True), 0.01)
    wrapped.logits(forward(wrapped, ROW))
    assert recorder.blocks[OVERRUN] == 1, "a last stage is late once, when its head is done"


def test_a_piece_of_a_prompt_may_take_its_time() -> None:
    wrapped, recorder = paced(FakeStage(0.005), 0.01, rows=3)
    forward(wrapped, torch.zeros(4, 2))
    assert recorder.blocks[OVERRUN] == 0
    forward(wrapped, torch.zeros(3, 2))
    assert recorder.blocks[OVERRUN] == 1


@pytest.mark.parametrize("transport", ["inprocess", "shared-memory"])
def test_the_output_is_that_of_an_unpaced_pipeline(tiny_model, transport) -> None:
    """Both modes, wrong drafts among them; every judged block waited on every stage."""
    pace = (0.004, 0.002, 0.003)
    settings = {"dtype": "float64", "split": (2, 4), "transport": transport, "head": "untrained"}
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(str(tiny_model()), mode="autoregressive", **settings) as llm:
        expected = llm.run(ODD, params).token_ids
    with LLM(str(tiny_model()), pace=pace, **settings) as llm:
        llm.draft_with(OracleDrafter([*ODD, *expected], 0.6, VOCAB))
        for mode in ("ppsd", "autoregressive"):
            llm.use(mode)
            completion = llm.run(ODD, params)
            assert completion.token_ids == expected
            for rank, stage in enumerate(completion.stats.stages):
                done = stage.blocks["verify" if rank else "forward"]
                assert done >= len(expected)
                assert stage.busy_seconds >= done * pace[rank]


def test_a_pace_far_below_the_work_shows_in_the_stats(tiny_model) -> None:
    settings = {"dtype": "float64", "split": (3,), "transport": "inprocess", "head": "none"}
    with LLM(str(tiny_model()), pace=(1e-7,), mode="autoregressive", **settings) as llm:
        stats = llm.run(ODD, SamplingParams(max_tokens=5, ignore_eos=True)).stats
    assert stats.overruns == 2 * 4, "each of two stages, each token but the one of the prompt"
    assert stats.to_json()["overruns"] == 8


def test_a_head_drafts_at_the_pace_of_its_stage(tiny_model, tmp_path) -> None:
    """One layer and the vocabulary's 300 rows, in layers of stage 0's two: pace / 2 each."""
    head = save_perfect_head(tmp_path / "head", tiny_model(), 2)
    settings = {"dtype": "float64", "split": (2, 4), "transport": "inprocess", "head": str(head)}
    with LLM(str(tiny_model()), pace=(0.004,), trace=True, **settings) as llm:
        spec = llm.layout.spec
        accepted = llm.run(ODD, SamplingParams(max_tokens=8, ignore_eos=True)).accepted
        drafts = [p.end - p.start for p in llm.trace.take()[0] if p.kind == "draft"]
    assert sum(accepted) >= 6
    layers = 4 + spec.vocab_size * spec.hidden_size / spec.layer_parameters
    assert min(drafts) / 1e9 >= layers * 0.002
    assert len(drafts) >= 6


@pytest.mark.parametrize("pace", [(0.0,), (-1,), (float("nan"),), (60.0,), ("a",), (0.1, 0.1)])
def test_a_pace_that_makes_no_sense_is_named(pace) -> None:
    with pytest.raises(ConfigError, match=r"^pace must be "):
        LLM("unused", stages=3, pace=pace)
