"""What running the command gives, for tests of the verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import click.testing
from typer import Typer
from typer.testing import CliRunner

from ppsd.cli.app import app as product
from ppsd.lab.cli.app import app as laboratory


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def invoke(app: Typer, *arguments: object) -> click.testing.Result:
    """Run a command as a function: what it raises is the result's ``exception``."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ppsd(*arguments: object) -> click.testing.Result:
    return invoke(product, *arguments)


def lab(*arguments: object) -> click.testing.Result:
    return invoke(laboratory, *arguments)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
