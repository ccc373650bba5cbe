"""A stage worker: receive → forward → send. The same loop runs in a process and in-process."""

from __future__ import annotations

import json
import traceback
from typing import Any

import torch

from ppsd.errors import PipelineError, ProtocolError, RequestError
from ppsd.model.passes import Pass, Piece
from ppsd.model.stage import StageModel
from ppsd.speculation.waves import Row
from ppsd.worker.frame import CONTROL_BYTES
from ppsd.worker.inner_head import Speaker, place_of
from ppsd.worker.judge import Judge, require_finite
from ppsd.worker.link import Link
from ppsd.worker.messages import Begin, Block, Control, Message, Refusal, Status
from ppsd.worker.recorder import Recorder
from ppsd.worker.wave_messages import Wave

SLICE_BYTES, NODE_BYTES = 100, 24  # at most, in a report, of a slice and of each of its nodes


class Worker:
    """One stage behind the first. Messages arrive in order; stale blocks are dropped unread.

    A block is stale when rank 0 has published a newer epoch: it rests on a draft now known to be
    wrong. Nobody waits for its answer, so dropping it at any moment is safe.
    """

    def __init__(
        self,
        rank: int,
        stage: StageModel,
        link: Link,
        judge: Judge | None,
        recorder: Recorder | None = None,
        head: Speaker | None = None,
    ) -> None:
        self.rank = rank
        self.stopped = False
        self._stage = stage
        self._link = link
        self._judge = judge
        self._head = head
        self._heard: set[int] = set()  # slots whose requests want this stage's opinions
        self.joining: Block | None = None  # waits for the wave that it joins
        self._recorder = recorder or Recorder()

    def step(self, timeout: float) -> bool:
        """Handle one message; False when none came within ``timeout`` seconds."""
        message = self._link.receive(timeout)
        if message is not None:
            self.handle(message)
        return message is not None

    def handle(self, message: Message) -> None:
        """Act on one message and pass on what concerns later stages."""
        if isinstance(message, Block):
            self._on_block(message)
            return
        if isinstance(message, Wave):
            self._on_wave(message)
            return
        if not isinstance(message, Begin | Control):
            raise ProtocolError(f"a {type(message).__name__} may not reach stage {self.rank}")
        if self._judge is None:
            self._link.send(self.rank + 1, message)
        elif isinstance(message, Begin):
            self._judge.begin(message)
        if isinstance(message, Begin):
            self._share(message)
            (self._heard.add if message.want_opinions else self._heard.discard)(message.slot)
            if self._head is not None:
                self._head.begin(message)
        if isinstance(message, Control):
            self._on_control(message)

    def _share(self, begin: Begin) -> None:
        """Take over the rows that a request shares with another slot's."""
        if begin.source != begin.slot:
            self._stage.share(begin.source, begin.slot, begin.shared)
            if self._head is not None:
                self._head.share(begin.source, begin.slot, begin.shared)

    def _stale(self, block: Block) -> bool:
        return self._link.epoch(block.slot) > block.epoch

    def _on_block(self, block: Block) -> None:
        if self._stale(block):
            self._recorder.blocks["dropped"] += 1
            return
        if block.joins:  # a copy, as the wave's rows may land where these lie
            self.joining = block._replace(hidden=block.hidden.clone())
            return
        start = self._recorder.now()
        self._after_block(block, self._run(block, None), start)

    def _after_block(
        self, block: Block, hidden: torch.Tensor | None, start: int, *, joined: bool = False
    ) -> None:
        """Judge a block or send it on; ``hidden`` is None if it was not run to its end."""
        try:
            answer = None if hidden is None else self._answer(block, hidden)
        except RequestError as error:  # rank 0 ends the request; this stage takes the next
            answer = Refusal(block.slot, block.epoch, self.rank, str(error))
        kind = "cancelled" if answer is None else "verify" if block.judge else "prefill"
        place = block.epoch, block.position, len(block.tokens)
        self._recorder.add(start, kind, *place, joined=joined)
        if answer is None or hidden is None:
            return
        self._link.send(0 if self._judge is not None else self.rank + 1, answer)
        if self._head is not None and block.slot in self._heard:
            said = self._head.observe(self.rank, block, hidden)
            if said is not None:
                self._link.send(0, said)

    def _run(self, block: Block | None, wave: Wave | None) -> torch.Tensor | None:
        """Return the rows of a pass, or None once nobody waits for any of them."""
        slots = [part.slot for part in wave.parts] if wave else []
        watch = self._link.watch(*slots, *([block.slot] if block else []))
        work = self._start(block, wave)
        while True:
            watch.look()  # before asking: what comes after this stops the pass
            wanted = (block and not self._stale(block)) or (wave and self._alive(wave).rows)
            if not wanted:
                return None
            if work.advance(watch):
                return work.hidden

    def _start(self, block: Block | None, wave: Wave | None) -> Pass:
        piece = block and Piece(block.hidden, block.position, block.slot)
        if wave is None:
            assert piece is not None
            return self._stage.start(*piece)
        places = [place_of(row) for row in wave.rows]
        if piece is None:
            return self._stage.start_rows(wave.hidden, places)
        return self._stage.start_joined(piece, wave.hidden, places)

    def _answer(self, block: Block, hidden: torch.Tensor) -> Message:
        require_finite(hidden, self.rank, block.position)
        if self._judge is not None:
            if (scores := self._judge.scores(block, hidden)) is not None:
                self._link.send(0, scores)
            return self._judge.verdict(block, hidden)
        return block._replace(hidden=hidden)

    def _on_wave(self, wave: Wave) -> None:
        """Run the rows that still live; what the parts tell has to reach every stage anyhow."""
        for slot, _, length, moves in wave.parts:
            self._stage.commit(slot, length, moves)
            if self._head is not None:
                self._head.commit(slot, length, moves)
        wave = self._alive(wave)
        block = self._joined(wave)
        start = self._recorder.now()
        hidden = self._run(block, wave) if wave.rows else None
        if block is not None:
            end = len(block.tokens)
            own, hidden = (None, None) if hidden is None else (hidden[:end], hidden[end:])
            self._after_block(block, own, start, joined=True)
        if wave.rows:
            first, kind = wave.rows[0], "cancelled" if hidden is None else "verify"
            place = wave.parts[0].root, first.position, len(wave.rows)
            self._recorder.add(start, kind, *place, wave.rows)
        else:
            self._recorder.blocks["dropped"] += 1
        if hidden is not None:
            require_finite(hidden, self.rank, wave.rows[0].position)
            self._on_rows(wave, hidden)
        elif self._judge is None and any(part.moves for part in wave.parts):
            self._link.send(self.rank + 1, _part_of(wave, []))

    def _joined(self, wave: Wave) -> Block | None:
        """Return the block that is to run with a wave; a stale one, or without rows, is none."""
        block, self.joining = self.joining, None
        if block is None or (wave.rows and not self._stale(block)):
            return block
        self._on_block(block._replace(joins=False))
        return None

    def _on_rows(self, wave: Wave, hidden: torch.Tensor) -> None:
        """Judge a wave or send it on, and then say what a head here thinks of it."""
        if self._judge is not None:
            for answer in self._judge.verdicts(wave.rows, hidden, wave.masks):
                self._link.send(0, answer)
            return
        self._link.send(self.rank + 1, wave._replace(hidden=hidden))
        if self._head is not None:
            start = self._recorder.now()
            self._link.send(0, self._head.opinion(self.rank, wave.rows, hidden, masks=wave.masks))
            place = wave.parts[0].root, wave.rows[0].position
            self._recorder.add(start, "draft", *place, len(wave.rows))

    def _alive(self, wave: Wave) -> Wave:
        """Return the wave with the rows that live as far as this stage knows."""
        roots = {part.slot: (part.root, self._link.epoch(part.slot)) for part in wave.parts}
        live = [i for i, row in enumerate(wave.rows) if lives(row, *roots[row.slot])]
        if self._judge is not None:
            rows = [wave.rows[i] for i in live]
            live = [live[i] for i in self._judge.may_follow(rows)]
        if len(live) == len(wave.rows):
            return wave
        return _part_of(wave, live)

    def _on_control(self, control: Control) -> None:
        if control.verb == "stop":
            self.stopped = True
        elif control.verb == "report":
            self._report()
        elif control.verb == "busy":
            self._link.send(0, Status(self.rank, "busy", {"total_ns": self._recorder.total_ns}))

    def _report(self) -> None:
        """Answer in as many statuses as the slices need; the last one says so."""
        taken = self._recorder.take()
        part: list[Any] = []
        size = 0
        for piece in taken.pop("slices", []):
            size += SLICE_BYTES + NODE_BYTES * len(piece[-1])
            if part and size > CONTROL_BYTES // 2:
                self._link.send(0, Status(self.rank, "report", {"slices": part, "last": False}))
                part, size = [], SLICE_BYTES + NODE_BYTES * len(piece[-1])
            part.append(piece)
        self._link.send(0, Status(self.rank, "report", taken | {"slices": part, "last": True}))


def _part_of(wave: Wave, live: list[int]) -> Wave:
    """Return a wave with some of its rows."""
    rows = tuple([wave.rows[i] for i in live])
    masks = tuple([wave.masks[i] for i in live]) if wave.masks else ()
    return wave._replace(rows=rows, hidden=wave.hidden[live], masks=masks)


def lives(row: Row, root: int, epoch: int) -> bool:
    """Return True unless a row, fed under ``root``, has died since: see WavePolicy.epoch."""
    return epoch <= root or epoch == row.node or epoch in row.nodes


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
        longest = "traceback" if fields["traceback"] else "message"
        fields[longest] = fields[longest][(len(fields[longest]) + 1) // 2 :]
    return Status(rank, "failed", fields)
