"""What the verbs print: the growing answer on standard output, the rest on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

import typer
from rich.console import Console
from rich.table import Table

from ppsd.cli.streams import visible
from ppsd.errors import cause_of, counted

if TYPE_CHECKING:
    from ppsd.config import EngineConfig
    from ppsd.engine.llm import LLM, Chunk, Completion
    from ppsd.engine.stats import RequestStats
    from ppsd.engine.text import Piece
    from ppsd.speculation.gate import Switches
    from ppsd.speculation.waves import WaveCounts

COLUMNS = 80  # what lists are made for
ACCEPTED, CORRECTED = "green", "red"


def log_console() -> Console:
    """Return a console for notices and progress, on standard error.

    Standard output is for the answer.
    """
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.soft_wrap = not console.is_terminal  # a terminal would break words
    return console


def list_console() -> Console:
    """Return a console for lists of names, which rich would leave no room on a narrow terminal.

    There the terminal breaks the lines, and nothing is lost.
    """
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, COLUMNS)
    return console


def notice(text: str, style: str | None = None) -> None:
    """Print a notice, which may quote a stranger's file."""
    log_console().print(visible(text), style=style)


def draw(plot: Callable[[], None]) -> None:
    """Draw a picture of what is measured and kept already, or print why there is none."""
    from ppsd.plots import can_plot

    if not can_plot():
        log_console().print("no plot without matplotlib: pip install 'ppsd-llm[plot]'")
        return
    try:
        plot()
    except Exception as error:  # of matplotlib's own kinds: a prompt's category may be anything
        log_console().print(f"no plot: {cause_of(error)}")


def painter(highlight: bool) -> Callable[[Piece], str]:
    """Return how to print a piece of text: as it is, unless standard output is a terminal.

    There control characters are spelled out, as a model may write any, and with ``highlight``
    pieces are coloured unless NO_COLOR is set.
    """
    screen = Console()
    if not screen.is_terminal:
        return lambda piece: piece.text
    if not highlight or screen.no_color:
        return lambda piece: visible(piece.text)
    colours = (CORRECTED, ACCEPTED)
    return lambda piece: typer.style(visible(piece.text), fg=colours[piece.accepted])


def show(chunk: Chunk, paint: Callable[[Piece], str]) -> None:
    """Print what a chunk releases, at once and unchanged (rich would expand its tabs)."""
    sys.stdout.write("".join(paint(piece) for piece in chunk.pieces))
    sys.stdout.flush()


def conclude(llm: LLM, completion: Completion, *, stats: bool) -> None:
    """Print how fast an answer came; with ``stats`` also how its drafts fared and its stages."""
    console, request = log_console(), completion.stats
    speed = request.tokens_per_second
    paced = pace_label(llm.config, request.overruns, request.decode_blocks)
    parts = [f"{counted(request.new_tokens, 'token')}{paced}"]
    if speed is not None:
        parts += [f"{speed:.1f} tokens/s", _compared(llm, request)]
    if why := cut(llm, completion):
        parts.append(why)
    console.print(_line(parts), style="bold")
    if stats:
        show_stats(llm, completion)


def _compared(llm: LLM, request: RequestStats) -> str:
    """Return how many times as fast as plain decoding: measured by the gate, or its bounds."""
    if not llm.config.schedule.drafts:
        return "plain decoding"
    if request.speedup_bounds is None:
        return "plain decoding was not measured"
    low, high = request.speedup_bounds
    if low == high:
        return f"{high:.2f}× plain decoding (measured)"
    return f"{low:.2f}–{high:.2f}× plain decoding (estimated)"


def cut(llm: LLM, completion: Completion) -> str:
    """Say why an answer is not complete; nothing if it is."""
    if completion.finish_reason != "length":
        return ""
    request, limit = completion.stats, llm.layout.max_context
    if request.prompt_tokens + request.new_tokens >= limit:
        return f"cut off: the context of {limit} tokens is full"
    return "cut off at --max-tokens"


def show_stats(llm: LLM, completion: Completion) -> None:
    """Print the numbers of speculation: lines of counts and a table of stages."""
    console = log_console()
    stats, counts = completion.stats, completion.stats.counts
    parts = [llm.config.mode, f"{stats.prefill_seconds:.2f} s to the first token"]
    if stats.cached_tokens:
        parts.append(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens kept")
    console.print(_line(parts))
    if llm.config.schedule.drafts:
        rate = counts.acceptance_rate
        share = "" if rate is None else f" ({rate:.0%})"
        accepted = f"drafts: {counts.accepted} of {counts.judged} accepted{share}"
        parts = [accepted, f"{counts.discarded} discarded", f"{counts.resyncs} resyncs"]
        if stats.gate and stats.gate.pauses:
            parts.append(_pauses(stats.gate))
        console.print(_line(parts))
    if llm.config.waves and hasattr(counts, "rows"):
        console.print(_line(_wave_parts(cast("WaveCounts", counts))))
    if stats.stages:
        console.print(_stage_table(llm, completion))


def _wave_parts(counts: WaveCounts) -> Iterator[str]:
    """Say how right drafts came about: as which of their siblings, by whose word."""
    yield f"{counts.rows} rows"
    if counts.opinions:
        yield f"{counts.opinions} opinions of later heads"
    if counts.ranks:
        ranks = ", ".join(f"{n + 1}: {count}" for n, count in sorted(counts.ranks.items()))
        yield f"right as sibling {ranks}"
    if counts.levels:
        names = {-1: "earlier text", 0: "the first head"}
        levels = sorted(counts.levels.items())
        yield "by " + ", ".join(
            f"{names.get(k, f'the head after stage {k}')}: {n}" for k, n in levels
        )


def size(count: int) -> str:
    """Return a number of bytes in the unit that a person would choose."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 10 * scale else 0}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def pace_label(config: EngineConfig, overruns: int = 0, blocks: int = 0) -> str:
    """Return what has to stand beside every figure of paced stages; nothing for real time."""
    if not config.pace:
        return ""
    pace = ", ".join(f"{seconds:g}" for seconds in config.pace)
    late = f"; {overruns} of {blocks} blocks took longer" if blocks else ""
    return f" (PACED: emulated stages of {pace} s a block{late})"


def _pauses(gate: Switches) -> str:
    times = "once" if gate.pauses == 1 else f"{gate.pauses} times"
    return f"paused {times}, for {gate.paused_tokens} tokens: plain decoding was no slower"


def _line(parts: Iterable[str]) -> str:
    return " · ".join(parts)


def _stage_table(llm: LLM, completion: Completion) -> Table:
    table = Table("stage", "layers", "busy", "memory", box=None, pad_edge=False)
    memory = list(zip(llm.memory, llm.memory_needed, strict=True))
    for rank, stage in enumerate(completion.stats.stages):
        first, last = stage.layers
        held = "as stage 0"
        if rank < len(memory):
            used, needed = memory[rank]
            held = f"{used / 2**20:.0f} MiB, at most about {needed / 2**20:.0f}"
        table.add_row(str(rank), f"{first}–{last - 1}", f"{stage.busy_share:.0%}", held)
    return table
