"""What running the command gives, for tests of the verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
