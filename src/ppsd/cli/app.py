"""The ``ppsd`` command: verbs, and one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ppsd.cli import (
    acceptance,
    bench,
    bench_endurance,
    bench_splits,
    bench_tasks,
    chat,
    distill,
    generate,
    heads,
    paper,
    plan,
    profile,
    simulate,
    streams,
    verify,
)
from ppsd.cli.options import grouped
from ppsd.errors import PpsdError, StageFailedError

EXIT_FAILURE = 1

app = typer.Typer(
    help="Exact, low-latency LLM decoding over several devices (PPSD, arXiv 2509.19368).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


app.command("generate")(grouped(generate.generate))
app.command("chat")(grouped(chat.chat))
app.command("verify")(grouped(verify.verify))
app.command("distill")(grouped(distill.distill))
app.add_typer(heads.app, name="heads")
app.command("acceptance")(grouped(acceptance.acceptance))
bench.app.command("tasks")(grouped(bench_tasks.bench_tasks))
bench.app.command("baselines")(grouped(bench_tasks.bench_baselines))
bench.app.command("endurance")(grouped(bench_endurance.bench_endurance))
bench.app.command("splits")(grouped(bench_splits.bench_splits))
bench.app.command("report")(grouped(bench_tasks.bench_report))
app.add_typer(bench.app, name="bench")
app.command("profile")(grouped(profile.profile))
app.command("plan")(grouped(plan.plan))
app.command("simulate")(grouped(simulate.simulate))
app.command("paper")(grouped(paper.paper))


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
        if isinstance(error, StageFailedError) and error.remote_traceback:
            _say(error.remote_traceback)
    except OSError as error:  # such as a full disk
        _say(f"ppsd: {error}")
    return EXIT_FAILURE


def _say(text: str) -> None:
    """Print an error, which may quote what a stranger wrote, to standard error."""
    print(streams.visible(text), file=sys.stderr)
