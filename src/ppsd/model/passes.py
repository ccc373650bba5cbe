"""Passes of rows through decoder layers, which their caller can pause, go on with, or drop."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ppsd.model.kernels import POINTER


class Watch:
    """Hold addresses of 64-bit ``words`` that others write to, and what they last were.

    A pass stops early when one of them has changed since ``look``. With no words, nothing tells a
    pass that it may have become pointless, so it stops after every layer for its caller to ask.
    """

    def __init__(self, words: Sequence[int] = ()) -> None:
        self._sources = [ctypes.c_int64.from_address(word) for word in words]
        self._words = (POINTER * len(words))(*words)
        self._seen = (ctypes.c_int64 * len(words))()
        # where kernels.c finds both
        self.places = ctypes.addressof(self._words), ctypes.addressof(self._seen), len(words)

    @property
    def blind(self) -> bool:
        """Return True if there are no words to watch."""
        return not self._sources

    def look(self) -> None:
        """Note what the words are. Call it before reading what they announce."""
        for i, source in enumerate(self._sources):
            self._seen[i] = source.value

    def changed(self) -> bool:
        """Return True if a word is no longer what it was at the last ``look``."""
        return any(
            source.value != seen for source, seen in zip(self._sources, self._seen, strict=True)
        )


EACH_LAYER = Watch()  # stops a pass after every layer


class Place(NamedTuple):
    """Say where a row of a candidate tree stands, and what it sees.

    Its keys and values go to ``cell`` of ``slot``. It sees the cells below
    ``position - len(path)``, which hold verified rows in order of position, then the cells
    ``path`` of its other ancestors in order of position, then itself.
    """

    slot: int
    position: int
    cell: int
    path: tuple[int, ...] = ()


class Piece(NamedTuple):
    """A piece of a prompt: token ids [n] or hidden rows [n, C] at ``position``… of ``slot``."""

    inputs: torch.Tensor
    position: int
    slot: int


class Pass(Protocol):
    """Rows on their way through the layers of a stage or head.

    Dropped, it leaves its rows of the cache void. One pass at a time may write to a slot.
    """

    @property
    def hidden(self) -> torch.Tensor:
        """Return the rows [n, C] after the last layer, once ``advance`` has returned True."""

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on, by a layer at least; return True at the end of the last layer.

        Returns False before it if ``watch`` stops the pass; None runs to the end.
        """
