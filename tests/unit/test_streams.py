"""Standard streams that cannot print, or must not print, what they are given."""

from __future__ import annotations

import sys
from io import BytesIO, RawIOBase, TextIOWrapper
from pathlib import Path

import pytest

from ppsd.cli import streams
from ppsd.cli.display import painter
from ppsd.engine.text import Piece
from ppsd.errors import PpsdError

BELL = "\x1b]0;owned\x07\x9b31m\rtab\tnew\nbye\x7f"


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, "ascii", "strict"))
    streams.prepare()
    print("naïve 😀")
    assert streams.finish(0) == 0
    assert written.getvalue() == b"na?ve ?\n"


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8"])
def test_a_mark_at_the_beginning_of_standard_input_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    read = TextIOWrapper(BytesIO("\ufeffhi\n\ufeffho\n".encode()), encoding)
    monkeypatch.setattr(sys, "stdin", read)
    streams.prepare()
    assert sys.stdin.read() == "hi\n\ufeffho\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"\xff"), encoding))
    streams.prepare()
    with pytest.raises(UnicodeDecodeError):
        sys.stdin.read()


class Full(RawIOBase):
    """A disk with no room, or a pipe whose reader has left."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise self.error


def full(error: OSError, unbuffered: bool) -> TextIOWrapper:
    return TextIOWrapper(Full(error), "utf-8", write_through=unbuffered)  # type: ignore[arg-type]  # raw in all but name


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unbuffered: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", full(OSError(28, "No space left on device"), unbuffered))
    streams.prepare()
    with pytest.raises(PpsdError, match=r"^standard output cannot be written: No space left on d"):
        print("answer", flush=True)
    assert capsys.readouterr().err == ""


def test_a_reader_that_left_and_a_full_standard_error_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", full(BrokenPipeError(32, "Broken pipe"), True))
    monkeypatch.setattr(sys, "stderr", full(OSError(28, "No space left on device"), True))
    streams.prepare()
    print("notice", file=sys.stderr, flush=True)
    with pytest.raises(BrokenPipeError):
        print("answer", flush=True)


def test_control_characters_are_shown_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    piece = Piece(BELL, accepted=True)
    assert painter(highlight=False)(piece) == BELL, "a file or pipe gets the text as it is"
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes a terminal of any stream
    shown = r"\x1b]0;owned\x07\x9b31m\rtab" + "\tnew\nbye" + r"\x7f"
    assert painter(highlight=False)(piece) == shown
    assert painter(highlight=True)(piece) == f"\x1b[32m{shown}\x1b[0m"
