"""The signals that end the server, none of them with an error."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let a function take the signals that end the server."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # the terminal is closed; not on Windows
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:  # by nohup
        numbers.append(hang_up)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def leaving() -> Iterator[None]:
    """Let a signal end the process with exit code 0, as while nothing is served yet.

    Extensions that call back into Python may turn SystemExit into an error of their own, so that
    the signal is noted apart from the exception.
    """
    came = False

    def leave(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise SystemExit(0)

    with handled(leave):
        try:
            yield
        except Exception:  # perhaps what an extension made of SystemExit
            if not came:
                raise
            raise SystemExit(0) from None
