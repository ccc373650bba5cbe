"""From committed tokens to text: incremental decoding and stop strings. Used by llm.py."""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    """What turns token ids into text piece by piece (model.tokenizer.StreamDecoder)."""

    def push(self, token_ids: list[int]) -> str:
        """Return the text that these tokens complete."""

    def finish(self) -> str:
        """Return what is left."""


class Transcript:
    """The text of one completion, released only once no stop string can still claim it."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self.text = ""
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """Add one token; return newly released text. ``stopped`` says a stop string came up."""
        return self._release(self._decoder.push([token]), final=False)

    def finish(self) -> str:
        """End the text; return what was held back."""
        return "" if self.stopped else self._release(self._decoder.finish(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        keep = 0 if final else self._undecided(text)
        cut = min(found) if found else len(text) - keep
        self._held = "" if found else text[cut:]
        self.text += text[:cut]
        return text[:cut]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that may still grow into a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
