"""Steps over fixed buffers: a stage's rows, whatever the width, and replayed as captured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd.model.source import describe, resolve_model
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.steps import BUCKET, Graphs, Replay, Step
from ppsd.model.weights import open_source

CONTEXT = 2 * BUCKET
Models = Callable[[str], Path]


class RecordedGraphs:
    """Stands in for CUDA graphs: counts captures and replays, and repeats what it recorded."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, work: Replay) -> Replay:
        self.captures += 1
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


class NoGraphs:
    def capture(self, work: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture
def stage(tiny_model: Models) -> Stage:
    files = resolve_model(str(tiny_model("llama")))
    spec = describe(files)
    plan = StagePlan(0, spec.num_layers, CONTEXT, torch.float64, torch.device("cpu"))
    return Stage(spec, plan, open_source(files.path))


def step_of(stage: Stage, width: int, graphs: Graphs | None = None) -> Step:
    shape = (stage.spec.num_kv_heads, CONTEXT, stage.spec.head_dim)
    layers = stage.spec.num_layers
    cache = tuple([torch.zeros(shape, dtype=torch.float64) for _ in range(layers)] for _ in "kv")
    return Step(stage.layers, stage.spec, stage.rope, cache, width, graphs)


def rows_of(stage: Stage, tokens: list[int]) -> torch.Tensor:
    assert stage.embedding is not None
    return stage.embedding[torch.tensor(tokens)]


def test_steps_give_the_rows_of_the_stage(stage: Stage) -> None:
    step, tokens = step_of(stage, 4), [5, 9, 40, 7, 81, 3, 22]
    parts = ([0, 1, 2], [3], [4, 5, 6])
    for positions in parts:
        x = step.start(rows_of(stage, [tokens[p] for p in positions]), positions)
        plain = stage.forward(torch.tensor([tokens[p] for p in positions]), positions[0])
        assert x is not None
        assert plain is not None
        torch.testing.assert_close(x, plain, rtol=1e-10, atol=1e-12)


def test_a_row_has_the_same_bits_whatever_comes_with_it(stage: Stage) -> None:
    tokens = [5, 9, 40]
    alone, together = step_of(stage, 4), step_of(stage, 4)
    for position, token in enumerate(tokens):
        row = alone.start(rows_of(stage, [token]), [position])
        assert row is not None
        last = row.clone()
    rows = together.start(rows_of(stage, tokens), [0, 1, 2])
    assert rows is not None
    assert torch.equal(rows[2], last[0])


def test_a_graph_is_captured_once_a_bucket_and_replayed(stage: Stage) -> None:
    graphs = RecordedGraphs()
    step, eager = step_of(stage, 2, graphs), step_of(stage, 2)
    for position in (0, 1, BUCKET - 1, BUCKET, BUCKET + 1):
        found = step.start(rows_of(stage, [7 + position % 5]), [position])
        wanted = eager.start(rows_of(stage, [7 + position % 5]), [position])
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)
    assert (graphs.captures, graphs.replays) == (2, 5)


def test_what_is_cancelled_is_not_launched(stage: Stage) -> None:
    graphs = RecordedGraphs()
    step = step_of(stage, 2, graphs)
    assert step.start(rows_of(stage, [7]), [0], lambda: True) is None
    assert graphs.replays == 0


def test_a_failed_capture_is_told_and_the_step_runs_eagerly(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    step, eager = step_of(stage, 2, NoGraphs()), step_of(stage, 2)
    with caplog.at_level(logging.WARNING):
        found = step.start(rows_of(stage, [7]), [0])
        step.start(rows_of(stage, [8]), [BUCKET])
    wanted = eager.start(rows_of(stage, [7]), [0])
    assert [r.message for r in caplog.records] == [
        "a step cannot be captured (operation not permitted when stream is capturing); it runs "
        "eagerly from now on, which is slower"
    ]
    assert found is not None
    assert wanted is not None


@pytest.mark.parametrize("positions", [[], [0, 1, 2], [-1], [CONTEXT - 1]])
def test_rows_that_do_not_fit_are_refused(stage: Stage, positions: list[int]) -> None:
    step, rows = step_of(stage, 2), torch.zeros(len(positions), stage.spec.hidden_size)
    with pytest.raises(ValueError, match="do not fit"):
        step.start(rows, positions)
