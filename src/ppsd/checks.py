"""Checks of what users pass and files hold: a ConfigError names field, value and what is allowed.

For a file, ``inside`` makes it an error of that file. Imported by all. Numbers of other libraries
(NumPy's, PyTorch's) count as what they are, and come back as Python's own.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

from ppsd.errors import ConfigError, PpsdError


@contextmanager
def inside(where: str, kind: type[PpsdError]) -> Iterator[None]:
    """Turn a ConfigError into an error of this ``kind``, whose text begins with the place."""
    try:
        yield
    except ConfigError as error:
        raise kind(f"{where}: {error}") from error


def integer(name: str, value: object, low: int, high: float = inf, allowed: str = "") -> int:
    """Return an integer in [low, high] as an int; ``allowed`` replaces the words for that range."""
    number = _index(value)
    if number is None or not low <= number <= high:
        reach = f"of at least {low}" if high == inf else f"in [{low}, {high}]"
        raise ConfigError(name, value, allowed or f"an integer {reach}")
    return number


def number(
    name: str,
    value: object,
    low: float,
    high: float = inf,
    *,
    low_open: bool = False,
    allowed: str = "",
) -> float:
    """Return a finite number in [low, high] as a float, an int as the int it is.

    ``low_open`` leaves ``low`` itself out; ``allowed`` replaces the words for the range.
    """
    real: float | None = _index(value)
    if real is None and isinstance(value, Real) and not isinstance(value, bool):
        real = float(value)
    above = real is not None and (low < real if low_open else low <= real)
    if real is None or not above or not real <= high or real == inf:
        reach = f"in {'(' if low_open else '['}{low:g}, {high:g}]"
        if high == inf:
            reach = f"above {low:g}" if low_open else f"of at least {low:g}"
        raise ConfigError(name, value, allowed or f"a number {reach}")
    return real


def truth(name: str, value: object) -> bool:
    """Return True or False, NumPy's too, as a bool."""
    if value is not True and value is not False and type(value).__name__ != "bool":
        raise ConfigError(name, value, "True or False")
    return bool(value)


def string(name: str, value: object) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise ConfigError(name, value, "a text")
    return value


def one_of(name: str, value: str, choices: Collection[str]) -> str:
    """Return one of several texts."""
    if value not in choices:
        raise ConfigError(name, value, "one of " + ", ".join(choices))
    return value


def items(name: str, value: object, allowed: str) -> tuple[Any, ...]:
    """Return what a list or the like holds, nothing for None; text and bytes are no lists."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Iterable):
        raise ConfigError(name, value, allowed)
    try:
        return tuple(value)
    except TypeError:  # an array of NumPy or PyTorch that holds a single number
        raise ConfigError(name, value, allowed) from None


def text(name: str, value: object) -> str:
    """Return a text, or a path as its text."""
    try:
        path = os.fspath(value)  # type: ignore[call-overload]  # what is no path raises
    except TypeError:
        raise ConfigError(name, value, "a text or a path") from None
    if not isinstance(path, str):
        raise ConfigError(name, value, "a text or a path")
    return path


def unicode(name: str, text: str) -> str:
    """Return text that UTF-8 can encode.

    Half of a surrogate pair is no character. It comes from broken JSON, and from command lines and
    files that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = (
            text if len(text) <= 40 else f"{text[max(0, error.start - 20) : error.start + 20]}…"
        )
        raise ConfigError(name, around, "valid Unicode, without lone surrogates") from error
    return text


def _index(value: object) -> int | None:
    if type(value) is int:  # almost always, and asking for a protocol takes microseconds
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # NumPy's booleans, and arrays of more than one number
        return None


def has_lines_of_json(path: Path) -> bool:
    """Tell if a file of prompts or texts has a JSON object a line, or is plain text, by its name.

    Raises PpsdError for JSON as a whole, which would be taken for text.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise PpsdError(f"{path} is one JSON value; give a .jsonl file with an object a line")
    return suffix == ".jsonl"
