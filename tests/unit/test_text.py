"""Transcript against the naive definition: decode everything so far, look for stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from ppsd.engine.text import Piece, Transcript

TABLE = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aab",
    "é".encode(),
    "é".encode()[:1],
    "é".encode()[1:],
    b"\xff",
]
EURO = "€".encode()
TABLE += [EURO, EURO[:1], EURO[1:2], EURO[2:], b"a" + EURO[:2], EURO[2:] + b"b", b""]


class Utf8Decoder:
    """Tokens are pieces of UTF-8; incomplete characters wait, broken ones become U+FFFD."""

    def __init__(self) -> None:
        self._inner = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: list[int]) -> str:
        return self._inner.decode(b"".join(TABLE[token] for token in token_ids))

    def finish(self) -> str:
        return self._inner.decode(b"", final=True)


def naive_text(tokens: Sequence[int], *, final: bool = False) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(TABLE[token] for token in tokens), final)


def naive_stop(tokens: Sequence[int], stop: Sequence[str], min_tokens: int) -> tuple[int, int]:
    """How many tokens are taken and how many characters stay; all of them without a stop string."""
    start = len(naive_text(tokens[: max(0, min_tokens - 1)]))
    for taken in range(max(1, min_tokens), len(tokens) + 1):
        places = [naive_text(tokens[:taken]).find(end, start) for end in stop]
        if found := [at for at in places if at >= 0]:
            return taken, min(found)
    text = naive_text(tokens, final=True)
    places = [text.find(end, start) for end in stop] if len(tokens) >= min_tokens else []
    return len(tokens), min((at for at in places if at >= 0), default=len(text))


token_lists = st.lists(st.integers(0, len(TABLE) - 1), max_size=12)
stop_lists = st.lists(st.text("abé€\ufffd", min_size=1, max_size=5), max_size=3)


@given(token_lists, stop_lists, st.integers(0, 6), st.lists(st.booleans(), min_size=12))
@example([0, 0, 0, 1], ["aab"], 0, [False] * 12)  # the stop string begins inside a false start
@example([0, 1, 0], ["abab"], 0, [True, False] * 6)  # held to the very end, then released
@example([10, 11], ["\ufffd"], 0, [True] * 12)  # only the broken rest completes the stop string
def test_any_tokens_give_the_text_before_the_first_stop_string(
    tokens, stop, min_tokens, flags
) -> None:
    transcript = Transcript(Utf8Decoder(), stop, min_tokens)
    taken, kept = naive_stop(tokens, stop, min_tokens)
    pieces: list[Piece] = []
    used = 0
    for token, flag in zip(tokens, flags, strict=False):
        pieces += transcript.push(token, flag)
        used += 1
        if transcript.stopped:
            break
        released = sum(len(piece.text) for piece in pieces)
        assert released == settled_length(tokens[:used], stop, min_tokens)
    pieces += transcript.finish()
    text = naive_text(tokens[:taken], final=True)[:kept]
    assert used == taken
    assert (transcript.text, "".join(piece.text for piece in pieces)) == (text, text)
    owners = [piece.accepted for piece in pieces for _ in piece.text]
    assert owners == [flags[owner] for owner in owner_of_characters(tokens[:taken])][:kept]
    assert all(piece.text for piece in pieces)


def settled_length(tokens: Sequence[int], stop: Sequence[str], min_tokens: int) -> int:
    """How much may be shown without ever having to take it back, and without waiting longer."""
    text = naive_text(tokens)
    if len(tokens) < min_tokens:
        return len(text)
    start = len(naive_text(tokens[: max(0, min_tokens - 1)]))
    undecided = [at for at in range(start, len(text)) if any(s.startswith(text[at:]) for s in stop)]
    return min(undecided, default=len(text))


def owner_of_characters(tokens: Sequence[int]) -> list[int]:
    """For every character the index of the token that completed it."""
    owners: list[int] = []
    for i in range(len(tokens)):
        owners += [i] * (len(naive_text(tokens[: i + 1])) - len(owners))
    rest = len(naive_text(tokens, final=True)) - len(owners)
    return owners + [len(tokens) - 1] * rest


def test_text_after_a_stop_string_is_never_released() -> None:
    transcript = Transcript(Utf8Decoder(), ["b"])
    assert transcript.push(14 - 1, True) == [Piece("a", True)]
    assert transcript.push(14, False) == [Piece("€", False)]
    assert transcript.stopped
    assert transcript.finish() == []
