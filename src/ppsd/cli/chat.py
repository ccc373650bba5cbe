"""``ppsd chat``: a conversation that keeps its key/value cache from turn to turn."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ppsd.cli.display import log_console, painter, show, summarize
from ppsd.cli.options import PipelineOptions, SamplingOptions
from ppsd.cli.session import open_llm
from ppsd.errors import ConfigError, PpsdError

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM, Completion
    from ppsd.engine.sequence import Piece
    from ppsd.types import SamplingParams

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."

Messages = list[dict[str, str]]


def chat(
    pipeline: PipelineOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    highlight: Annotated[
        bool, typer.Option("--highlight", help="Accepted drafts green, the target's own red.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Summary after every answer.")] = False,
) -> None:
    """Talk with the model; the conversation and its cache are kept."""
    params = sampling.params()
    start: Messages = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    with open_llm(pipeline) as llm:
        log_console().print(HELP, style="dim")
        for line in _lines():
            if line == "/reset":
                messages = list(start)
                continue
            try:
                messages = _turn(llm, messages, line, params, painter(highlight), stats)
            except ConfigError as error:  # the conversation outgrew the context
                log_console().print(f"{error}; /reset starts over", style="yellow")


def _lines() -> Iterator[str]:
    """The user's lines that say something, until the end."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (gives ``input`` its line editing and history)
    while (line := _ask(prompt)) != "/quit":
        if line:
            yield line


def _ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        if prompt:
            print()
        return "/quit"
    except UnicodeDecodeError as error:
        raise PpsdError(f"standard input is not UTF-8 text: {error}") from error


def _turn(
    llm: LLM,
    messages: Messages,
    line: str,
    params: SamplingParams,
    paint: Callable[[Piece], str],
    stats: bool,
) -> Messages:
    """Answer a line; return the conversation with both. An answer that was stopped stays in it."""
    turn = [*messages, {"role": "user", "content": line}]
    text = ""
    with closing(llm.stream(turn, params, reuse=True)) as stream, _stoppable() as stopped:
        while not stopped():
            try:
                chunk = next(stream)
            except StopIteration as end:
                _conclude(llm, end.value, stats)
                break
            show(chunk, paint)
            text += chunk.text
        else:
            print(flush=True)
            log_console().print("(stopped)", style="dim")
    return [*turn, {"role": "assistant", "content": text}] if text else messages


def _conclude(llm: LLM, completion: Completion, stats: bool) -> None:
    print(flush=True)
    if completion.finish_reason == "length":
        tokens = completion.stats.new_tokens
        log_console().print(f"(cut at {tokens} tokens; --max-tokens allows more)", style="dim")
    if stats:
        summarize(llm, completion)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only ask to stop, so that no message is cut in half; a second is hard.

    Yields whether a stop was asked for.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and callable(before):
            before(number, frame)
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
