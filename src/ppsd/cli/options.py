"""Give a verb the fields of its option groups and records of settings as flags.

Nothing here imports PyTorch: ``ppsd --help`` must be instant.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, get_type_hints

import typer

from ppsd.cli.settings import (
    CONFIG_FILE,
    EXPERTS,
    GIVEN,
    Group,
    Origins,
    check_environment,
    file_parameter,
    read_file,
)

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
CONTEXT = "context_of_click"
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take option dataclasses and records of settings; their fields become its flags."""
    hints = get_type_hints(verb, include_extras=True)
    records = {name: Group(hint) for name, hint in hints.items() if Group.suits(hint)}
    options: dict[str, Any] = {
        name: hint
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint) and name not in records
    }
    parameters = [inspect.Parameter(CONTEXT, KEYWORD, annotation=typer.Context)]
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in records:
            parameters += records[name].parameters
        elif name in options:
            parameters += _expand(options[name])
        elif hints[name] != Origins:
            parameters.append(parameter.replace(kind=KEYWORD, annotation=hints[name]))
    ambient = any(record.ambient for record in records.values())
    from_environment = any(_about(p, "envvar") for p in parameters)
    if ambient:
        parameters.append(file_parameter())
    parameters.sort(key=lambda p: _about(p, "rich_help_panel") == EXPERTS)  # which stand last

    @functools.wraps(verb)
    def wrapper(**flags: Any) -> None:
        ctx = flags.pop(CONTEXT)
        with _interruptible():
            if ambient or from_environment:
                check_environment()
            file = read_file(flags.pop(CONFIG_FILE, None))
            arguments = {name: each.take(ctx, flags, file) for name, each in records.items()}
            for name, group in options.items():
                fields = {f.name: flags.pop(f.name) for f in dataclasses.fields(group)}
                arguments[name] = group(**fields)
            arguments |= {name: ctx.meta[GIVEN] for name, hint in hints.items() if hint == Origins}
            verb(**flags, **arguments)

    signature = inspect.Signature(parameters)
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # typeshed lacks it
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the verb with 130 and no words.

    Extensions that call back into Python may turn KeyboardInterrupt into an error of their own
    (safetensors: ValueError), so that the signal is noted apart from the exception.
    """
    pressed = False

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        print(file=sys.stderr)  # what comes next starts below the ^C
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _about(parameter: inspect.Parameter, name: str) -> Any:
    """Return what typer is told of a flag: its panel of ``--help``, or its variable."""
    about = getattr(parameter.annotation, "__metadata__", ())
    return next((getattr(each, name) for each in about if hasattr(each, name)), None)


def _expand(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, KEYWORD, default=_default(f), annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a flag; one without a default must be given."""
    missing = field.default is dataclasses.MISSING
    return inspect.Parameter.empty if missing else field.default
