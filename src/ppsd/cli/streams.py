"""The command's standard streams, whatever they are connected to."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import TypeVar

from ppsd.errors import PpsdError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
CLOSED_NOTICE = "ppsd: standard output is closed, so what is printed goes nowhere"


class _Output(TextIOWrapper):
    """Standard output: an error says what failed, and no encoding ends an answer."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _unwritable(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _unwritable(error) from error


class _Notices(TextIOWrapper):
    """Standard error: a notice that cannot be written is lost, not the answer beside it."""

    def write(self, text: str) -> int:
        with suppress(OSError):  # a full disk, or nobody reads
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):  # as above
            super().flush()


def _unwritable(error: OSError) -> Exception:
    """Name the stream; a reader that has left is not worth a word, and typer leaves quietly."""
    if isinstance(error, BrokenPipeError):
        return error
    return PpsdError(f"standard output cannot be written: {error.strerror}")


Stream = TypeVar("Stream", bound=TextIOWrapper)


def _rewrapped(stream: object, kind: type[Stream], errors: str) -> Stream | None:
    """Return ``kind`` of the same file; None for what is no file, such as a test's capture."""
    if type(stream) is not TextIOWrapper:
        return None
    encoding, lines = stream.encoding, stream.line_buffering
    through = stream.write_through
    return kind(stream.detach(), encoding, errors, None, lines, through)


def prepare() -> None:
    """Make the standard streams fit for use, also those that were closed before the start.

    The next file that anyone opens takes the number of a closed descriptor. If that is the segment
    that stages share, a worker's own standard files replace it.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:  # the lowest free descriptor is the one that was closed
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)
    stdin = sys.stdin
    if type(stdin) is TextIOWrapper and stdin.encoding.lower() == "utf-8" and not stdin.isatty():
        stdin.reconfigure(encoding="utf-8-sig", errors=stdin.errors)  # some mark a text's beginning
    sys.stdout = _rewrapped(sys.stdout, _Output, "replace") or sys.stdout
    sys.stderr = _rewrapped(sys.stderr, _Notices, "backslashreplace") or sys.stderr
    if "stdout" in closed:
        print(CLOSED_NOTICE, file=sys.stderr)


def finish(code: int) -> int:
    """Write what is left of standard output; return the exit code, 1 if that fails."""
    try:
        sys.stdout.flush()
    except (PpsdError, BrokenPipeError) as error:
        if isinstance(error, PpsdError) and not code:  # else something has been said
            print(f"ppsd: {error}", file=sys.stderr)
        with open(os.devnull, "w") as nowhere:  # the interpreter flushes once more when it ends
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return code or 1
    return code


def visible(text: str) -> str:
    """Spell out control characters, which could move the cursor or set the title of a terminal."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
