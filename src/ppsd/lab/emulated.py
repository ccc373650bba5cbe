"""Real weights, heads and drafts on virtual clocks: emulated devices that are never late.

Stages take what paced ones take (worker/pace.py), messages and rank 0's own work nothing; what is
decoded is the same. All stages are computed in one thread, in whatever time that needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ppsd.config import EngineConfig
from ppsd.engine.build import Progress, RunningPipeline
from ppsd.engine.drafter import Drafter, HeadDrafter, PacedDrafter
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.layout import Layout, head_seconds
from ppsd.errors import ConfigError
from ppsd.lab.clocks import Clock, nanoseconds
from ppsd.lab.virtual import (
    VirtualLink,
    VirtualLinks,
    VirtualPipeline,
    VirtualStage,
)
from ppsd.model.exit_head import ExitHead, load_head
from ppsd.model.passes import Pass, Piece, Place, Watch
from ppsd.model.stage import Stage
from ppsd.plan.model import CostModel, Link, StageCost
from ppsd.worker.inner_head import InnerHead
from ppsd.worker.judge import Judge
from ppsd.worker.loop import Worker
from ppsd.worker.machine import set_own_threads


class EmulatedPipeline(RunningPipeline):
    """A pipeline whose stages are all here, each with a clock of its own.

    Raises ConfigError for a configuration without a pace, and for a single stage.
    """

    def _open(self, progress: Progress) -> None:
        config, layout = self._config, self.layout
        set_own_threads(layout.threads)
        pipeline = VirtualPipeline(_costs(config, layout), jitter=0.0, seed=0, trace=config.trace)
        self.models = models = [
            Stage(
                layout.spec,
                layout.plan(rank, config.device(rank)),
                self._source,
                partial(progress, rank),
            )
            for rank in range(layout.stages)
        ]
        stages = [EmulatedStage(pipeline, rank, model) for rank, model in enumerate(models)]
        for rank in range(1, layout.stages):
            judge = Judge(stages[rank], rank, layout.max_context, layout.slots)
            worker = Worker(
                rank,
                stages[rank],
                VirtualLink(pipeline, rank),
                judge if stages[rank].is_last else None,
                pipeline.recorders[rank],
                self._emulated(self._load_inner(rank, models[rank]), pipeline, rank),
            )
            pipeline.workers.append(worker)
        head = self._first_head(models[0])
        drafter = self._drafter(head, 0.0)
        if isinstance(drafter, HeadDrafter):
            drafter = EmulatedDrafter(drafter, pipeline.clocks[0], pipeline.cost.head)
        speaker = self._emulated(head, pipeline, 0)
        self.stage = FirstStage(stages[0], drafter, pipeline.recorders[0], speaker)
        self.links = VirtualLinks(pipeline)

    def _first_head(self, model: Stage) -> ExitHead | None:
        found = self.layout.head
        return None if found is None else self._load_head(found, model, model.plan)

    def _load_inner(self, rank: int, stage: Stage) -> ExitHead | None:
        """Return the exit head behind a later stage, if there is one."""
        layout, found = self.layout, self.layout.inner[rank]
        if found is None:
            return None
        return load_head(found.path, layout.spec, stage.plan, self._source, layout.identity)

    def _emulated(
        self, head: ExitHead | None, pipeline: VirtualPipeline, rank: int
    ) -> EmulatedHead | None:
        if head is None:
            return None
        seconds = head_seconds(self._config.pace_of(rank), self.layout, rank, head.config)
        return EmulatedHead(head, pipeline.clocks[rank], seconds)


def _costs(config: EngineConfig, layout: Layout) -> CostModel:
    """Return what stages of the configuration's pace cost, where rows are free."""
    last = layout.stages - 1
    if not config.pace or not last:
        raise ConfigError("pace", config.pace, "set, for two stages or more, on virtual clocks")
    lm_head = layout.spec.head_parameters / layout.spec.layer_parameters  # in layers
    stages = []
    for rank, (first, end) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False)):
        layers = end - first
        counted = layers + lm_head * (rank == last)
        stages.append(StageCost(layers, config.pace_of(rank) / counted))
    return CostModel(
        tuple(stages),
        (Link(),) * layout.stages,
        head=head_seconds(config.pace_of(0), layout, 0, layout.head),
        lm_head=stages[last].layer * lm_head,
        source="pace",
    )


class EmulatedStage(VirtualStage):
    """A stage that computes, and takes the time of an emulated device for it."""

    def __init__(self, pipeline: VirtualPipeline, rank: int, model: Stage) -> None:
        super().__init__(pipeline, rank)
        self._model = model

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        return EmulatedPass(
            super().start(inputs, position), self._model.start(inputs, position, slot)
        )

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return EmulatedPass(
            super().start(inputs, places[0].position), self._model.start_rows(inputs, places)
        )

    def start_joined(self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return EmulatedPass(
            super().start_joined(piece, inputs, places),
            self._model.start_joined(piece, inputs, places),
        )

    def share(self, source: int, slot: int, length: int) -> None:
        self._model.share(source, slot, length)

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        self._model.commit(slot, length, moves)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._judge(hidden)
        return self._model.logits(hidden)

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._judge(hidden)
        return self._model.row_logits(hidden)


class EmulatedPass:
    """A pass that computes once its time is over."""

    def __init__(self, timed: Pass, work: Pass) -> None:
        self._timed = timed
        self._work = work

    @property
    def hidden(self) -> torch.Tensor:
        return self._work.hidden

    def advance(self, watch: Watch | None = None) -> bool:
        return self._timed.advance(watch) and self._work.advance()


class EmulatedHead(InnerHead):
    """An exit head whose passes take ``seconds`` each of a virtual clock."""

    def __init__(self, head: ExitHead, clock: Clock, seconds: float) -> None:
        super().__init__(head)
        self._clock = clock
        self._time = nanoseconds(seconds)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        self._clock.now += self._time
        yield


class EmulatedDrafter(PacedDrafter):
    """A drafter whose drafts take ``seconds`` of a virtual clock."""

    def __init__(self, drafter: Drafter, clock: Clock, seconds: float) -> None:
        super().__init__(drafter, 0.0)
        self._clock = clock
        self._time = nanoseconds(seconds)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        self._clock.now += self._time
        yield
