"""``ppsd generate``: one prompt, streamed, with a summary of what the pipeline did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppsd.cli.options import PipelineOptions, SamplingOptions
from ppsd.cli.session import log_console, open_llm
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM, Chunk, Completion, Prompt
    from ppsd.types import SamplingParams

ACCEPTED, CORRECTED = "green", "bold red"


def generate(
    pipeline: PipelineOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' reads it from stdin.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat template.")] = None,
    samples: Annotated[int, typer.Option(help="Completions; sample i has seed + i.")] = 1,
    highlight: Annotated[
        bool, typer.Option("--highlight", help="Colour accepted drafts and corrected tokens.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (open it in Perfetto).")
    ] = None,
) -> None:
    """Complete a prompt and stream the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("prompt", text, "a non-empty text, or '-' with text on standard input")
    params = sampling.params(samples)
    with open_llm(pipeline, trace=trace is not None) as llm:
        message = text if raw else _messages(text, system)
        if as_json:
            results = [_record(llm, c) for c in llm.generate(message, params)]
            print(json.dumps(results[0] if samples == 1 else results))
        else:
            for i in range(samples):
                _show(llm, message, params, i, highlight)
        if trace is not None:
            llm.write_trace(trace)
            log_console().print(f"trace written to {trace}", highlight=False)


def _messages(text: str, system: str | None) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _show(llm: LLM, prompt: Prompt, params: SamplingParams, sample: int, highlight: bool) -> None:
    from dataclasses import replace

    if sample:
        print(f"\n--- sample {sample}")
    one = replace(params, n=1, seed=params.seed + sample)
    completion = stream_text(llm, prompt, one, highlight=highlight)
    print()
    summarize(llm, completion)


def stream_text(
    llm: LLM, prompt: Prompt, params: SamplingParams, *, highlight: bool, reuse: bool = False
) -> Completion:
    """Print a completion as it grows; colours only with ``highlight`` and on a terminal."""
    console = Console(highlight=False, soft_wrap=True)
    stream = llm.stream(prompt, params, reuse=reuse)
    while True:
        try:
            chunk = next(stream)
        except StopIteration as end:
            completion: Completion = end.value
            return completion
        console.print(Text(chunk.text, style=_style(chunk) if highlight else ""), end="")
        console.file.flush()


def _style(chunk: Chunk) -> str:
    """Every chunk is one commit: accepted drafts, with the target's own token at its end or not."""
    return ACCEPTED if all(chunk.accepted) else CORRECTED


def _record(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The ``--json`` object."""
    config = llm.config
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "mode": config.mode,
        "block": config.schedule.block,
        "in_flight": config.schedule.in_flight,
        "stages": [stage.layers for stage in completion.stats.stages],
        "exit_layer": llm.layout.bounds[1] if config.schedule.drafts else None,
        **completion.stats.to_json(),
        "memory_peak_bytes": llm.memory_peaks,
    }


def summarize(llm: LLM, completion: Completion) -> None:
    """Print what the run did, one line of counts and one table of stages, to standard error."""
    console = log_console()
    stats, counts = completion.stats, completion.stats.counts
    speed, rate = stats.tokens_per_second, counts.acceptance_rate
    parts = [
        f"{llm.config.mode}",
        f"{stats.new_tokens} tokens ({completion.finish_reason})",
        "" if speed is None else f"{speed:.1f} tokens/s",
        f"first token after {stats.prefill_seconds:.2f} s",
    ]
    if llm.config.schedule.drafts:
        shown = "–" if rate is None else f"{rate:.0%}"
        parts.append(f"acceptance {shown} ({counts.accepted} of {counts.judged})")
        parts.append(f"{counts.resyncs} resyncs, {counts.discarded} drafts discarded")
    console.print("\n" + " · ".join(filter(None, parts)), style="bold", highlight=False)
    console.print(_stage_table(llm, completion))


def _stage_table(llm: LLM, completion: Completion) -> Table:
    table = Table("stage", "layers", "busy", "peak memory", box=None, pad_edge=False)
    peaks = llm.memory_peaks
    for rank, stage in enumerate(completion.stats.stages):
        first, last = stage.layers
        peak = f"{peaks[rank] / 2**20:.0f} MiB" if rank < len(peaks) else "shared"
        table.add_row(str(rank), f"{first}–{last - 1}", f"{stage.busy_share:.0%}", peak)
    return table
