"""The engine of candidate trees: waves of rows of all its sequences, the most valuable first.

It is the engine of chains (engine.py) with another policy: that one is told what to feed by each
answer, this one asks what to feed whenever stage 0 is free.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import groupby
from typing import Any

import torch

from ppsd.engine.engine import Engine, Output
from ppsd.engine.events import FedBlock, FedRows
from ppsd.engine.links import Answer
from ppsd.engine.sequence import Request, Sequence
from ppsd.errors import NonFiniteError, RequestError
from ppsd.speculation.masks import Mask
from ppsd.speculation.policy import Feed
from ppsd.speculation.tree import Cells, Node
from ppsd.speculation.waves import Part, Row, Verified, WavePolicy, choose
from ppsd.worker.judge import require_finite
from ppsd.worker.messages import Block, Verdict
from ppsd.worker.scores import Scores
from ppsd.worker.wave_messages import Opinion, Verdicts, Wave

PromptPiece = tuple[Sequence, Feed]


class WaveEngine(Engine):
    """Decodes requests by waves.

    A wave has all rows that are certain, and drafts up to ``rows`` rows in all; 0 drafts nothing.
    ``costs`` of 1, 2, … rows, where they are not free, limit a wave to the rows that pay.

    ``loose`` cells of each slot take the rows of branches. ``lookup`` lets earlier text propose
    tokens, ``opinions`` heads on later boundaries. Other arguments are Engine's.
    """

    def __init__(
        self,
        *arguments: Any,
        rows: int,
        costs: Items[float] = (),
        loose: int,
        lookup: bool = True,
        opinions: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self._rows = rows
        self._costs = costs
        self.stage.drafting = self.stage.drafting and rows > 0
        # of many requests without drafts the schedule knows one
        self._in_flight = self.schedule.in_flight if rows else self.links.size
        self._loose = loose
        self._lookup = lookup
        self.opinions = opinions
        self._wave = 0  # the number of the newest

    def step(self) -> list[tuple[Sequence, Output]]:
        """Return what is final; else feed a wave, or wait for an answer."""
        self._take_answers()
        for sequence in self._running:
            if sequence.commands:
                return self._carry_out(sequence)
        if not self._feed_wave():
            self._take(self.links.wait())
        return []

    def _policy(self, request: Request, slot: int) -> WavePolicy:
        return WavePolicy(
            slot,
            self.links.size,
            max_tokens=request.params.max_tokens,
            stop_ids=request.stop_ids,
            cells=Cells(self._max_context, self._loose),
            lookup=self._lookup,
            epoch=self.links.epoch(slot),
            prefill_chunk=self._prefill_chunk,
            masks=request.masks,
        )

    def _feed_wave(self) -> bool:
        """Feed a piece of a prompt and a wave's rows in one pass, or what there is of them.

        Return False if nothing may be fed.
        """
        waves = {wave for sequence in self._running for wave in sequence.waves.waves}
        if len(waves) >= self._in_flight:
            return False
        piece = self._next_piece()
        prompted = piece and piece[0]
        policies = [each.waves for each in self._running if each is not prompted]
        chosen = choose(policies, self._rows, self._wave + 1, self._costs)
        if piece is None and not chosen:
            return False
        self._wave += 1
        if chosen:
            self._feed_rows(chosen, piece)
        elif piece is not None:
            self._observe(*self._ship(*piece))
        return True

    def _next_piece(self) -> PromptPiece | None:
        for sequence in self._running:
            feed = sequence.waves.chunk(self._wave + 1)
            if feed is not None:
                self._running.remove(sequence)  # so that all prompts get their turn
                self._running.append(sequence)
                return sequence, feed
        return None

    def _observe(self, hidden: torch.Tensor | None, block: Block | None) -> None:
        """Hear what the first head says of the end of a piece of a prompt."""
        head = self.stage.head
        if hidden is not None and block is not None and head is not None and self.stage.drafting:
            said = head.observe(0, block, hidden)
            if said is not None:
                self._hear(said)

    def _feed_rows(self, chosen: Items[tuple[WavePolicy, Node]], piece: PromptPiece | None) -> None:
        parts, rows = [], []
        masks: list[Mask | None] = []
        for policy, nodes in _by_policy(chosen):
            part, own = policy.part(nodes)
            parts.append(part)
            rows += own
            masks += policy.masks(nodes)
        self._run_wave(tuple(parts), rows, _for_each(masks), piece)

    def _run_wave(
        self,
        parts: tuple[Part, ...],
        rows: list[Row],
        masks: tuple[Mask, ...],
        piece: PromptPiece | None,
    ) -> None:
        """Run rows through stage 0, ship those that still live, and then draft behind them."""
        recorder = self.stage.recorder
        start = recorder.now()
        if recorder.observer is not None:
            if piece is not None:
                recorder.tell(FedBlock(start, piece[0].slot, piece[1]))
            recorder.tell(FedRows(start, rows))
        for part in parts:
            self.stage.commit(part)
        own, hidden = self._advance(rows, piece)
        block = piece and self._send_block(*piece, own, start, joins=True)
        kind = "forward" if hidden is not None else "cancelled"
        recorder.add(start, kind, parts[0].root, rows[0].position, len(rows), rows)
        if hidden is None:
            if any(part.moves for part in parts):  # they will not be told again
                self.links.send(Wave(parts, (), torch.empty(0, 0)))
            return
        recorder.count(len(rows))
        require_finite(hidden, 0, rows[0].position)
        self.links.send(Wave(parts, tuple(rows), hidden, masks))  # before drafting: see Engine
        self._observe(own, block)
        self._draft(rows, hidden, masks)

    def _advance(
        self, rows: Items[Row], piece: PromptPiece | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the rows of a piece and a wave after a pass, None if nobody waits for them."""
        work = self.stage.start_rows(rows, piece)
        watch = self.links.watch()
        while True:
            watch.look()  # before asking: what comes after this stops the pass
            self._take_answers()
            wanted = piece is not None and self._still_wanted(*piece)
            if not wanted and not any(self._lives(row) for row in rows):
                return None, None
            if work.advance(watch):
                own, hidden = work.hidden.tensor_split([len(work.hidden) - len(rows)])
                return own if wanted else None, hidden

    def _draft(self, rows: list[Row], hidden: torch.Tensor, masks: tuple[Mask, ...]) -> None:
        stage = self.stage
        if stage.head is None or not stage.drafting:
            return
        if all(self._slots[row.slot].waves.paused for row in rows):
            stage.head.lag(rows, hidden)
            return
        start = stage.recorder.now()
        try:
            said = stage.head.opinion(0, rows, hidden, self._verified(rows), masks)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (exit head, position {rows[0].position})") from error
        stage.recorder.add(start, "draft", 0, rows[0].position + 1, len(rows))
        self._hear(said)

    def _verified(self, rows: Items[Row]) -> torch.Tensor | None:
        """Return the newest verified row of the last layer for each of ``rows``, [n, C]."""
        if not self.stage.wants_feedback:
            return None
        newest = [self._slots[row.slot].newest for row in rows]
        known = [row for row in newest if row is not None]
        return torch.cat(known) if len(known) == len(rows) else None

    def _lives(self, row: Row) -> bool:
        return row.node in self._slots[row.slot].waves.tree.nodes

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Opinion):
            self._hear(answer)
        elif isinstance(answer, Verdicts):
            self._verify(answer)
        elif isinstance(answer, Verdict | Scores):
            super()._take(answer)
        else:
            sequence = self._slots.get(answer.slot)
            # an epoch here is the node that cannot be judged
            if sequence is not None and answer.epoch == sequence.waves.tree.root.id:
                self._fail(sequence, RequestError(answer.message))

    def _hear(self, said: Opinion) -> None:
        for (slot, node), tokens, numbers in zip(
            said.nodes, said.tokens, said.numbers.tolist(), strict=True
        ):
            if (sequence := self._slots.get(slot)) is not None:
                sequence.waves.hear(node, said.source, tokens, numbers)

    def _verify(self, verdicts: Verdicts) -> None:
        """Let each sequence have its own verdicts."""
        indices = range(len(verdicts.nodes))
        for slot, group in groupby(indices, lambda i: verdicts.nodes[i][0]):
            own = list(group)
            sequence = self._slots.get(slot)
            if sequence is None or verdicts.nodes[own[0]][1] != sequence.waves.tree.root.id:
                continue  # of a request that is over
            nodes = tuple(verdicts.nodes[i][1] for i in own)
            first = sequence.waves.committed
            sink, logits = sequence.request.logits, verdicts.logits
            if sink is not None and logits is not None:
                places = ((first + i - own[0], logits[i]) for i in own)
                if not all(self._hand(sequence, sink, *place) for place in places):
                    continue
            if verdicts.feedback is not None:
                sequence.newest = verdicts.feedback[own[-1] : own[-1] + 1]
            self.stage.recorder.verify(slot, nodes)
            said = Verified(nodes, tuple(verdicts.tokens[i] for i in own))
            self._obey(sequence, sequence.waves.on(said))

    def _judge(self, sequence: Sequence, verdict: Verdict) -> None:
        if verdict.feedback is not None:
            sequence.newest = verdict.feedback[-1:]
        super()._judge(sequence, verdict)


def _by_policy(chosen: Items[tuple[WavePolicy, Node]]) -> list[tuple[WavePolicy, list[Node]]]:
    """Gather the nodes of each policy, in their order."""
    nodes: dict[int, tuple[WavePolicy, list[Node]]] = {}
    for policy, node in chosen:
        nodes.setdefault(policy.slot, (policy, []))[1].append(node)
    return list(nodes.values())


def _for_each(masks: list[Mask | None]) -> tuple[Mask, ...]:
    """Return a mask for every row of a wave, or none if no row has one."""
    widths = {len(mask) for mask in masks if mask is not None}
    if not widths:
        return ()
    return tuple(b"\xff" * max(widths) if mask is None else mask for mask in masks)
