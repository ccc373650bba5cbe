"""Checks of what users pass, each a ConfigError that names field, value and what is allowed.

Imported by all. Numbers of other libraries (NumPy's, PyTorch's) count as what they are, and come
back as Python's own.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from numbers import Real
from typing import Any, SupportsIndex

from ppsd.errors import ConfigError


def integer(name: str, value: object, low: int, high: int, allowed: str = "") -> int:
    """Return an integer in [low, high] as an int; ``allowed`` replaces the words for that range."""
    number = _index(value)
    if number is None or not low <= number <= high:
        raise ConfigError(name, value, allowed or f"an integer in [{low}, {high}]")
    return number


def number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    allowed: str = "",
) -> float:
    """Return a real number in [low, high] as a float, an int as the int it is.

    ``low_open`` leaves ``low`` itself out; ``allowed`` replaces the words for the range.
    """
    real: float | None = _index(value)
    if real is None and isinstance(value, Real) and not isinstance(value, bool):
        real = float(value)
    if real is None or not (low < real if low_open else low <= real) or not real <= high:
        inside = f"a number in {'(' if low_open else '['}{low:g}, {high:g}]"
        raise ConfigError(name, value, allowed or inside)
    return real


def truth(name: str, value: object) -> bool:
    """Return True or False, NumPy's too, as a bool."""
    if value is not True and value is not False and type(value).__name__ != "bool":
        raise ConfigError(name, value, "True or False")
    return bool(value)


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
