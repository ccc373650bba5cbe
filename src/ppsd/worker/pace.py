"""Paced stages: real work, then a wait until the time of an emulated device is over.

With the pace well above the real work per core, P stages on fewer cores behave like P slower
devices, while tokens, messages and acceptance stay real. Used by worker/ and engine/ alike.
"""

from __future__ import annotations

import time

import torch

from ppsd.model.passes import Interrupted
from ppsd.model.stage import Stage, StageModel
from ppsd.worker.recorder import OVERRUN, Recorder

POLL_S = 1e-3  # a paced stage drops stale work this soon, as a device does between its kernels


class PacedStage:
    """A stage that takes ``seconds`` for a block; the result is bitwise that of ``stage``.

    The time is shared out over the ``layers`` and, on the last stage, the LM head, which counts as
    ``head_layers`` of them: layer i begins no sooner than i shares after the block. Waits ask
    ``interrupted`` every POLL_S. A block of at most ``rows`` rows (a longer one is a piece of a
    prompt) that needs more than ``seconds`` is counted in ``recorder.blocks[OVERRUN]``.
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
        """See StageModel."""
        return self._stage.is_last

    def forward(
        self, inputs: torch.Tensor, position: int, interrupted: Interrupted
    ) -> torch.Tensor | None:
        """See StageModel."""
        self._start = time.monotonic()
        self._counted = inputs.shape[0] <= self._rows
        begun = 0

        def stop() -> bool:
            nonlocal begun
            begun += 1
            return self._wait(begun - 1, interrupted)

        hidden = self._stage.forward(inputs, position, stop)
        if hidden is None:
            return None
        if not self.is_last:
            self._count()
        return None if self._wait(self._layers, interrupted) else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See StageModel."""
        rows = self._stage.logits(hidden)
        self._count()
        while (left := self._start + self._seconds - time.monotonic()) > 0:
            time.sleep(left)
        return rows

    def _wait(self, layers: int, interrupted: Interrupted) -> bool:
        """Wait until so many layers' time is over; whether the work has become pointless."""
        end = self._start + layers * self._share
        while not (stale := interrupted()) and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))
        return stale

    def _count(self) -> None:
        if self._counted and time.monotonic() > self._start + self._seconds:
            self._recorder.blocks[OVERRUN] += 1


def paced(stage: Stage, seconds: float, rows: int, recorder: Recorder) -> StageModel:
    """``stage`` as it is for 0 ``seconds``, else paced; see PacedStage."""
    if not seconds:
        return stage
    spec, layers = stage.spec, len(stage.layers)
    head_layers = spec.head_parameters / spec.layer_parameters if stage.is_last else 0.0
    return PacedStage(stage, seconds, layers, head_layers, rows, recorder)
