"""Steps over fixed buffers: a stage's rows, whatever the width, and replayed as captured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd.errors import ProtocolError
from ppsd.model.cache import KVCache
from ppsd.model.passes import Place, Watch
from ppsd.model.source import describe, resolve_model
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.steps import BUCKET, WIDTH, CudaRunner, Graphs, Replay, Step
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


def runner_of(stage: Stage, graphs: Graphs | None = None, loose: int = 0) -> CudaRunner:
    spec = stage.spec
    cache = KVCache(
        spec.num_layers, spec.num_kv_heads, CONTEXT, spec.head_dim, torch.float64,
        torch.device("cpu"), loose=loose, spare=1,
    )  # fmt: skip
    return CudaRunner(stage.layers, spec, stage.rope, cache, graphs)


def passed(runner: CudaRunner, rows: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
    started = runner.start(rows, position, slot)
    while not started.advance(Watch()):
        assert len(rows) > WIDTH, "a step is launched as a whole"
    return started.hidden


def test_a_runner_of_steps_gives_the_rows_of_the_stage(stage: Stage) -> None:
    """A prompt longer than a step, then short blocks; rows of earlier steps are not overwritten."""
    runner, tokens = runner_of(stage, RecordedGraphs()), [5 + i % 60 for i in range(WIDTH + 9)]
    ends = (WIDTH + 1, WIDTH + 2, WIDTH + 9)
    found, begun = [], 0
    for end in ends:
        found.append(passed(runner, rows_of(stage, tokens[begun:end]), begun))
        begun = end
    plain = stage.forward(torch.tensor(tokens), 0)
    assert plain is not None
    torch.testing.assert_close(torch.cat(found), plain, rtol=1e-10, atol=1e-12)


def test_the_last_position_of_a_context_can_be_run(stage: Stage) -> None:
    runner = runner_of(stage)
    rows = rows_of(stage, [7] * (CONTEXT - 1))
    passed(runner, rows, 0)
    assert passed(runner, rows[:1], CONTEXT - 1).isfinite().all()
    assert runner.cache.lengths == [CONTEXT]
    with pytest.raises(ProtocolError, match="do not fit"):
        runner.start(rows[:1], CONTEXT)


def test_what_is_dropped_is_not_launched(stage: Stage) -> None:
    graphs = RecordedGraphs()
    runner = runner_of(stage, graphs)
    passed(runner, rows_of(stage, [7, 8]), 0)
    launched = graphs.replays
    runner.start(rows_of(stage, [9]), 1)
    assert graphs.replays == launched
    assert runner.cache.lengths == [1]


def test_rows_of_a_chain_share_a_step(stage: Stage) -> None:
    """Of a tree's rows: a chain that begins in cells of its own, and a branch off its root."""
    graphs = RecordedGraphs()
    runner = runner_of(stage, graphs, loose=WIDTH)
    passed(runner, rows_of(stage, [7, 8]), 0)
    cells = [2, 3, *range(CONTEXT, CONTEXT + WIDTH)]
    places = [Place(0, 2 + i, cell, tuple(cells[:i])) for i, cell in enumerate(cells[:-1])]
    branch = Place(0, 3, cells[-1], (2,))
    before = graphs.replays
    started = runner.start_rows(rows_of(stage, [9] * (WIDTH + 2)), [*places, branch])
    assert started.advance(Watch()), "steps are launched as a whole"
    assert graphs.replays - before == 3, "a full step, the rest of the chain, the branch"
    assert torch.equal(started.hidden[1], started.hidden[-1]), "the same token behind the same root"


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
