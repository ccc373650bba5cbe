"""A stage worker: receive → forward → send. The same loop runs in a process and in-process."""

from __future__ import annotations

import json
import time
import traceback
from typing import Any

import torch

from ppsd.errors import PipelineError, ProtocolError, RequestError
from ppsd.model.passes import Asking
from ppsd.model.stage import StageModel
from ppsd.transport.base import Endpoint
from ppsd.worker.judge import Judge, require_finite
from ppsd.worker.messages import (
    CONTROL_BYTES,
    Begin,
    Block,
    Control,
    Landing,
    Message,
    Status,
    decode,
    encode,
)
from ppsd.worker.recorder import Recorder

SLICES_PER_REPORT = 500  # keeps one report well below CONTROL_BYTES


class Worker:
    """One stage behind the first. Messages arrive in order; stale blocks are dropped unread.

    A block is stale when rank 0 has published a newer epoch: it rests on a draft now known to be
    wrong. Nobody waits for its answer, so dropping it at any moment is safe.
    """

    def __init__(
        self,
        rank: int,
        stage: StageModel,
        endpoint: Endpoint,
        judge: Judge | None,
        *,
        timeout: float,
        recorder: Recorder | None = None,
    ) -> None:
        self.rank = rank
        self.stopped = False
        self._stage = stage
        self._endpoint = endpoint
        self._judge = judge
        self._timeout = timeout
        self._recorder = recorder or Recorder()
        self._landing = Landing()
        self._epoch = 0  # of the block at work
        self._stale = Asking(self._ask, endpoint.words)

    def step(self, timeout: float) -> bool:
        """Handle one message; False when none came within ``timeout`` seconds."""
        received = self._endpoint.receive(timeout)
        if received is None:
            return False
        self.handle(decode(received[1], self._endpoint.rows, self._landing))
        return True

    def handle(self, message: Message) -> None:
        """Act on one message and pass on what concerns later stages."""
        if isinstance(message, Block):
            self._on_block(message)
            return
        if not isinstance(message, Begin | Control):
            raise ProtocolError(f"a {type(message).__name__} may not reach stage {self.rank}")
        if self._judge is None:
            self._send(self.rank + 1, message)
        elif isinstance(message, Begin):
            self._judge.begin(message)
        if isinstance(message, Control):
            self._on_control(message)

    def _ask(self) -> bool:
        return self._endpoint.epoch() > self._epoch

    def _on_block(self, block: Block) -> None:
        self._epoch = block.epoch
        if self._ask():
            self._recorder.blocks["dropped"] += 1
            return
        start = time.monotonic_ns()
        hidden = self._stage.forward(block.hidden, block.position, self._stale)
        try:
            answer = None if hidden is None else self._answer(block, hidden)
        except RequestError as error:  # rank 0 ends the request; this stage takes the next
            answer = Status(self.rank, "refused", {"epoch": block.epoch, "message": str(error)})
        kind = "cancelled" if answer is None else "verify" if block.judge else "prefill"
        self._recorder.add(start, kind, block.epoch, block.position, len(block.tokens))
        if answer is not None:
            self._send(0 if self._judge is not None else self.rank + 1, answer)

    def _answer(self, block: Block, hidden: torch.Tensor) -> Message:
        require_finite(hidden, self.rank, block.position)
        if self._judge is not None:
            return self._judge.verdict(block, hidden)
        return block._replace(hidden=hidden)

    def _on_control(self, control: Control) -> None:
        if control.verb == "stop":
            self.stopped = True
        elif control.verb == "report":
            self._report()

    def _report(self) -> None:
        """Answer in as many statuses as the slices need; the last one says so."""
        taken = self._recorder.take()
        slices = taken.pop("slices", [])
        while len(slices) > SLICES_PER_REPORT:
            part, slices = slices[:SLICES_PER_REPORT], slices[SLICES_PER_REPORT:]
            self._send(0, Status(self.rank, "report", {"slices": part, "last": False}))
        self._send(0, Status(self.rank, "report", taken | {"slices": slices, "last": True}))

    def _send(self, to: int, message: Message) -> None:
        self._endpoint.send(to, encode(message), self._timeout)


def failure_status(rank: int, error: BaseException) -> Status:
    """Describe an exception so that rank 0 can raise it; long tracebacks keep their end."""
    text = "".join(traceback.format_exception(error))
    fields: dict[str, Any] = {
        "error": type(error).__name__,
        "message": str(error)[:4096],
        "pipeline": isinstance(error, PipelineError),
        "traceback": text,
    }
    while len(json.dumps(fields)) > CONTROL_BYTES // 2:
        fields["traceback"] = fields["traceback"][len(fields["traceback"]) // 2 :]
    return Status(rank, "failed", fields)
