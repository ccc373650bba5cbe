"""Where drafts come from: an exit head or earlier text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ppsd.errors import RequestError
from ppsd.model.exit_head import ExitHead
from ppsd.speculation.lookup import ODDS, find, mixed
from ppsd.speculation.sampling import Sampler, Stream

# A head lags behind until its next draft, when a few rows cost as much as one; prompts do not wait.
MAX_LAG_ROWS = 8


class Given(NamedTuple):
    """What a draft rests on besides the observed rows.

    ``history`` [L] are all tokens so far; ``verified`` [1, C] is the last layer's row of the newest
    verified position, if one is known.
    """

    sampler: Sampler
    history: torch.Tensor
    stream: Stream
    verified: torch.Tensor | None = None


def single_rows(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The rows of ``x`` [n, C], each [1, C]; mostly it is one."""
    return (x,) if x.shape[0] == 1 else torch.split(x, 1)


class Drafter(Protocol):
    """Guesses the next token from what stage 0 has computed."""

    @property
    def feedback(self) -> bool:
        """Whether ``draft`` makes use of verified rows."""

    def observe(self, position: int, hidden: torch.Tensor) -> None:
        """Take stage 0's rows [n, C] at ``position``…; what stood there or later is void."""

    def draft(self, given: Given) -> int:
        """Guess the token that follows ``given.history``, whose last row was observed."""

    def probabilities(self, position: int) -> torch.Tensor:
        """Return the distribution [V] that the draft for ``position`` was drawn from."""


class _Drawn:
    """Keeps what drafts were drawn from, until they are judged or void."""

    def __init__(self) -> None:
        self._rows_by_position: dict[int, torch.Tensor] = {}

    def _keep(self, position: int, probabilities: torch.Tensor) -> None:
        before = {p: row for p, row in self._rows_by_position.items() if p < position}
        self._rows_by_position = before | {position: probabilities}

    def probabilities(self, position: int) -> torch.Tensor:
        """See Drafter."""
        return self._rows_by_position.pop(position)


class HeadDrafter(_Drawn):
    """Drafts by an exit head, with the same sampler and noise as the target's own choice.

    ``lookup`` mixes in what followed the same tokens before (speculation/lookup.py).
    """

    def __init__(self, head: ExitHead, *, lookup: bool = False) -> None:
        super().__init__()
        self.head = head
        self._lookup = lookup
        self._rows: list[torch.Tensor] = []  # observed, not yet run through the head
        self._next = 0  # position of the row after them
        self._last = torch.empty(0)  # the head's row of the newest position

    @property
    def feedback(self) -> bool:
        """See Drafter."""
        return self.head.config.feedback

    def observe(self, position: int, hidden: torch.Tensor) -> None:
        """See Drafter."""
        kept = max(0, len(self._rows) - (self._next - position))
        del self._rows[kept:]
        self._rows += single_rows(hidden)
        self._next = position + hidden.shape[0]
        if len(self._rows) > MAX_LAG_ROWS:
            self._catch_up()

    def _catch_up(self) -> None:
        rows = torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0]
        self._rows = []
        self._last = self.head.forward(rows, self._next - rows.shape[0])[-1:]

    def draft(self, given: Given) -> int:
        """See Drafter."""
        if self._rows:
            self._catch_up()
        sampler, history, stream, verified = given
        finished = self.head.finish(self._last, verified)
        scores = self.head.scores(finished)
        match = find(history) if self._lookup else None
        odds = self.head.copy_odds(finished)[0] if match else ODDS
        if self.head.drafts_below(sampler.vocab_size) and sampler.takes_largest(len(history)):
            return self.head.likeliest(scores, match, odds)
        logits = self.head.spread(scores)[0]
        if match:
            logits = mixed(logits, match, odds)
        try:
            if stream is Stream.TARGET:
                return sampler.choose(logits, history)
            self._keep(history.numel(), sampler.probabilities(logits, history))
            return sampler.draw(logits, history, stream)
        except RequestError:  # all that the head can say is banned; the target may say more
            token = int(history[-1])
            self._keep(history.numel(), _certain(token, sampler.vocab_size))
            return token


class LookupDrafter(_Drawn):
    """Repeats what followed the same tokens before, for models without a trained head.

    Where nothing stood before it repeats the last token: a wrong draft is as cheap as none.
    """

    feedback = False

    def observe(self, position: int, hidden: torch.Tensor) -> None:
        """Need nothing."""

    def draft(self, given: Given) -> int:
        """See Drafter."""
        history = given.history
        match = find(history)
        token = match.token if match else int(history[-1])
        if given.stream is not Stream.TARGET:
            self._keep(history.numel(), _certain(token, given.sampler.vocab_size))
        return token


class PacedDrafter:
    """Drafts by ``drafter`` in ``seconds`` each: the head of a paced stage 0 is as slow as it."""

    def __init__(self, drafter: Drafter, seconds: float) -> None:
        self._drafter = drafter
        self._seconds = seconds

    @property
    def feedback(self) -> bool:
        """See Drafter."""
        return self._drafter.feedback

    def observe(self, position: int, hidden: torch.Tensor) -> None:
        """See Drafter."""
        self._drafter.observe(position, hidden)

    def draft(self, given: Given) -> int:
        """See Drafter; nothing interrupts it, as nothing interrupts a head at work."""
        end = time.monotonic() + self._seconds
        token = self._drafter.draft(given)
        time.sleep(max(0.0, end - time.monotonic()))
        return token

    def probabilities(self, position: int) -> torch.Tensor:
        """See Drafter."""
        return self._drafter.probabilities(position)


def _certain(token: int, vocab_size: int) -> torch.Tensor:
    """The distribution [V] of a draft that could be no other."""
    row = torch.zeros(vocab_size, dtype=torch.float64)
    row[token] = 1.0
    return row
