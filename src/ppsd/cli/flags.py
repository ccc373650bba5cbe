"""A flag of the command line, and how flags of several values are read."""

from __future__ import annotations

from typing import Any

import typer

from ppsd.errors import ConfigError


def flag(help_text: str, *names: str, panel: str, **limits: Any) -> Any:
    """Return a command-line option shown in the given panel of --help."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **limits)


def integers(name: str, text: str) -> tuple[int, ...]:
    """Read ``4,8,15``; raises ConfigError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(name, text, "integers separated by commas") from None


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Read ``0.06,0.08``; raises ConfigError naming the option."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(name, text, "numbers separated by commas") from None


def pairs(name: str, text: str, what: str) -> dict[int, float]:
    """Read ``8:0.5,15:0.6``; raises ConfigError naming the option, and ``what`` a pair is."""
    try:
        parts = [part.split(":") for part in text.split(",") if part]
        read = [(int(key), float(value)) for key, value in parts]
    except ValueError:
        raise ConfigError(name, text, f"{what} pairs separated by commas") from None
    found = dict(read)
    if len(found) < len(read):
        raise ConfigError(name, text, f"{what} pairs with each {what.split(':')[0]} once")
    return found
