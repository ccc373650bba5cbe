"""The last stage's voice: its output rows in, the target's own tokens out.

Belongs to the last worker, or to rank 0 when there is one stage only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ppsd.errors import NonFiniteError, ProtocolError, RequestError
from ppsd.model import kernels
from ppsd.model.stage import StageModel
from ppsd.speculation.masks import Mask
from ppsd.speculation.waves import Row
from ppsd.worker.messages import Begin, Block, Refusal, Verdict
from ppsd.worker.scores import UNSCORED, Scores, score
from ppsd.worker.slot import Slot
from ppsd.worker.wave_messages import Verdicts

MOST_BELOW = 3  # rows of an LM head that cost hardly more than one


def require_finite(hidden: torch.Tensor, rank: int, position: int) -> None:
    """Raise NonFiniteError unless a stage's output rows [n, C] at ``position``… are finite."""
    if kernels.all_finite(hidden) or math.isfinite(hidden.sum().item()):
        return
    finite = torch.isfinite(hidden)
    if not finite.all():  # a sum can overflow by itself
        row = int((~finite.all(dim=1)).nonzero()[0])
        raise NonFiniteError(f"stage {rank} computed NaN or infinity at position {position + row}")


class Judge:
    """Samples the target's token for every judged row; randomness is (seed, position) alone."""

    def __init__(self, stage: StageModel, rank: int, max_context: int, slots: int = 1) -> None:
        self._stage = stage
        self._rank = rank
        self._slots = [Slot(max_context) for _ in range(slots)]

    def begin(self, begin: Begin) -> None:
        """Let a request start in its slot."""
        slot = self._slot(begin.slot)
        if begin.source != begin.slot:
            slot.history.write(0, self._slot(begin.source).history.ids(0, begin.shared))
        slot.begin(begin)

    def verdict(self, block: Block, hidden: torch.Tensor) -> Verdict:
        """Judge the last ``block.judge`` of the rows ``hidden`` [n, C]."""
        slot = self._slot(block.slot)
        if slot.sampler is None:
            raise ProtocolError("a block arrived before any request began")
        rows = len(block.tokens)
        slot.history.write(block.position, block.tokens)
        first = block.position + rows - block.judge + 1
        judged = hidden if block.judge == rows else hidden[rows - block.judge :]
        logits = self._stage.logits(judged) if block.judge else None
        tokens = () if logits is None else self._tokens(slot, logits, first, block.masks)
        if tokens:  # a block's epoch is the root of the tree that its last row begins
            slot.node, slot.token = block.epoch, tokens[-1]
        return Verdict(
            slot=block.slot,
            epoch=block.epoch,
            source=self._rank,
            position=block.position,
            rows=rows,
            tokens=tokens,
            logits=logits if slot.want_logits else None,
            feedback=judged if slot.want_feedback and block.judge else None,
        )

    def scores(self, block: Block, hidden: torch.Tensor) -> Scores | None:
        """Score a piece of a prompt, if that is asked for; call it before ``verdict``.

        Its rows [n, C], after the last one of the piece before, say what should follow.
        """
        slot = self._slot(block.slot)
        if slot.scores == UNSCORED or block.position >= slot.prompt_length:
            return None
        rows, first = hidden[:-1], block.position + 1
        if slot.last is not None:
            rows, first = torch.cat([slot.last, rows]), block.position
        slot.last = hidden[-1:].clone()
        if not len(rows):
            return None
        assert slot.sampler is not None
        following = block.tokens[first - block.position :]
        said = score(self._stage.logits, rows, following, slot.sampler.vocab_size, slot.scores)
        return Scores(block.slot, block.epoch, self._rank, first, *said)

    def may_follow(self, rows: Sequence[Row]) -> list[int]:
        """Return which rows of a wave can still be verified: all below what was judged last.

        A row below the newest judged node, with another token than the target's, is dead, and so
        are its descendants.
        """
        roots: dict[int, int] = {}  # by slot: the node with the target's token
        live = []
        for index, row in enumerate(rows):
            slot = self._slot(row.slot)
            if (row.parent, row.token) == (slot.node, slot.token):
                roots[row.slot] = row.node
                live.append(index)
            elif row.slot in roots and roots[row.slot] in row.nodes:
                live.append(index)
        return live

    def verdicts(
        self, rows: Sequence[Row], hidden: torch.Tensor, masks: Sequence[Mask] = ()
    ) -> list[Verdicts | Refusal]:
        """Judge a wave's rows ``hidden`` [n, C]: those on the true path, as far as it goes.

        ``masks``: as in Wave. A request that cannot go on is refused, and the others are judged.
        """
        following = {(row.slot, row.parent, row.token): i for i, row in enumerate(rows)}
        known = self._likely(rows, following, hidden)
        judged: dict[int, int] = {}  # the target's token after a row
        logits: list[torch.Tensor] = []
        refusals: list[Verdicts | Refusal] = []
        for index in {row.slot: None for row in rows}:
            slot = self._slot(index)
            while (found := following.get((index, slot.node, slot.token))) is not None:
                row = rows[found]
                slot.history.write(row.position, (row.token,))
                own = known.get(found)
                if own is None:
                    own = self._stage.row_logits(hidden[found : found + 1])
                try:
                    token = self._tokens(slot, own, row.position + 1, masks[found : found + 1])[0]
                except RequestError as error:
                    refusals.append(Refusal(index, row.node, self._rank, str(error)))
                    break
                slot.node, slot.token = row.node, token
                judged[found] = token
                logits.append(own)
        if not judged:
            return refusals
        wanted = [self._slot(rows[i].slot) for i in judged]
        verdicts = Verdicts(
            source=self._rank,
            nodes=tuple((rows[i].slot, rows[i].node) for i in judged),
            tokens=tuple(judged.values()),
            logits=torch.cat(logits) if any(slot.want_logits for slot in wanted) else None,
            feedback=hidden[list(judged)] if any(slot.want_feedback for slot in wanted) else None,
        )
        return [verdicts, *refusals]

    def _likely(
        self,
        rows: Sequence[Row],
        following: Mapping[tuple[int, int, int], int],
        hidden: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Return the logits [1, V] of rows that are or may be judged, where one pass finds them.

        Those are the first of each slot that follows, and the next ones below it.
        """
        if kernels.reader(hidden) is None:  # several rows would take as many passes
            return {}
        likely = []
        for index in {row.slot: None for row in rows}:
            slot = self._slot(index)
            first = following.get((index, slot.node, slot.token))
            if first is not None:
                node = rows[first].node
                below = [i for i, row in enumerate(rows) if row.slot == index and node in row.nodes]
                likely += [first, *below[:MOST_BELOW]]
        if not likely:
            return {}
        found = torch.split(self._stage.row_logits(hidden[likely]), 1)
        # copies lie as aligned as a row alone, on which a library's bits may rest
        return {index: row.clone() for index, row in zip(likely, found, strict=True)}

    def _slot(self, index: int) -> Slot:
        if index >= len(self._slots):
            raise ProtocolError(f"slot {index} is none of the {len(self._slots)} there are")
        return self._slots[index]

    def _tokens(
        self, slot: Slot, logits: torch.Tensor, first: int, masks: Sequence[Mask]
    ) -> tuple[int, ...]:
        """Return the target's tokens at ``first``…, one for each row of ``logits`` [n, V]."""
        assert slot.sampler is not None
        if not masks and slot.sampler.takes_largest(first):
            largest = kernels.largest(logits, slot.sampler.vocab_size)
            if largest is not None:
                return largest
        given: Sequence[Mask | None] = masks or [None] * len(logits)
        tokens: list[int] = []
        for i, (row, mask) in enumerate(zip(logits, given, strict=True)):
            try:
                tokens.append(self._choose(slot, row, first + i, mask))
            except RequestError:
                if not (masks and slot.ended(first, tokens)):
                    raise
                # What a grammar permits behind a wrong draft concerns nobody: any token will do.
                return (*tokens, *tokens[-1:] * (len(given) - i))
        return tuple(tokens)

    def _choose(self, slot: Slot, logits: torch.Tensor, position: int, mask: Mask | None) -> int:
        assert slot.sampler is not None
        try:
            return slot.sampler.choose(logits, slot.history.before(position), mask)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (stage {self._rank}, position {position})") from error
