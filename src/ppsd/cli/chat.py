"""``ppsd chat``: a conversation that keeps its key/value cache from turn to turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ppsd import checks
from ppsd.cli.display import conclude, cut, log_console, painter, show
from ppsd.cli.session import advise, open_llm
from ppsd.cli.settings import Sampling
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, PipelineError, PpsdError, cause_of

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM, Completion
    from ppsd.engine.text import Piece
    from ppsd.types import SamplingParams

HINT = "/help lists commands, Ctrl-C stops an answer, Ctrl-D ends the conversation."
PROMPT = "> "
COMMANDS = {
    "/help": "show this list",
    "/exit": "end the conversation, as /quit and Ctrl-D do",
    "/quit": "end the conversation",
    "/reset": "forget all messages but the system message",
    "/save": "FILE: write the conversation to a new JSON file",
    "/system": "TEXT: set the system message; without TEXT remove it",
    "/stats": "show the numbers of speculation of the last answer",
}
ENDS = ("/exit", "/quit")
TAKES_TEXT = ("/save", "/system")
ESCAPE = "A message that begins with / needs a space before it."
MOST_TOKENS = 2**31 - 1  # the engine cuts it to the room that the context leaves

Messages = list[dict[str, str]]


def chat(
    config: EngineConfig,
    sampling: Sampling,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    highlight: Annotated[
        bool, typer.Option("--highlight", help="Accepted drafts green, the target's own red.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tell speed and numbers after every answer.")
    ] = False,
) -> None:
    """Talk with the model; the conversation and its cache are kept."""
    unlimited = {"max_tokens": MOST_TOKENS}
    checks.unicode("system", system or "")
    sampling.params(unlimited)  # refuses now what would only fail once the model is loaded
    typed = sys.stdin.isatty()
    with open_llm(config) as llm:
        params = sampling.params(unlimited | dict(llm.defaults.values))
        talk = Conversation(llm, params, painter(highlight), stats)
        talk.set_system(system or "")
        if typed:
            _note(HINT)
        for line in _lines(typed):
            silent = not talk.answers
            try:
                talk.take(line)
                if silent and talk.answers:
                    advise(config, llm)
            except PipelineError:  # the workers are gone
                raise
            except PpsdError as error:
                _note(" ".join([f"{error}.", *getattr(error, "__notes__", ())]), "yellow")
        if not typed and not talk.answers:
            raise PpsdError("standard input held no message that could be answered")


class Conversation:
    """The messages so far, and what a line of the user does to them."""

    def __init__(
        self, llm: LLM, params: SamplingParams, paint: Callable[[Piece], str], stats: bool
    ) -> None:
        self.answers = 0
        self._llm, self._params, self._paint, self._stats = llm, params, paint, stats
        self._system: Messages = []
        self._turns: Messages = []
        self._last: Completion | None = None

    def take(self, line: str) -> None:
        """Answer a message, or do what a command says. Raises PpsdError, and nothing is lost."""
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        else:
            self._answer(line.strip())

    def set_system(self, text: str) -> None:
        """Set the system message of the answers to come, or remove it."""
        self._system = [{"role": "system", "content": text}] if text else []

    def _command(self, name: str, text: str = "") -> None:
        if name not in COMMANDS:
            raise PpsdError(f"{name} is no command; there are {', '.join(COMMANDS)}")
        if text and name not in TAKES_TEXT:
            raise ConfigError(name, text, "typed without anything behind it")
        if name == "/help":
            _note("\n".join([*(f"{key:<9}{told}" for key, told in COMMANDS.items()), ESCAPE]))
        elif name == "/reset":
            self._turns = []
        elif name == "/system":
            self.set_system(text)
        elif name == "/save":
            self._save(text)
        elif self._last is None:
            raise PpsdError("/stats: no answer was completed yet")
        else:
            conclude(self._llm, self._last, stats=True)

    def _save(self, name: str) -> None:
        """Write the messages as JSON; a file that exists is left alone."""
        if not name:
            raise ConfigError("/save", name, "followed by the name of a file")
        path = os.path.expanduser(name)
        text = json.dumps([*self._system, *self._turns], ensure_ascii=False, indent=1)
        try:
            with open(path, "x", encoding="utf-8") as file, _whole(file):
                file.write(text)
        except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
            told = cause_of(error)
            raise ConfigError("/save", name, f"a new file ({told})") from error
        _note(f"{len(self._system + self._turns)} messages saved in {name}")

    def _answer(self, line: str) -> None:
        """Answer a line; an answer that was stopped stays in the conversation."""
        turns = [*self._turns, {"role": "user", "content": line}]
        text = ""
        try:
            stream = self._llm.stream([*self._system, *turns], self._params, reuse=True)
            with closing(stream), _stoppable() as stopped:
                while not stopped():
                    try:
                        chunk = next(stream)
                    except StopIteration as end:
                        self._conclude(end.value)
                        break
                    show(chunk, self._paint)
                    text += chunk.text
                else:
                    print(flush=True)
                    _note("(stopped)")
        except ConfigError as error:
            if self._turns and "context" in error.allowed and self._fits(turns[-1:]):
                error.add_note("/reset starts over.")
            raise
        if text:
            self._turns = [*turns, {"role": "assistant", "content": text}]
            self.answers += 1

    def _fits(self, turns: Messages) -> bool:
        """Return True if these messages alone leave room for an answer."""
        try:
            self._llm.encode([*self._system, *turns])
        except ConfigError:
            return False
        return True

    def _conclude(self, completion: Completion) -> None:
        self._last = completion
        print(flush=True)
        if not completion.text:
            _note("(the model ended its answer at once)")
        if self._stats:
            conclude(self._llm, completion, stats=True)
        elif why := cut(self._llm, completion):
            _note(f"({why})")


@contextmanager
def _whole(file: TextIO) -> Iterator[None]:
    """Remove a new file that could not be written: a part is of no use, and takes the name."""
    try:
        yield
        file.flush()
        os.fsync(file.fileno())  # some disks tell only now that they are full
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            os.unlink(file.name)
        raise


def _note(text: str, style: str = "dim") -> None:
    log_console().print(text, style=style)


def _lines(typed: bool) -> Iterator[str]:
    """Yield the user's lines that say something, until the end."""
    if typed:
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401 (gives ``input`` its line editing and history)
    while (line := _ask(typed)).strip() not in ENDS:
        if line.strip():
            yield line.rstrip()


def _ask(typed: bool) -> str:
    """Return the next line; at a terminal Ctrl-C drops what is typed of it and asks again."""
    try:
        return _typed() if typed else input()
    except KeyboardInterrupt:
        if not typed:
            raise
        print(file=_screen())
        return ""
    except EOFError:
        if typed:
            print(file=_screen())
        return ENDS[0]
    except UnicodeDecodeError as error:
        raise PpsdError(f"standard input is not UTF-8 text: {error}") from error


def _typed() -> str:
    """Return a line typed at the terminal; Ctrl-C raises, and the verb's own handler is not told.

    That one would take whatever error ends the conversation later for this interrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _screen() is sys.stdout:
            return input(PROMPT)
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()
    finally:
        signal.signal(signal.SIGINT, before)


def _screen() -> TextIO:
    """Return where the user looks: a file of answers is to hold nothing else."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C only ask to stop, so that what was said is kept; a second is hard.

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
