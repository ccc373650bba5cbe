"""Stage 0 as the engine uses it: rows forward, complete blocks to ship, drafts from its exit.

It carries out ``Feed`` commands; it decides nothing and sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from ppsd.engine.drafter import Drafter, Given, single_rows
from ppsd.engine.sequence import Sequence
from ppsd.errors import NonFiniteError, ProtocolError
from ppsd.model.passes import Pass, Piece
from ppsd.model.stage import StageModel
from ppsd.speculation.masks import lowest, permits
from ppsd.speculation.policy import UNVERIFIED, Drafted, Feed
from ppsd.speculation.sampling import Stream
from ppsd.speculation.waves import Part, Row
from ppsd.worker.inner_head import Speaker, place_of
from ppsd.worker.judge import require_finite
from ppsd.worker.messages import Block, Verdict
from ppsd.worker.recorder import Recorder


class FirstStage:
    """The first stage's model and what drafts at its exit.

    ``drafter`` may be changed between requests; ``drafting`` is off where no draft is ever used,
    so that plain decoding pays nothing for a head. ``head`` is what speaks of the rows of waves.
    """

    def __init__(
        self,
        model: StageModel,
        drafter: Drafter | None,
        recorder: Recorder,
        head: Speaker | None = None,
    ) -> None:
        self.drafter = drafter
        self.head = head
        self.drafting = drafter is not None
        self.recorder = recorder
        self.draft_stream = Stream.TARGET
        self._model = model

    @property
    def wants_feedback(self) -> bool:
        """Tell if drafts are better with the last layer's rows."""
        return self.drafting and self.drafter is not None and self.drafter.feedback

    def start(self, sequence: Sequence, feed: Feed) -> Pass:
        """Begin a pass of the rows of ``feed`` through the stage's layers."""
        return self._model.start(*self._piece(sequence, feed))

    def start_rows(self, rows: Items[Row], piece: tuple[Sequence, Feed] | None = None) -> Pass:
        """Begin a pass of a wave's rows, behind those of a prompt's ``piece`` if there is one."""
        tokens, places = torch.tensor([row.token for row in rows]), [place_of(row) for row in rows]
        if piece is None:
            return self._model.start_rows(tokens, places)
        return self._model.start_joined(self._piece(*piece), tokens, places)

    def _piece(self, sequence: Sequence, feed: Feed) -> Piece:
        if feed.position == feed.block:
            sequence.open_rows.clear()
        sequence.history.write(feed.position, feed.tokens)
        tokens = sequence.history.before(feed.position + len(feed.tokens), feed.position)
        return Piece(tokens, feed.position, sequence.slot)

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first rows of a slot to another, in the caches of stage and head."""
        self._model.share(source, slot, length)
        if self.head is not None and self.drafting:
            self.head.share(source, slot, length)

    def commit(self, part: Part) -> None:
        """Make a part of a wave true in the caches of stage and head."""
        self._model.commit(part.slot, part.length, part.moves)
        if self.head is not None and self.drafting:
            self.head.commit(part.slot, part.length, part.moves)

    def finish(self, sequence: Sequence, feed: Feed, hidden: torch.Tensor) -> Block | None:
        """Take the rows [n, C] that a pass gave; return the block that they complete, if any."""
        require_finite(hidden, 0, feed.position)
        sequence.open_rows.append(hidden)
        if not feed.ship:
            return None
        rows = sequence.open_rows
        end = feed.position + len(feed.tokens)
        hidden = torch.cat(rows) if len(rows) > 1 else rows[0]
        rows.clear()
        return Block(
            slot=sequence.slot,
            epoch=feed.epoch,
            position=feed.block,
            parent=feed.block - 1,
            judge=feed.judge,
            tokens=sequence.history.ids(feed.block, end),
            hidden=hidden,
            masks=sequence.masks(end - feed.judge, end),
        )

    def observe(self, sequence: Sequence, feed: Feed, hidden: torch.Tensor) -> None:
        """Let the drafter see the rows [n, C] of a feed; forget feedback of no more use."""
        if self.drafter is None or not self.drafting:
            return
        feedback = sequence.feedback
        sequence.feedback = {p: row for p, row in feedback.items() if p >= feed.verified}
        self.drafter.observe(sequence.draft, feed.position, hidden)

    def draft(self, sequence: Sequence, feed: Feed) -> Drafted:
        """Draft the token that follows the rows of ``feed``."""
        assert self.drafter is not None
        start = self.recorder.now()
        position = feed.position + len(feed.tokens)
        history = sequence.history.before(position)
        known = self.wants_feedback and feed.verified != UNVERIFIED
        verified = sequence.feedback[feed.verified] if known else None
        mask = next(iter(sequence.masks(position - 1, position)), None)
        try:
            given = Given(sequence.sampler, history, self.draft_stream, verified, mask)
            token = self.drafter.draft(sequence.draft, given)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (exit head, position {position})") from error
        if mask is not None and not permits(mask, token):
            permitted = lowest(mask)
            token = token if permitted is None else permitted
        self.recorder.add(start, "draft", feed.epoch, position, 1)
        return Drafted(feed.epoch, position, token)

    def keep(self, sequence: Sequence, verdict: Verdict) -> None:
        """Hold the feedback of a valid verdict for drafts to come; raises ProtocolError."""
        if verdict.feedback is None:
            if self.wants_feedback and len(verdict.tokens):
                raise ProtocolError(f"a verdict at {verdict.position} lacks the last layer's rows")
            return
        first = verdict.position + verdict.rows - verdict.feedback.shape[0]
        rows = single_rows(verdict.feedback)
        sequence.feedback |= {first + i: row for i, row in enumerate(rows)}
