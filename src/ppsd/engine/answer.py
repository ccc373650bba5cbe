"""What a request gives back, piece by piece and as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppsd.engine.logprobs import Logprobs, TokenLogprob
from ppsd.engine.stats import RequestStats
from ppsd.engine.text import Piece, Transcript
from ppsd.speculation.policy import Emit


@dataclass(frozen=True)
class Chunk:
    """A step of a streamed completion: tokens now final, and the text they release.

    ``accepted[i]`` says whether token i was an accepted draft. ``pieces`` is the text cut by the
    tokens it comes from, which may be earlier ones: text lags behind the tokens while a character
    or a stop string is incomplete. ``prompt_logprobs`` come with the first step, if they are asked
    for: those of the prompt's tokens but the first, before which there is nothing. ``time``: when
    the engine had the tokens, in seconds of its clock (``LLM.now``), whenever a step is read.
    """

    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...] = ()
    accepted: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    time: float = 0.0

    @property
    def text(self) -> str:
        """Return the released text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Completion:
    """A finished completion; ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    token_ids: tuple[int, ...]
    accepted: tuple[bool, ...]
    finish_reason: str
    stats: RequestStats


@dataclass
class Answer:
    """A completion while it grows; times in seconds of the engine's clock."""

    transcript: Transcript
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    start: float = 0.0
    first: float | None = None
    logprobs: Logprobs | None = None

    def take(self, emit: Emit, now: float) -> Chunk:
        """Add tokens that came ``now``, as far as a complete stop string lets them in."""
        self.first = self.first or now
        pieces: list[Piece] = []
        taken = 0
        for token in emit.tokens:
            pieces += self.transcript.push(token, taken < emit.accepted)
            taken += 1
            if self.transcript.stopped:
                break
        tokens = emit.tokens[:taken]
        chunk = Chunk(
            tuple(pieces),
            tokens,
            tuple(i < emit.accepted for i in range(taken)),
            () if self.logprobs is None else self.logprobs.take(tokens),
            () if self.logprobs is None else self.logprobs.take_prompt(),
            now,
        )
        self.token_ids += chunk.token_ids
        self.accepted += chunk.accepted
        return chunk
