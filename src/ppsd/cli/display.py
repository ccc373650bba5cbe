"""What the verbs print: the growing answer on standard output, the rest on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ppsd.cli.streams import visible

if TYPE_CHECKING:
    from ppsd.config import EngineConfig
    from ppsd.engine.llm import LLM, Chunk, Completion
    from ppsd.engine.sequence import Piece
    from ppsd.speculation.gate import Switches

ACCEPTED, CORRECTED = "green", "red"


def log_console() -> Console:
    """Notices and progress go to standard error; standard output is for the answer."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


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


def summarize(llm: LLM, completion: Completion) -> None:
    """Print what a request did: lines of counts and a table of stages."""
    console = log_console()
    stats, counts = completion.stats, completion.stats.counts
    speed, rate = stats.tokens_per_second, counts.acceptance_rate
    first = f"{stats.prefill_seconds:.2f} s to the first"
    parts = [
        llm.config.mode + pace_label(llm.config, stats.overruns, stats.decode_blocks),
        f"{stats.new_tokens} tokens ({completion.finish_reason})",
        first if speed is None else f"{first}, then {speed:.1f} a second",
    ]
    if stats.cached_tokens:
        parts.append(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens kept")
    console.print(_line(parts), style="bold")
    if llm.config.schedule.drafts:
        share = "" if rate is None else f" ({rate:.0%})"
        accepted = f"drafts: {counts.accepted} of {counts.judged} accepted{share}"
        parts = [accepted, f"{counts.discarded} discarded", f"{counts.resyncs} resyncs"]
        if stats.gate and stats.gate.pauses:
            parts.append(_pauses(stats.gate))
        console.print(_line(parts))
    console.print(_stage_table(llm, completion))


def pace_label(config: EngineConfig, overruns: int = 0, blocks: int = 0) -> str:
    """What has to stand beside every figure of paced stages; nothing for real time."""
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
    table = Table("stage", "layers", "busy", "peak memory", box=None, pad_edge=False)
    peaks = llm.memory_peaks
    for rank, stage in enumerate(completion.stats.stages):
        first, last = stage.layers
        peak = f"{peaks[rank] / 2**20:.0f} MiB" if rank < len(peaks) else "as stage 0"
        table.add_row(str(rank), f"{first}–{last - 1}", f"{stage.busy_share:.0%}", peak)
    return table
