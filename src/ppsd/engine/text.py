"""From committed tokens to text: incremental decoding and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Decoder(Protocol):
    """What turns token ids into text piece by piece (model.tokenizer.StreamDecoder)."""

    def push(self, token_ids: list[int]) -> str:
        """Return the text that these tokens complete."""

    def finish(self) -> str:
        """Return what is left."""


class Piece(NamedTuple):
    """Text that one token completed, and whether that token was an accepted draft."""

    text: str
    accepted: bool


class Transcript:
    """The text of one completion, released only once no stop string can still claim it.

    Text of the first ``min_tokens - 1`` tokens is never part of a stop string.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str], min_tokens: int = 0) -> None:
        self.text = ""
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._before_stop = min_tokens  # tokens to come until stop strings count
        self._held: list[Piece] = []
        self._accepted = False  # of the newest token

    def push(self, token: int, accepted: bool) -> list[Piece]:
        """Add one token; return newly released text. ``stopped`` says a stop string came up."""
        self._before_stop -= 1
        self._accepted = accepted
        return self._release(self._decoder.push([token]), final=False)

    def finish(self) -> list[Piece]:
        """End the text; return what was held back."""
        return [] if self.stopped else self._release(self._decoder.finish(), final=True)

    def _release(self, text: str, *, final: bool) -> list[Piece]:
        if not self._stop:  # nothing is ever held; little code, as it runs between two passes
            self.text += text
            return [Piece(text, self._accepted)] if text else []
        self._held.append(Piece(text, self._accepted))
        text = "".join(piece.text for piece in self._held)
        stop = self._stop if self._before_stop <= 0 else ()
        found = [at for end in stop if (at := text.find(end)) >= 0]
        self.stopped = bool(found)
        keep = 0 if final else _undecided(text, stop)
        cut = min(found, default=len(text) - keep)
        released, held = _split(self._held, cut)
        self._held = [] if found else held
        self.text += text[:cut]
        return released


def _undecided(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that may still grow into a stop string."""
    longest = max((len(end) - 1 for end in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(end.startswith(text[-length:]) for end in stop):
            return length
    return 0


def _split(pieces: Sequence[Piece], length: int) -> tuple[list[Piece], list[Piece]]:
    """Cut after ``length`` characters; pieces without text are left out."""
    before, after = [], []
    for text, accepted in pieces:
        first, second = text[:length], text[length:]
        length -= len(first)
        if first:
            before.append(Piece(first, accepted))
        if second:
            after.append(Piece(second, accepted))
    return before, after
