"""Run a command made of verbs; the one place where errors become exit codes.

A verb's module is imported when that verb runs, so the first screens are instant.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from ppsd.cli import streams
from ppsd.errors import PpsdError

EXIT_FAILURE = 1


@dataclass(frozen=True)
class Command:
    """Hold a command's name, its first screens, and the package with a module for each verb.

    A verb's module has a function of the verb's name, or an ``app`` with verbs of its own.
    """

    name: str
    title: str
    begin: str
    sections: Mapping[str, Mapping[str, str]]
    package: str

    @property
    def verbs(self) -> list[str]:
        """Return all verbs, in the order of ``--help``."""
        return [verb for section in self.sections.values() for verb in section]

    def load(self, verb: str) -> TyperCommand | TyperGroup:
        """Import a verb's module and return its command."""
        return _loaded(self.package, verb)

    def help(self) -> str:
        """Return the list of verbs; typer's own would import all of them."""
        usage = f"Usage: {self.name} VERB …; `{self.name} VERB --help` explains one."
        width = 2 + max(map(len, self.verbs))
        lines = [f"{self.name}: {self.title}", usage, ""]
        for section, verbs in self.sections.items():
            lines += [f"{section}:", *(f"  {verb:<{width}}{text}" for verb, text in verbs.items())]
        lines += ["", "Also: --version, and --install-completion of verbs and flags.", ""]
        return "\n".join(lines)

    def app(self) -> typer.Typer:
        """Return the command as typer knows it."""

        def show_version(asked: bool) -> None:
            if asked:
                from importlib.metadata import version

                print(f"{self.name} {version('ppsd-llm')}")
                raise typer.Exit

        app = typer.Typer(
            cls=type("Verbs", (_Verbs,), {"of": self}),
            pretty_exceptions_enable=False,
        )
        shown = typer.Option(False, "--version", help="Show the version.", callback=show_version)

        def root(version=shown):  # type: ignore[no-untyped-def]  # Typer reads what is set below
            pass

        root.__annotations__ = {"version": bool, "return": None}
        app.callback()(root)
        return app

    def run(self, app: typer.Typer) -> int:
        """Run a verb; return 0 for success, 1 failure or mismatch, 2 usage, 130 interrupted."""
        streams.prepare()
        # When a rank leaves, also at a good end, PyTorch prints C++ frames beside what it raises.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        return streams.finish(self._run(app))

    def _run(self, app: typer.Typer) -> int:
        try:
            app(prog_name=self.name)
        except SystemExit as end:  # how typer leaves when all went well, too
            return end.code if isinstance(end.code, int) else 0
        except PpsdError as error:
            _say(f"{self.name}: {error}")
            for note in getattr(error, "__notes__", ()):  # a stage's traceback, a hint
                _say(note)
        except OSError as error:  # such as a full disk
            _say(f"{self.name}: {error}")
        except (MemoryError, RuntimeError) as error:
            if "allocate" not in str(error) and not isinstance(error, MemoryError):
                raise
            told = f" ({str(error).splitlines()[0]})" if str(error) else ""
            _say(f"{self.name}: not enough memory{told}")
        return EXIT_FAILURE


class _Verbs(TyperGroup):
    """Import a verb of one command when it is asked for."""

    of: ClassVar[Command]

    def __init__(self, **settings: Any) -> None:
        commands = {verb: TyperCommand(verb) for verb in self.of.verbs}
        super().__init__(**settings | {"commands": commands})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show how to begin when nothing was asked, before typer imports what reads flags."""
        if not args and not ctx.resilient_parsing:  # as for a shell that completes a verb
            print(self.of.begin, end="")
            ctx.exit()
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the verb, None if there is none of this name."""
        return self.of.load(cmd_name) if cmd_name in self.commands else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of verbs."""
        formatter.write(self.of.help())


@functools.cache
def _loaded(package: str, verb: str) -> TyperCommand | TyperGroup:
    from ppsd.cli.options import grouped

    name = verb.replace("-", "_")
    module = import_module(f"{package}.{name}")
    verbs: typer.Typer = getattr(module, "app", None) or typer.Typer(add_completion=False)
    if not hasattr(module, "app"):
        verbs.command(verb)(grouped(getattr(module, name)))
    # Typer says no more than that it is a click.Command.
    command: TyperCommand | TyperGroup = typer.main.get_command(verbs)  # type: ignore[assignment]
    command.name = verb
    return command


def _say(text: str) -> None:
    """Print an error, which may quote what a stranger wrote, to standard error."""
    print(streams.visible(text), file=sys.stderr)
