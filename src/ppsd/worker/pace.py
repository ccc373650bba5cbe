"""Paced stages: real work, then a wait until the time of an emulated device is over.

With the pace well above the real work per core, P stages on fewer cores behave like P slower
devices, while tokens, messages and acceptance stay real.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ppsd.model.passes import EACH_LAYER, Pass, Piece, Place, Watch
from ppsd.model.stage import Stage, StageModel
from ppsd.worker.recorder import OVERRUN, Recorder

POLL_S = 1e-3  # a paced stage drops stale work this soon, as a device does between its kernels


class PacedStage:
    """A stage that takes ``seconds`` for a block; the result is bitwise that of ``stage``.

    The time is shared out over the ``layers`` and, on the last stage, the LM head, which counts as
    ``head_layers`` of them: layer i begins no sooner than i shares after the block. A block of at
    most ``rows`` rows (a longer one is a piece of a prompt) that needs more than ``seconds`` is
    counted in ``recorder.blocks[OVERRUN]``.
    """

    def __init__(
        self,
        stage: StageModel,
        seconds: float,
        layers: int,
        head_layers: float,
        rows: int,
        recorder: Recorder,
    ) -> None:
        self._stage = stage
        self._seconds = seconds
        self._share = seconds / (layers + head_layers)
        self._layers = layers
        self._rows = rows
        self._recorder = recorder
        self._start = 0.0
        self._counted = False  # whether an overrun of the block at work would count

    @property
    def is_last(self) -> bool:
        return self._stage.is_last

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> PacedPass:
        return self._paced(len(inputs), lambda: self._stage.start(inputs, position, slot))

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> PacedPass:
        return self._paced(len(inputs), lambda: self._stage.start_rows(inputs, places))

    def start_joined(
        self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]
    ) -> PacedPass:
        rows = len(piece.inputs) + len(inputs)
        return self._paced(rows, lambda: self._stage.start_joined(piece, inputs, places))

    def _paced(self, rows: int, start: Callable[[], Pass]) -> PacedPass:
        self._start = time.monotonic()
        self._counted = rows <= self._rows
        return PacedPass(start(), self._start, self._share, self._layers, self._on_time)

    def share(self, source: int, slot: int, length: int) -> None:
        self._stage.share(source, slot, length)

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        self._stage.commit(slot, length, moves)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._in_time(self._stage.logits(hidden))

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._in_time(self._stage.row_logits(hidden))

    def _in_time(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits once the block's time is over."""
        self._count()
        while (left := self._start + self._seconds - time.monotonic()) > 0:
            time.sleep(left)
        return rows

    def _on_time(self) -> None:
        """Note that the layers are done; of a last stage the LM head comes on top."""
        if not self.is_last:
            self._count()

    def _count(self) -> None:
        if self._counted and time.monotonic() > self._start + self._seconds:
            self._recorder.blocks[OVERRUN] += 1


class PacedPass:
    """A pass whose i-th layer begins no sooner than i ``share`` seconds after ``start``.

    It stops every POLL_S for its caller to ask, and one layer is computed at a time.
    """

    def __init__(
        self,
        work: Pass,
        start: float,
        share: float,
        layers: int,
        done: Callable[[], None],
    ) -> None:
        self._work = work
        self._start = start
        self._share = share
        self._layers = layers
        self._done = done
        self._begun = 0  # layers
        self._finished = False

    @property
    def hidden(self) -> torch.Tensor:
        return self._work.hidden

    def advance(self, watch: Watch | None = None) -> bool:
        left = self._start + self._begun * self._share - time.monotonic()
        if left > 0:
            time.sleep(min(left, POLL_S))
            return False
        if self._finished:
            return True
        self._finished = self._work.advance(EACH_LAYER)
        self._begun = min(self._begun + 1, self._layers)
        if self._finished:
            self._begun = self._layers
            self._done()
        return False


def paced(stage: Stage, seconds: float, rows: int, recorder: Recorder) -> StageModel:
    """Return ``stage`` itself for 0 ``seconds``, else paced; see PacedStage."""
    if not seconds:
        return stage
    spec, layers = stage.spec, len(stage.layers)
    head_layers = spec.head_parameters / spec.layer_parameters if stage.is_last else 0.0
    return PacedStage(stage, seconds, layers, head_layers, rows, recorder)
