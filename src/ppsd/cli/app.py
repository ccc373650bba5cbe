"""The ``ppsd`` command: verbs, and one place where errors become exit codes.

A verb's module is imported when that verb runs, so the first screens are instant.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ppsd.cli import streams
from ppsd.errors import PpsdError

EXIT_FAILURE = 1
TITLE = "ppsd: exact, low-latency LLM decoding over several devices (arXiv 2509.19368)"
BEGIN = f"""{TITLE}

To begin:
  ppsd generate "Why is the sky blue?"   answer a prompt
  ppsd chat                              talk with the model
  ppsd models                            list the models that can be used here
  ppsd profile                           time this machine, for better plans

`ppsd --help` lists all verbs, `ppsd VERB --help` explains one.
"""
VERBS = {
    "Use a model": {
        "generate": "Complete a prompt and stream the answer.",
        "chat": "Talk with the model; the conversation and its cache are kept.",
    },
    "Look around": {
        "models": "List the models that can be used here.",
        "heads": "List and inspect exit heads.",
        "env": "Print what is in force here, for a bug report.",
    },
    "Make it faster": {
        "profile": "Time this machine once; later plans use the result.",
        "plan": "Find split, exit, mode and window; predict what they bring.",
        "distill": "Train exit heads by self-distillation, or continue a run.",
    },
    "Measure": {
        "verify": "Check that a mode says exactly what plain decoding says.",
        "acceptance": "Measure how often the drafts of exit heads are accepted.",
        "bench": "Time the pipeline against theory and other decoders.",
        "simulate": "Predict decoding for given times, or for a preset.",
        "paper": "Write a report of the paper's settings.",
    },
}
BENCHES = {
    "bench_tasks": {
        "tasks": "bench_tasks",
        "baselines": "bench_baselines",
        "report": "bench_report",
    },
    "bench_endurance": {"endurance": "bench_endurance"},
    "bench_splits": {"splits": "bench_splits"},
}


class Verbs(TyperGroup):
    """The verbs by name; each is imported when it is asked for."""

    def __init__(self, **settings: Any) -> None:
        names = [name for section in VERBS.values() for name in section]
        super().__init__(**settings | {"commands": {name: TyperCommand(name) for name in names}})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show how to begin when nothing was asked, before typer imports what reads flags."""
        if not args:
            print(BEGIN, end="")
            ctx.exit()
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the verb, None if there is none of this name."""
        return load(cmd_name) if cmd_name in self.commands else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of verbs; typer's own would import all of them."""
        lines = [TITLE, "Usage: ppsd VERB …; `ppsd VERB --help` explains one.", ""]
        for section, verbs in VERBS.items():
            lines += [f"{section}:", *(f"  {name:<12}{text}" for name, text in verbs.items())]
        lines += ["", "`ppsd --version` shows the version.", ""]
        formatter.write("\n".join(lines))


@functools.cache
def load(verb: str) -> TyperCommand | TyperGroup:
    """Import a verb's module and return its command."""
    from ppsd.cli.options import grouped

    module = import_module(f"ppsd.cli.{verb}")
    if verb == "bench":
        for file, benches in BENCHES.items():
            for name, function in benches.items():
                more = import_module(f"ppsd.cli.{file}")
                module.app.command(name)(grouped(getattr(more, function)))
    verbs: typer.Typer = getattr(module, "app", None) or typer.Typer(add_completion=False)
    if not hasattr(module, "app"):
        verbs.command(verb)(grouped(getattr(module, verb)))
    command: TyperCommand | TyperGroup = typer.main.get_command(verbs)  # type: ignore[assignment]
    command.name = verb
    return command


app = typer.Typer(cls=Verbs, add_completion=False, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"ppsd {version('ppsd-llm')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version)
    ] = False,
) -> None:
    pass


def main() -> int:
    """Run a verb; return 0 for success, 1 failure or mismatch, 2 usage, 130 interrupted."""
    streams.prepare()
    # When a rank leaves, also at a good end, PyTorch prints C++ frames beside what it raises.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    return streams.finish(_run())


def _run() -> int:
    try:
        app()
    except SystemExit as end:  # how typer leaves when all went well, too
        return end.code if isinstance(end.code, int) else 0
    except PpsdError as error:
        _say(f"ppsd: {error}")
        for note in getattr(error, "__notes__", ()):  # a stage's traceback, a hint
            _say(note)
    except OSError as error:  # such as a full disk
        _say(f"ppsd: {error}")
    return EXIT_FAILURE


def _say(text: str) -> None:
    """Print an error, which may quote what a stranger wrote, to standard error."""
    print(streams.visible(text), file=sys.stderr)
