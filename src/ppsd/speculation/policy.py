"""The decoding policy: a pure state machine that turns events into commands.

No torch, processes, clocks or I/O.

Words: feeding the token at position p asks the pipeline for the token at p + 1, twice: the exit
head answers at once with a draft, the last stage answers later with a verdict. The policy decides
what to feed when, compares the answers, and commits only what the last stage said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppsd import checks
from ppsd.errors import ConfigError, ProtocolError
from ppsd.speculation.accept import accept

MODES = ("autoregressive", "draft-then-verify", "ppsd")
DEFAULT_BLOCK = 4
MAX_IN_SCHEDULE = 64  # rows of a block, blocks in flight
MAX_ROWS = 64  # of a wave


@dataclass(frozen=True)
class Schedule:
    """Blocks of ``block`` tokens (m), at most ``in_flight`` of them (w) in the pipeline.

    A draft is made only where the schedule has room to feed it, so (1, 1) never drafts: that is
    plain decoding. A round of (m, 1) feeds the last committed token and m - 1 drafts.
    """

    block: int
    in_flight: int

    def __post_init__(self) -> None:
        for name, value in (("block", self.block), ("in_flight", self.in_flight)):
            object.__setattr__(self, name, checks.integer(name, value, 1, MAX_IN_SCHEDULE))

    @property
    def drafts(self) -> bool:
        """Return True if this schedule ever uses a draft."""
        return self.block > 1 or self.in_flight > 1


PLAIN = Schedule(1, 1)
UNVERIFIED = -1


def schedule_for(
    mode: str, stages: int, block: int | None = None, in_flight: int | None = None
) -> Schedule:
    """Return the schedule of a named mode for ``stages`` stages; given numbers override its own."""
    presets = {
        "autoregressive": (1, 1),
        "draft-then-verify": (DEFAULT_BLOCK, 1),
        "ppsd": (1, stages),
    }
    if mode not in presets:
        raise ConfigError("mode", mode, "one of " + ", ".join(MODES))
    if mode == "autoregressive" and (block or 1, in_flight or 1) != (1, 1):
        raise ConfigError("mode", mode, "draft-then-verify or ppsd when block or in_flight is set")
    preset_block, preset_in_flight = presets[mode]
    return Schedule(
        preset_block if block is None else block,
        preset_in_flight if in_flight is None else in_flight,
    )


class Feed(NamedTuple):
    """Run ``tokens`` at ``position``… through stage 0 as rows of the block begun at ``block``.

    ``ship``: the block is complete, send it on. ``judge``: how many of the block's last rows the
    last stage answers (0 inside a prompt). ``draft``: then ask the exit head for the next token.
    ``verified``: the newest position whose verdict has come for certain, so that a draft that
    rests on it is the same however fast answers are; UNVERIFIED when no judged row is known.
    """

    epoch: int
    position: int
    tokens: tuple[int, ...]
    block: int
    judge: int
    ship: bool
    draft: bool
    verified: int


class Emit(NamedTuple):
    """Commit ``tokens``: the first ``accepted`` were drafts, the others are the target's own."""

    tokens: tuple[int, ...]
    accepted: int


class Finish(NamedTuple):
    """The request is over; ``reason`` is ``stop``, ``length``, ``abort`` or ``error``."""

    reason: str


Command = Feed | Emit | Finish


class Drafted(NamedTuple):
    """A head's guess for ``position``; ``stage`` names the stage whose boundary it sits on."""

    epoch: int
    position: int
    token: int
    stage: int = 0


class Judged(NamedTuple):
    """The target's tokens for the positions after the judged rows of the block at ``block``.

    ``tokens[i]`` is for position ``first + i``; ``stage`` names the stage that speaks.
    """

    epoch: int
    block: int
    first: int
    tokens: tuple[int, ...]
    stage: int


Event = Drafted | Judged


@dataclass
class Counts:
    """What became of the drafts; ``drafted`` = ``judged`` + ``discarded`` when a request is over.

    Judged drafts met a verdict for their own position; discarded ones were thrown away because
    an earlier draft was wrong or the request ended. ``rows``: fed in all, the prompt's not counted.
    """

    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    discarded: int = 0
    resyncs: int = 0
    rows: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Return accepted / judged, or None when nothing was judged."""
        return self.accepted / self.judged if self.judged else None


class Policy:
    """One request's decoding under a schedule.

    ``start`` and ``on`` return commands to carry out in order. ``epoch`` grows at every resync
    and at the end: answers to work of an older epoch are ignored, so late, repeated or reordered
    answers cannot change the output.

    ``restarted``: the last verdict left the pipeline empty, so the next one takes a whole latency.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        epoch: int = 1,
        prefill_chunk: int = 128,
        prefill_in_flight: int = 1,
    ) -> None:
        self.schedule = schedule
        self.epoch = epoch
        self.counts = Counts()
        self.finished = False
        self.restarted = False
        self._active = schedule  # PLAIN while paused
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._chunk = prefill_chunk
        self._prefill_in_flight = max(prefill_in_flight, schedule.in_flight)
        self._tokens: list[int] = []  # committed tokens, then drafts not judged yet
        self._prompt = 0  # prompt tokens at the front of _tokens
        self._committed = 0  # tokens at the front of _tokens that are final
        self._fed = 0  # tokens at the front of _tokens that entered stage 0
        self._blocks: deque[tuple[int, int]] = deque()  # (first position, judged rows) in flight
        self._open_rows = 0  # rows fed of the block not shipped yet
        self._corrected = 0  # position of the newest token that is the target's own

    def start(self, prompt: Sequence[int], cached: int = 0) -> list[Command]:
        """Begin with ``prompt``, of which the pipeline already holds the first ``cached`` rows."""
        if not 0 <= cached < len(prompt):
            raise ConfigError("cached", cached, f"in [0, {len(prompt) - 1}] for this prompt")
        self._tokens = list(prompt)
        self._prompt = self._committed = len(prompt)
        self._fed = cached
        return self._advance()

    def on(self, event: Event) -> list[Command]:
        """Take one answer of the pipeline; return what to do next."""
        stale = self.finished or event.epoch != self.epoch
        if isinstance(event, Drafted):
            return self._on_draft(event, stale)
        return [] if stale else self._on_verdict(event)

    def stop(self, reason: str) -> list[Command]:
        """End the request now, for a reason the policy cannot see (stop string, client gone)."""
        return [] if self.finished else [self._finish(reason)]

    @property
    def emitted(self) -> int:
        """Count the tokens committed so far."""
        return self._committed - self._prompt

    def pause(self) -> None:
        """Go on as plain decoding; may come at any moment, and drafts under way are still judged.

        No draft is asked for from now on, and one block is in flight once the others have come.
        """
        self._active = PLAIN

    def resume(self) -> None:
        """Go back to the schedule, from the next token that is fed."""
        self._active = self.schedule

    @property
    def committed(self) -> int:
        """Return how many tokens are final, the prompt's among them."""
        return self._committed

    def draft_at(self, position: int) -> int | None:
        """Return the draft for ``position`` that still waits for its verdict, if there is one."""
        waiting = self._committed <= position < len(self._tokens)
        return self._tokens[position] if waiting else None

    def tokens(self, first: int, end: int) -> list[int]:
        """Return the committed tokens at positions from ``first`` to below ``end``."""
        return self._tokens[first : min(end, self._committed)]

    def _on_draft(self, event: Drafted, stale: bool) -> list[Command]:
        self.counts.drafted += 1
        if stale or event.position != len(self._tokens):  # the verdict was faster than the head
            self.counts.discarded += 1
            return []
        self._tokens.append(event.token)
        return self._advance()

    def _on_verdict(self, event: Judged) -> list[Command]:
        self._check(event)
        self._blocks.popleft()
        targets, end = self._until_end(event.tokens)
        drafts = self._tokens[self._committed : self._committed + len(targets)]
        accepted, correction = accept(drafts, targets)
        missed = accepted < min(len(drafts), len(targets))
        self.counts.judged += accepted + missed
        self.counts.accepted += accepted
        if correction is not None:
            self._replace_drafts(self._committed + accepted, correction, missed)
        emitted = targets[: accepted + (correction is not None)]
        self._committed += len(emitted)
        commands: list[Command] = [Emit(tuple(emitted), accepted)] if emitted else []
        self.restarted = not self._blocks and not self._open_rows
        if end and len(emitted) == len(targets):
            return [*commands, self._finish(end)]
        return commands + self._advance()

    def _until_end(self, targets: Sequence[int]) -> tuple[Sequence[int], str | None]:
        """Cut ``targets`` after the first that would end the request; say how it would end."""
        for i, token in enumerate(targets, start=1):
            if token in self._stop_ids:
                return targets[:i], "stop"
            if self._committed + i == self._prompt + self._max_tokens:
                return targets[:i], "length"
        return targets, None

    def _check(self, event: Judged) -> None:
        expected = self._blocks[0] if self._blocks else None
        valid = expected == (event.block, len(event.tokens))
        if not valid or (event.tokens and event.first != self._committed):
            raise ProtocolError(
                f"verdict for {len(event.tokens)} tokens at {event.first} of block {event.block} "
                f"does not answer the oldest block in flight {expected}"
            )

    def _replace_drafts(self, position: int, token: int, missed: bool) -> None:
        """Put the target's ``token`` at ``position``; a miss drops all that was built on it."""
        if missed:
            self.counts.resyncs += 1
            self.counts.discarded += len(self._tokens) - position - 1
            self._drop_work()
        self._tokens[position:] = [token]
        self._fed = self._corrected = position

    def _drop_work(self) -> None:
        self.epoch += 1
        self._blocks.clear()
        self._open_rows = 0

    def _finish(self, reason: str) -> Finish:
        self.finished = True
        self.counts.discarded += len(self._tokens) - self._committed
        del self._tokens[self._committed :]
        self._drop_work()
        return Finish(reason)

    def _advance(self) -> list[Command]:
        """Feed whatever is known and has room."""
        commands: list[Command] = []
        while not self.finished and self._fed < len(self._tokens):
            prefilling = self._fed < self._prompt
            window = self._prefill_in_flight if prefilling else self._active.in_flight
            if not self._open_rows and len(self._blocks) >= window:
                break
            commands.append(self._feed_prompt() if prefilling else self._feed_row())
        return commands

    def _feed_prompt(self) -> Feed:
        """Feed the prompt up to a multiple of the chunk size: equal prompts give equal shapes."""
        position = self._fed
        end = min(self._prompt, (position // self._chunk + 1) * self._chunk)
        last = end == self._prompt
        self._fed = end
        self._blocks.append((position, int(last)))
        return Feed(
            epoch=self.epoch,
            position=position,
            tokens=tuple(self._tokens[position:end]),
            block=position,
            judge=int(last),
            ship=True,
            draft=last and self._active.in_flight > 1 and self._feedable(end),
            verified=UNVERIFIED,
        )

    def _feed_row(self) -> Feed:
        position = self._fed
        self._fed += 1
        self.counts.rows += 1
        self._open_rows += 1
        rows, block = self._open_rows, position - self._open_rows + 1
        followed = self._feedable(position + 1)
        ship = rows >= self._active.block or not followed  # a pause may find more rows than one
        if ship:
            self._blocks.append((block, rows))
            self._open_rows = 0
        return Feed(
            epoch=self.epoch,
            position=position,
            tokens=(self._tokens[position],),
            block=block,
            judge=rows,
            ship=ship,
            draft=followed and (not ship or self._active.in_flight > 1),
            verified=self._verified(block),
        )

    def _verified(self, block: int) -> int:
        """Return the newest position with a verdict when the block that begins at ``block`` is fed.

        Of the blocks before it, all but w - 1 have been answered, and so has all that led to the
        newest token of the target's own.
        """
        window = self._active.block * (self._active.in_flight - 1)
        newest = max(self._corrected, block - window) - 1
        return newest if newest >= self._prompt - 1 else UNVERIFIED

    def _feedable(self, position: int) -> bool:
        """Return True if a token at ``position`` would ask for one that may still be emitted."""
        return position < self._prompt + self._max_tokens - 1
