"""An exit head as it speaks in waves: what may follow each row, and how likely that is.

Rank 0 drafts with the one at its own exit; those on later boundaries correct it on the way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from ppsd.model.exit_head import ExitHead
from ppsd.model.passes import Place
from ppsd.speculation.lookup import Array
from ppsd.speculation.masks import Mask
from ppsd.speculation.sampling import gumbel
from ppsd.speculation.tree import CANDIDATES
from ppsd.speculation.waves import Row
from ppsd.worker.messages import Begin, Block
from ppsd.worker.wave_messages import Opinion

KEPT_NOISE = 64  # positions
MAX_LAG_ROWS = 8  # of a slot that may wait for the next opinion, when they cost as much as one


def place_of(row: Row) -> Place:
    """Return where a row stands."""
    return Place(row.slot, row.position, row.cell, row.cells)


class Speaker(Protocol):
    """What engine and stages ask of a head: InnerHead, or a virtual one."""

    def begin(self, begin: Begin) -> None: ...

    def share(self, source: int, slot: int, length: int) -> None: ...

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None: ...

    def lag(self, rows: Sequence[Row], hidden: torch.Tensor) -> None: ...

    def observe(self, rank: int, block: Block, hidden: torch.Tensor) -> Opinion | None: ...

    def opinion(
        self,
        rank: int,
        rows: Sequence[Row],
        hidden: torch.Tensor,
        verified: torch.Tensor | None = None,
        masks: Sequence[Mask] = (),
    ) -> Opinion: ...


class InnerHead:
    """A head on a stage's boundary, with rows of its own in the stage's cells.

    ``seconds``: what a pass of rows takes on an emulated device, 0 for real time.
    """

    def __init__(self, head: ExitHead, seconds: float = 0.0) -> None:
        self.head = head
        self._seconds = seconds
        self._lagging: dict[int, list[tuple[Row, torch.Tensor]]] = {}  # by slot, in order
        self._requests: dict[int, Begin] = {}  # by slot
        self._noise: dict[tuple[int, int], torch.Tensor] = {}  # by seed and position

    def begin(self, begin: Begin) -> None:
        """Draft for a request in its slot from now on.

        If it takes over no rows, those that still wait there are void, and may even be another
        engine's, after which the cache has been written to.
        """
        self._requests[begin.slot] = begin
        self.head.begin(begin.slot, begin.prompt_ids)
        if not begin.shared:
            self._lagging.pop(begin.slot, None)

    def lag(self, rows: Sequence[Row], hidden: torch.Tensor) -> None:
        """Take the rows [n, C] of a wave on which no opinion is wanted.

        Certain rows, one of each slot, may wait: those of several waves run later in one pass.
        """
        alone = len({row.slot for row in rows}) == len(rows)
        waits = alone and all(row.cell == row.position and not row.cells for row in rows)
        if not (waits and all(map(self._may_join, rows))):
            self._catch_up()
        if waits:
            for row, own in zip(rows, torch.split(hidden, 1), strict=True):
                self._lagging.setdefault(row.slot, []).append((row, own))
            return
        with self._in_time():
            self.head.forward_rows(hidden, [place_of(row) for row in rows])

    def _may_join(self, row: Row) -> bool:
        """Return True if a row may wait with those of its slot."""
        waiting = self._lagging.get(row.slot, [])
        follows = not waiting or waiting[-1][0].position + 1 == row.position
        return follows and len(waiting) < MAX_LAG_ROWS

    def _catch_up(self) -> None:
        if not self._lagging:
            return
        waiting, self._lagging = self._lagging, {}
        hidden = torch.cat([own for slot in waiting.values() for _, own in slot])
        starts = {slot: rows[0][0].position for slot, rows in waiting.items()}
        with self._in_time():
            if len(waiting) == 1:
                [(slot, start)] = starts.items()
                self.head.forward(hidden, start, slot)
                return
            places = [
                Place(slot, row.position, row.cell, tuple(range(starts[slot], row.position)))
                for slot, own in waiting.items()
                for row, _ in own
            ]
            self.head.forward_rows(hidden, places)
        for slot, own in waiting.items():
            self.head.commit(slot, starts[slot] + len(own), ())

    def observe(self, rank: int, block: Block, hidden: torch.Tensor) -> Opinion | None:
        """Take a prompt's rows [n, C]; return what may follow the last, if it is judged."""
        self._catch_up()
        with self._in_time():
            rows = self.head.forward(hidden, block.position, block.slot)
            if not block.judge:
                return None
            place = (block.slot, block.position + len(block.tokens))
            node = ((block.slot, block.epoch),)
            return self._say(rank, node, [place], rows[-1:], None, block.masks[-1:])

    def opinion(
        self,
        rank: int,
        rows: Sequence[Row],
        hidden: torch.Tensor,
        verified: torch.Tensor | None = None,
        masks: Sequence[Mask] = (),
    ) -> Opinion:
        """Return what may follow the rows [n, C] of a wave, as far as their ``masks`` permit it.

        ``verified`` [n, C] are the last layer's rows that the head takes as feedback.
        """
        self._catch_up()
        with self._in_time():
            features = self.head.forward_rows(hidden, [place_of(row) for row in rows])
            nodes = tuple([(row.slot, row.node) for row in rows])
            following = [(row.slot, row.position + 1) for row in rows]
            return self._say(rank, nodes, following, features, verified, masks)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Take the emulated device's time for what is done inside."""
        end = time.monotonic() + self._seconds
        yield
        time.sleep(max(0.0, end - time.monotonic()))

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first rows of a slot to another; see KVCache.share."""
        self._catch_up()
        self.head.share(source, slot, length)

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Make a wave's part true in the head's cache; see KVCache.commit."""
        waiting = self._lagging.get(slot)
        if waiting and (moves or length != waiting[-1][0].position + 1):
            self._catch_up()
        if slot not in self._lagging:  # else the length grows when they run
            self.head.commit(slot, length, moves)

    def _say(
        self,
        rank: int,
        nodes: tuple[tuple[int, int], ...],
        following: Sequence[tuple[int, int]],
        features: torch.Tensor,
        verified: torch.Tensor | None,
        masks: Sequence[Mask],
    ) -> Opinion:
        finished = self.head.finish(features, verified)
        slots = [slot for slot, _ in nodes]

        def told(scores: torch.Tensor, ids: Sequence[Array]) -> torch.Tensor:
            return _permitted(self._perturbed(scores, ids, following), ids, masks)

        tokens, probabilities = self.head.opinions(finished, CANDIDATES, slots, told)
        odds = self.head.copy_odds(finished).float().cpu()
        numbers = torch.cat([probabilities, odds.expand(len(nodes), -1)], 1)
        return Opinion(rank, nodes, tuple(map(tuple, tokens.tolist())), numbers)

    def _perturbed(
        self, scores: torch.Tensor, ids: Sequence[Array], following: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Add to the scores [n, W] of sampled requests the target's own noise.

        What the target will choose has the largest of its own perturbed logits, so the candidates
        are those with the largest of ours. ``following`` are the slots and positions asked about.
        """
        requests = [self._requests.get(slot) for slot, _ in following]
        if all(request is None or request.params.greedy for request in requests):
            return scores
        scores = scores.to("cpu", torch.float32, copy=True)
        for row, (request, (_, position)) in enumerate(zip(requests, following, strict=True)):
            if request is not None and not request.params.greedy:
                count = len(ids[row])
                own = scores[row, :count].double()  # shifted: a low temperature must not overflow
                own = (own - own.amax()) / request.params.temperature
                scores[row, :count] = own + self._noise_of(request, position)[ids[row]]
        return scores

    def _noise_of(self, request: Begin, position: int) -> torch.Tensor:
        """Return the noise [V] of a position, kept for the rows of other branches."""
        key = request.params.seed, position
        if key not in self._noise:
            while len(self._noise) >= KEPT_NOISE:
                del self._noise[next(iter(self._noise))]
            self._noise[key] = gumbel(*key, self.head.spec.vocab_size).float()
        return self._noise[key]


def _permitted(scores: torch.Tensor, ids: Sequence[Array], masks: Sequence[Mask]) -> torch.Tensor:
    """Ban what masks do not permit from the scores [n, W] of each row's tokens ``ids``.

    A row that could say nothing at all keeps its scores: the last stage refuses its request.
    """
    if not masks:
        return scores
    banned = np.zeros(scores.shape, bool)
    for row, (own, mask) in enumerate(zip(ids, masks, strict=True)):
        told = np.frombuffer(mask, np.uint8)
        if (beyond := (int(own.max()) >> 3) + 1 - len(told)) > 0:  # padded rows, without tokens
            told = np.pad(told, (0, beyond))
        banned[row, : len(own)] = told[own >> 3] >> (own & 7).astype(np.uint8) & 1 == 0
        banned[row, : len(own)] &= not banned[row, : len(own)].all()
    return scores.masked_fill(torch.from_numpy(banned).to(scores.device), -math.inf)
