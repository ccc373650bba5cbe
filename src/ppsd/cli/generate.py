"""``ppsd generate``: one prompt, streamed, with a summary of what the pipeline did."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppsd import checks
from ppsd.cli.display import conclude, log_console, painter, show
from ppsd.cli.session import advise, open_llm
from ppsd.cli.settings import Sampling
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, PpsdError
from ppsd.types import MAX_CHOICES

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM, Completion, Prompt
    from ppsd.engine.text import Piece
    from ppsd.types import SamplingParams


def generate(
    config: EngineConfig,
    sampling: Sampling,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' reads it from stdin.", metavar="[PROMPT]")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    system: Annotated[
        str | None, typer.Option(help="System message of the chat template.", metavar="TEXT")
    ] = None,
    samples: Annotated[int, typer.Option(help="Completions; sample i has seed + i.")] = 1,
    highlight: Annotated[
        bool, typer.Option("--highlight", help="Accepted drafts green, the target's own red.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tell how drafts fared and what each stage did.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or a list of --samples.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a Chrome trace (open it in Perfetto).", metavar="FILE"),
    ] = None,
) -> None:
    """Complete a prompt and stream the answer."""
    text = _read(prompt)
    _check(raw, system, config.chat_template, trace)
    _params(sampling, samples)
    with open_llm(config, trace=trace is not None) as llm:
        params = _params(sampling, samples, llm.defaults.values)
        message = text if raw else _messages(text, system)
        if as_json:
            found = enumerate(llm.generate(message, params))
            results = [_record(llm, params.sample(i), c) for i, c in found]
            print(json.dumps(results[0] if samples == 1 else results))
        else:
            for i in range(samples):
                conclude(llm, _show(llm, message, params, i, painter(highlight)), stats=stats)
        advise(config, llm)
        if trace is not None:
            llm.write_trace(trace)
            log_console().print(f"trace written to {trace}")


def _read(prompt: str | None) -> str:
    if prompt is None:
        raise typer.BadParameter("it is missing; '-' reads it from stdin", param_hint="PROMPT")
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise PpsdError(f"standard input is not UTF-8 text: {error}") from error
    if not text:
        raise ConfigError("prompt", text, "a non-empty text")
    return checks.unicode("prompt", text)


def _check(raw: bool, system: str | None, template: str | None, trace: Path | None) -> None:
    """Refuse now what would only fail, or be ignored, once the model is loaded."""
    checks.unicode("system", system or "")
    for name, value in (("system", system), ("chat_template", template)):
        if raw and value is not None:
            raise ConfigError(name, value, "left out with --raw, which uses no chat template")
    if trace is not None and (trace.is_dir() or not trace.absolute().parent.is_dir()):
        raise ConfigError("trace", str(trace), "a file in a directory that exists")


def _params(
    sampling: Sampling, samples: int, defaults: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Return the parameters of all samples; ``defaults`` are known once a model is loaded."""
    checks.integer("samples", samples, 1, MAX_CHOICES)
    params = replace(sampling.params(defaults), n=samples)
    known = defaults is not None or "temperature" in sampling.given
    if known and samples > 1 and params.greedy:
        raise ConfigError("samples", samples, "1 at temperature 0, where all are equal")
    return params


def _messages(text: str, system: str | None) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _show(
    llm: LLM, prompt: Prompt, params: SamplingParams, sample: int, paint: Callable[[Piece], str]
) -> Completion:
    if sample:
        print(f"\n--- sample {sample}")
    with closing(llm.stream(prompt, params.sample(sample))) as stream:
        while True:
            try:
                show(next(stream), paint)
            except StopIteration as end:
                print("\n", flush=True)
                completion: Completion = end.value
                return completion


def _record(llm: LLM, params: SamplingParams, completion: Completion) -> dict[str, Any]:
    """Return the ``--json`` object."""
    from ppsd.model.defaults import NAMES

    config = llm.config
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "sampling": {name: getattr(params, name) for name in (*NAMES, "seed")},
        "mode": config.mode,
        "block": config.schedule.block,
        "in_flight": config.schedule.in_flight,
        "stages": [stage.layers for stage in completion.stats.stages],
        "kernels": llm.layout.kernels,
        "pace": config.pace or None,
        "exit_layer": llm.layout.bounds[1] if config.schedule.drafts else None,
        **completion.stats.to_json(),
        "memory_bytes": llm.memory,
        "memory_needed_bytes": llm.memory_needed,
    }
