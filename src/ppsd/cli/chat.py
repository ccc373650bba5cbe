"""``ppsd chat``: a conversation that keeps its key/value cache from turn to turn."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ppsd.cli.generate import stream_text, summarize
from ppsd.cli.options import PipelineOptions, SamplingOptions
from ppsd.cli.session import open_llm
from ppsd.errors import ConfigError

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it."


def chat(
    pipeline: PipelineOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    highlight: Annotated[
        bool, typer.Option("--highlight", help="Colour accepted drafts and corrected tokens.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Summary after every answer.")] = False,
) -> None:
    """Talk with the model; the conversation and its cache are kept."""
    params = sampling.params()
    console = Console(highlight=False)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    with open_llm(pipeline) as llm:
        console.print(HELP, style="dim")
        while (line := _ask(console)) is not None:
            if line == "/reset":
                messages = list(start)
                continue
            turn = [*messages, {"role": "user", "content": line}]
            try:
                answer = stream_text(llm, turn, params, highlight=highlight, reuse=True)
            except ConfigError as error:  # the conversation outgrew the context
                console.print(f"{error}; /reset starts over", style="yellow")
                continue
            messages = [*turn, {"role": "assistant", "content": answer.text}]
            print()
            if stats:
                summarize(llm, answer)


def _ask(console: Console) -> str | None:
    """Return the user's next line that says something; None at the end."""
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return None
        if line == "/quit":
            return None
        if line:
            return line
