"""Describe settings: a field holds its default, its help and its flag in one place.

The command line makes flags of such fields, and reads them from the environment and a file.
Imported by all; imports nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any

TEMPLATE_HELP = (
    "Chat template in place of the model's: a file, Jinja text, or the name of one that it has."
)


def setting(
    help_text: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    short: str | None = None,
    flag: str | None = None,
    panel: str | None = None,
    metavar: str | None = None,
    expert: bool = False,
    repeated: bool = False,
    open_default: bool = False,
) -> Any:
    """Return a dataclass field that is also a flag.

    ``short`` is a name of one letter, ``flag`` a name other than the field's, and ``panel`` where
    ``--help`` shows it. ``expert`` flags stand in a panel of their own. A
    ``repeated`` flag takes one value each time, others several with commas. With ``open_default``
    the default is shown nowhere, as the model or the verb may have another.
    """
    about = {
        "help": help_text,
        "short": short,
        "flag": flag,
        "panel": panel,
        "metavar": metavar,
        "expert": expert,
        "repeated": repeated,
        "open_default": open_default,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=about)
    return field(default=default, metadata=about)
