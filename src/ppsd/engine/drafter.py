"""Where drafts come from: an exit head or earlier text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ppsd.errors import RequestError
from ppsd.model.exit_head import ExitHead
from ppsd.speculation.lookup import ODDS, find, mixed
from ppsd.speculation.masks import Mask
from ppsd.speculation.sampling import Sampler, Stream

# A head lags behind until its next draft, when a few rows cost as much as one; prompts do not wait.
MAX_LAG_ROWS = 8


class Given(NamedTuple):
    """What a draft rests on besides the observed rows.

    ``history`` [L] are all tokens so far; ``verified`` [1, C] is the last layer's row of the newest
    verified position, if one is known. ``stream`` is the noise to draw with: the target's own
    where draft and target are coupled; a draft that ``mask`` does not permit is not taken.
    """

    sampler: Sampler
    history: torch.Tensor
    stream: Stream = Stream.TARGET
    verified: torch.Tensor | None = None
    mask: Mask | None = None


@dataclass
class DraftState:
    """How far the drafts of one slot have come; like the rows in the caches it outlives a request.

    ``slot`` is where the head keeps its own rows. ``rows`` were observed but have not run through
    the head; ``next`` is the position after them, ``last`` the head's row [1, C] of the newest
    position that has. ``drawn`` holds, by position, the distributions [V] of drafts that were
    drawn with noise of their own.
    """

    slot: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    next: int = 0
    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    drawn: dict[int, torch.Tensor] = field(default_factory=dict)


def single_rows(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows of ``x`` [n, C], each [1, C]; mostly it is one."""
    return (x,) if x.shape[0] == 1 else torch.split(x, 1)


class Drafter(Protocol):
    """Guesses the next token from what stage 0 has computed; what it knows of a slot is its state.

    ``feedback`` is true if drafts make use of verified rows.
    """

    @property
    def feedback(self) -> bool: ...

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        """Take stage 0's rows [n, C] at ``position``…; what stood there or later is void."""

    def draft(self, state: DraftState, given: Given) -> int:
        """Guess the token that follows ``given.history``, whose last row was observed."""


class HeadDrafter:
    """Drafts by an exit head, with the same sampler and noise as the target's own choice.

    ``lookup`` mixes in what followed the same tokens before (speculation/lookup.py).
    """

    def __init__(self, head: ExitHead, *, lookup: bool = False) -> None:
        self.head = head
        self._lookup = lookup

    @property
    def feedback(self) -> bool:
        return self.head.config.feedback

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        kept = max(0, len(state.rows) - (state.next - position))
        del state.rows[kept:]
        state.rows += single_rows(hidden)
        state.next = position + hidden.shape[0]
        if len(state.rows) > MAX_LAG_ROWS:
            self._catch_up(state)

    def _catch_up(self, state: DraftState) -> None:
        rows = torch.cat(state.rows) if len(state.rows) > 1 else state.rows[0]
        state.rows = []
        state.last = self.head.forward(rows, state.next - rows.shape[0], state.slot)[-1:]

    def draft(self, state: DraftState, given: Given) -> int:
        if state.rows:
            self._catch_up(state)
        sampler, history, stream, verified, mask = given
        finished = self.head.finish(state.last, verified)
        scores = self.head.scores(finished, state.slot)
        match = find(history) if self._lookup else None
        odds = self.head.copy_odds(finished)[0] if match else ODDS
        largest = mask is None and sampler.takes_largest(len(history))
        if largest and self.head.drafts_below(sampler.vocab_size, state.slot):
            return self.head.likeliest(scores, match, odds, state.slot)
        logits = self.head.spread(scores, state.slot)[0]
        if match:
            logits = mixed(logits, match, odds)
        try:
            if stream is Stream.TARGET:
                return sampler.choose(logits, history, mask)
            position = history.numel()
            state.drawn = {p: row for p, row in state.drawn.items() if p < position}
            state.drawn[position] = sampler.probabilities(logits, history)
            return sampler.draw(logits, history, stream)
        except RequestError:  # all that the head can say is banned; the target may say more
            return int(history[-1])


class LookupDrafter:
    """Repeats what followed the same tokens before, for models without a trained head.

    Where nothing stood before it repeats the last token: a wrong draft is as cheap as none.
    """

    feedback = False

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        """Need nothing."""

    def draft(self, state: DraftState, given: Given) -> int:
        match = find(given.history)
        return match.token if match else int(given.history[-1])


class PacedDrafter:
    """Drafts by ``drafter`` in ``seconds`` each: the head of a paced stage 0 is as slow as it.

    So is a head's pass over many rows of a prompt, which do not wait for the draft.
    """

    def __init__(self, drafter: Drafter, seconds: float) -> None:
        self._drafter = drafter
        self._seconds = seconds

    @property
    def feedback(self) -> bool:
        return self._drafter.feedback

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        with self._in_time() if len(hidden) > MAX_LAG_ROWS else nullcontext():
            self._drafter.observe(state, position, hidden)

    def draft(self, state: DraftState, given: Given) -> int:
        with self._in_time():
            return self._drafter.draft(state, given)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Take the emulated device's time, all of it: nothing interrupts a head at work either."""
        end = time.monotonic() + self._seconds
        yield
        time.sleep(max(0.0, end - time.monotonic()))
