"""All that rank 0 knows of one request at work, in one object."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ppsd.engine.drafter import DraftState
from ppsd.model.draft_vocabulary import prompt_ids
from ppsd.speculation.gate import Switches
from ppsd.speculation.masks import Mask, Masks
from ppsd.speculation.policy import Command, Policy
from ppsd.speculation.sampling import Sampler
from ppsd.speculation.waves import WavePolicy
from ppsd.types import SamplingParams
from ppsd.worker.messages import Begin
from ppsd.worker.scores import UNSCORED, Scores
from ppsd.worker.slot import TokenHistory

LogitsSink = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Request:
    """One request in token ids.

    ``reuse`` takes over all rows of the prompt that its slot holds, not only those that computing
    them again would repeat bit for bit. ``logits``, when given, receives (position, target logits
    [V]) of every judged row; a position may come again, and the last call for it counts. ``scores``
    receives those of the prompt's tokens, with ``top`` likeliest tokens each. ``masks`` tells what
    may follow the answer so far.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    vocab_size: int
    reuse: bool = False
    logits: LogitsSink | None = None
    scores: Callable[[Scores], None] | None = None
    top: int = 0
    masks: Masks | None = None


@dataclass(eq=False)
class Sequence:
    """A request and its state on rank 0; ``slot`` is where the stages hold theirs.

    ``cached``: rows of the prompt taken over from the request before. ``finish_reason`` is empty
    until the sequence is over; ``error`` is why it could not go on, when it could not.
    ``switches`` says when a gate, if there is one, paused speculation.
    """

    request: Request
    slot: int
    cached: int
    policy: Policy | WavePolicy
    history: TokenHistory  # the slot's: it outlives the sequence, as the rows in the caches do
    sampler: Sampler
    draft: DraftState  # the slot's too
    commands: deque[Command] = field(default_factory=deque)
    open_rows: list[torch.Tensor] = field(default_factory=list)  # of the block not yet complete
    feedback: dict[int, torch.Tensor] = field(default_factory=dict)  # the last layer's rows
    newest: torch.Tensor | None = None  # of them, [1, C]
    finish_reason: str = ""
    error: Exception | None = None
    switches: Switches | None = None

    @property
    def chain(self) -> Policy:
        """Return the policy of a request that is decoded as a chain."""
        assert isinstance(self.policy, Policy)
        return self.policy

    @property
    def waves(self) -> WavePolicy:
        """Return the policy of a request that is decoded in waves."""
        assert isinstance(self.policy, WavePolicy)
        return self.policy

    def masks(self, first: int, end: int) -> tuple[Mask, ...]:
        """Return the masks of what follows the tokens fed at ``first`` to below ``end``, if any."""
        masks, start = self.request.masks, len(self.request.prompt)
        if masks is None:
            return ()
        ids = self.history.ids(start, end)
        return tuple(masks(ids[: position + 1 - start]) for position in range(first, end))

    @property
    def length(self) -> int:
        """Count the rows every stage holds in their places, of committed tokens but the last."""
        if isinstance(self.policy, WavePolicy):
            return self.policy.held
        emitted = self.policy.emitted
        return len(self.request.prompt) + emitted - 1 if emitted else self.cached


class HeldRows:
    """What the stages hold in one slot between two requests.

    ``tokens`` are those whose rows every stage holds. Of these, the first ``whole`` were computed
    in whole prompt chunks, so computing them again would give the same bits.
    """

    def __init__(self, slot: int, max_context: int, chunk: int) -> None:
        self.history = TokenHistory(max_context)
        self.draft = DraftState(slot)
        self.tokens: tuple[int, ...] = ()
        self._whole = 0
        self._chunk = chunk

    def overlap(self, request: Request) -> int:
        """Return how many rows of a request's prompt are here and need not be computed."""
        if request.scores is not None:  # rows that are not computed have no logits
            return 0
        cached = min(_common_prefix(self.tokens, request.prompt), len(request.prompt) - 1)
        if not request.reuse:
            cached = min(cached, self._whole) // self._chunk * self._chunk
        return cached

    def take(self, request: Request, cached: int, *, own: bool) -> int:
        """Let a request begin with so many rows, its ``own`` slot's or copied; others are void."""
        self.tokens = request.prompt[:cached]
        if own:
            self._whole = min(self._whole, cached) // self._chunk * self._chunk
        else:  # of another slot's rows those are whole that are taken for what they are
            self._whole = 0 if request.reuse else cached
        self.draft.drawn.clear()
        self.history.write(0, self.tokens)
        return cached

    def keep(self, sequence: Sequence) -> None:
        """Note the rows that a sequence leaves behind."""
        length, prompt = sequence.length, sequence.request.prompt
        if length < len(prompt):  # it ended inside its prompt
            return
        if self._whole == sequence.cached:
            self._whole = len(prompt) // self._chunk * self._chunk
        self.tokens = (*prompt, *sequence.policy.tokens(len(prompt), length))


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return how many elements agree; slices are compared in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def collect_logits() -> tuple[LogitsSink, dict[int, torch.Tensor]]:
    """Return a sink and the dictionary it fills: the final target logits by position."""
    rows: dict[int, torch.Tensor] = {}
    return rows.__setitem__, rows


def begin_message(slot: int, request: Request, *, feedback: bool, logits: bool) -> Begin:
    """Return what the last stage has to know of a request; what ends a text is not among it."""
    return Begin(
        slot=slot,
        params=replace(request.params, stop=(), stop_token_ids=()),
        prompt_length=len(request.prompt),
        stop_ids=tuple(sorted(request.stop_ids)),
        vocab_size=request.vocab_size,
        prompt_ids=prompt_ids(request.prompt),
        want_logits=logits or request.logits is not None,
        want_feedback=feedback,
        scores=UNSCORED if request.scores is None else request.top,
    )
