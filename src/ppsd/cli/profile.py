"""``ppsd profile``: measure what a model's parts and a hop cost on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ppsd.cli.display import log_console
from ppsd.cli.progress import TimeColumn
from ppsd.cli.settings import Only
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, counted

if TYPE_CHECKING:
    from ppsd.engine.peer import Subject
    from ppsd.plan.profile import Profile, Timing

BUSY_LOAD = 0.5  # the load average from which on a measurement disturbs nobody but is disturbed


def profile(
    config: Annotated[
        EngineConfig, Only(("model", "dtype", "stages", "threads_per_stage", "transport"))
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write here, not into ppsd's cache.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Time layers, heads and messages; plans made later on this machine use the result."""
    from ppsd.plan.profile import check_writable

    subject = subject_of(config)
    place = out or subject.place
    check_writable(place)
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        text = (
            f"the machine is busy (load {load:.1f}): times will be too long, contention above all"
        )
        log_console().print(text, style="yellow")
    measured = _measure(subject)
    if as_json:
        print(json.dumps(measured.to_json()))
    else:
        _show(measured)
    measured.save(place)
    log_console().print(f"profile written to {place}")


def subject_of(config: EngineConfig) -> Subject:
    """Return what is measured for the settings of a pipeline; raises ConfigError."""
    from ppsd.engine import choose
    from ppsd.model.source import describe, resolve_model
    from ppsd.model.weights import check_shapes, fingerprint, open_source

    files = resolve_model(config.model)
    spec, source = describe(files), open_source(files.path)
    check_shapes(source, spec)
    if config.stages > spec.num_layers:
        raise ConfigError("stages", config.stages, f"an integer in [1, {spec.num_layers}]")
    subject = choose.subject_of(config, files.path, spec, source, fingerprint(spec, source))
    return subject if config.transport == "auto" else replace(subject, transport=config.transport)


def _measure(subject: Subject) -> Profile:
    from ppsd.engine.profiler import profiler
    from ppsd.provenance import provenance

    console = log_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"profiling {subject.spec.name}", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        with profiler(subject) as take:
            return take(provenance(), progress)


def _show(profile: Profile) -> None:
    """Print a table of medians with their quartiles, in milliseconds."""
    table = Table("part", "median", "quartiles", box=None)
    for part, time in _parts(profile):
        spread = f"{time.low * 1e3:.3f} – {time.high * 1e3:.3f}"
        table.add_row(part, f"{time.median * 1e3:.3f} ms", spread)
    console = Console(highlight=False)
    console.print(table)
    ratio, speed = profile.contention, profile.bandwidth / 1e9
    console.print(
        f"{profile.transport}: {speed:.2f} GB/s; a layer takes {ratio.median:.2f} times as long "
        f"({ratio.low:.2f} – {ratio.high:.2f}) while another worker works"
    )


def _parts(profile: Profile) -> list[tuple[str, Timing]]:
    rows: list[tuple[str, Any]] = []
    for layer in profile.layer:
        rows.append((f"layer, {counted(layer.rows, 'row')}, context {layer.context}", layer.time))
    rows += [(f"LM head, {counted(part.rows, 'row')}", part.time) for part in profile.lm_head]
    for head in profile.heads:
        kind = counted(head.layers, "layer") if head.layers else "norm"
        rows.append((f"exit head ({kind}), {head.draft_vocab} tokens", head.time))
    return [
        *rows,
        ("a token on rank 0: policy, gate, embedding, check", profile.entry),
        ("between two blocks, both there", profile.overhead),
        ("more for a message that is waited for", profile.latency),
    ]
