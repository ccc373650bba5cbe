"""The flag ``--memory`` of benchmarks on several cores of one machine."""

from __future__ import annotations

from typing import Annotated

from ppsd.cli.flags import flag
from ppsd.errors import ConfigError

Memory = Annotated[
    str,
    flag(
        "Count requests whose stages, on cores of one machine, had a way to memory of their own, a "
        "shared one, or any.",
        panel="Benchmark",
        metavar="KIND",
    ),
]


def check_memory(memory: str) -> None:
    """Refuse a kind of memory that there is not."""
    from ppsd.lab.memory import MEMORIES

    if memory not in MEMORIES:
        raise ConfigError("memory", memory, "one of " + ", ".join(MEMORIES))
