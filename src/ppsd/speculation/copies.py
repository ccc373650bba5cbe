"""Prompt lookup for many rows a wave: an index of a growing text, in place of a search each time.

Pure, for the candidate tree (tree.py). ``lookup.find`` is the same for one row, by search.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from ppsd.speculation.lookup import LENGTHS, LONGEST

SLOTS = [bisect_right(LENGTHS, length) - 1 for length in range(LONGEST + 1)]
TRIED = 32  # places, the newest, at which an end is looked for


class Copy(NamedTuple):
    """The ``token`` at ``place``, which came next where the last ``length`` tokens stood before."""

    place: int
    token: int
    length: int

    @property
    def slot(self) -> int:
        """Return the index of the length in lookup.LENGTHS."""
        return SLOTS[self.length]


class CopyIndex:
    """The verified tokens of a sequence, and where each pair of them stands."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._pairs: dict[tuple[int, ...], list[int]] = {}  # places after the pair
        self._singles: dict[int, int] = {}  # the newest place after a token
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next verified token."""
        tokens = self._tokens
        place = len(tokens)
        tokens.append(token)
        if place:
            self._singles[tokens[place - 1]] = place
        if place > 1:
            self._pairs.setdefault((tokens[place - 2], tokens[place - 1]), []).append(place)

    def following(self, copy: Copy) -> Copy | None:
        """Return the copy that goes on where ``copy`` was right; None at the end of the text."""
        place = copy.place + 1
        if place >= len(self._tokens):
            return None
        return Copy(place, self._tokens[place], min(copy.length + 1, LONGEST))

    def find(self, branch: Sequence[int]) -> Copy | None:
        """Return the longest repetition of the text's end and ``branch`` behind it.

        Of equals the newest counts. Repetitions are looked for in the text alone.
        """
        tokens = self._tokens
        end = (*tokens[-2:], *branch[-2:])[-2:]
        places = self._pairs.get(end)
        if places is not None:
            tail = [*tokens[-LONGEST:], *branch][-LONGEST:]
            best, length = places[-1], 2
            for place in places[: -TRIED - 1 : -1]:
                longer = length < min(len(tail), place)
                if longer and tokens[place - 1 - length] == tail[-1 - length]:
                    agreed = self._agreed(tail, place)
                    if agreed > length:
                        best, length = place, agreed
            return Copy(best, tokens[best], length)
        single = self._singles.get(end[-1]) if end else None
        return None if single is None else Copy(single, tokens[single], 1)

    def _agreed(self, tail: Sequence[int], place: int) -> int:
        """Return how many tokens before ``place`` are the last of ``tail``; two are known to be."""
        tokens, length = self._tokens, 2
        most = min(len(tail), place)
        while length < most and tokens[place - 1 - length] == tail[-1 - length]:
            length += 1
        return length
