"""Masks: which tokens may come next, a bit for each of the vocabulary. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Mask = bytes
Masks = Callable[[Sequence[int]], Mask]  # what may follow an answer so far


def mask_bytes(vocab_size: int) -> int:
    """Return the length of a mask: whole words of 32 bits."""
    return -(-vocab_size // 32) * 4


def permits(mask: Mask, token: int) -> bool:
    """Return True if a token may come next; one beyond the vocabulary may not."""
    return token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)


def lowest(mask: Mask) -> int | None:
    """Return the lowest token that may come next, None if none may."""
    for index, byte in enumerate(mask):
        if byte:
            return 8 * index + (byte & -byte).bit_length() - 1
    return None
