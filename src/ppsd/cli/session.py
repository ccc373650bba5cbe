"""Opening an LLM for a verb: progress bar, notices, and joining as a torchrun rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ppsd.cli.options import PipelineOptions

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM

UNTRAINED_NOTICE = (
    "The exit head is untrained (the model's own final norm and LM head): its drafts will rarely "
    "be accepted, so expect no speedup. Output is exact all the same."
)
NO_HEAD_NOTICE = (
    "No trained exit head fits {model}{exit}, so decoding is plain, without speculation. To train "
    "one: ppsd distill{option} --exit-layer {layer} --data FILE --self-generate --out {place}"
)


def log_console() -> Console:
    """Notices and progress go to standard error; standard output is for the answer."""
    return Console(stderr=True)


@contextmanager
def open_llm(options: PipelineOptions, **more: Any) -> Iterator[LLM]:
    """Load the model with a progress bar; closed at the end, whatever happens.

    A rank above 0 that torchrun started serves its stage here instead, and then leaves.
    """
    from ppsd.engine.llm import LLM

    if options.transport == "distributed" and int(os.environ.get("RANK", "0")) > 0:
        from ppsd.worker.process import serve_rank

        serve_rank(options.model, options.init_timeout)
        raise typer.Exit(0)
    console = log_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = [bar.add_task(f"loading stage {rank}") for rank in range(_stages(options))]

        def progress(rank: int, done: int, total: int) -> None:
            bar.update(tasks[rank], completed=done, total=total)

        llm = LLM(progress=progress, **options.settings(), **more)
    with llm:
        if llm.layout.head is not None and not llm.layout.head.trained:
            console.print(UNTRAINED_NOTICE, style="yellow", highlight=False)
        if options.head == "auto" and options.stages > 1 and llm.layout.head is None:
            console.print(_no_head_notice(options, llm), style="yellow", highlight=False)
        if llm.layout.spec.context_note:
            console.print(llm.layout.spec.context_note, style="yellow", highlight=False)
        yield llm


def _stages(options: PipelineOptions) -> int:
    return options.stages if options.split is None else options.split.count(",") + 2


def _no_head_notice(options: PipelineOptions, llm: LLM) -> str:
    from ppsd.model.head_library import local_root

    name = llm.layout.spec.name
    wanted = llm.layout.bounds[1]
    return NO_HEAD_NOTICE.format(
        model=name,
        exit="" if options.exit_layer is None else f" at exit layer {wanted}",
        option="" if options.model is None else f" --model {options.model}",
        layer=wanted,
        place=local_root() / name,
    )
