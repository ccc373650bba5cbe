"""Opening an LLM for a verb: progress bar, notices, and joining as a torchrun rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ppsd.cli.display import log_console, notice
from ppsd.config import EngineConfig

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.model.head_files import HeadConfig

Tell = Callable[[str, str | None], object]  # a notice, and its style on a terminal
UNTRAINED_NOTICE = "untrained exit head: few drafts will be accepted; exact, but no faster"
HELD_OUT_NOTICE = (
    "this head's α is only held out from text like its training's, and other text may fare worse; "
    "measure it: ppsd acceptance --head {head} --data FILE --out DIR --record"
)
NO_HEAD_NOTICE = (
    "no trained exit head fits {model}{exit}, so decoding is plain; --head lookup drafts from "
    "repeated text, and to train a head: "
    "ppsd distill{option} --exit-layer {layer} --data FILE --self-generate --out {place}"
)


def with_head(config: EngineConfig) -> EngineConfig:
    """Return the settings with the directory of the head that they name."""
    from ppsd.model.head_library import head_directory

    return config.replaced(head=str(head_directory(config.head)))


@contextmanager
def open_llm(config: EngineConfig, tell: Tell = notice, **more: Any) -> Iterator[LLM]:
    """Load the model with a progress bar; closed at the end, whatever happens."""
    console = log_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        tasks = [bar.add_task(f"loading stage {rank}", total=None) for rank in range(config.stages)]

        def progress(rank: int, done: int, total: int) -> None:
            bar.update(tasks[rank], completed=done, total=total)

        from ppsd.engine.llm import LLM  # takes seconds, so the bar is up first

        resolved = with_head(config)
        settings = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(resolved)}
        llm = LLM(progress=progress, **settings | more)
    with llm:
        if llm.layout.reason:
            tell(llm.layout.reason, "dim")
        if asked := str(llm.defaults):
            tell(f"sampling as {llm.defaults.origin} asks: {asked}", "dim")
        for text in _notices(llm):
            tell(text, "yellow")
        yield llm


def advise(config: EngineConfig, llm: LLM, tell: Tell = notice) -> None:
    """Say how to get a head if one is missed: once something went well, as it explains no error."""
    if config.head == "auto" and config.stages > 1 and llm.layout.head is None:
        tell(_no_head_notice(config, llm), "yellow")


def _notices(llm: LLM) -> list[str]:
    """Return what the user should know before the answer."""
    head, notices = llm.layout.head, list(llm.defaults.ignored)
    if head is not None and not head.trained and llm.config.schedule.drafts:
        notices.append(UNTRAINED_NOTICE)
    if head is not None and llm.config.schedule.drafts and _held_out(head):
        notices.append(HELD_OUT_NOTICE.format(head=llm.config.head))
    return notices + list(llm.layout.spec.notices)


def _held_out(head: HeadConfig) -> bool:
    from ppsd.model.head_library import known_rate

    rate = known_rate(head)
    return rate is not None and not rate.measured


def _no_head_notice(config: EngineConfig, llm: LLM) -> str:
    from ppsd.model.head_library import local_root

    name, place = llm.layout.spec.name, Path("DIR")
    with suppress(OSError):  # there is no home
        place = local_root() / name
    wanted = llm.layout.bounds[1]
    return NO_HEAD_NOTICE.format(
        model=name,
        exit="" if config.exit_layer is None else f" at exit layer {wanted}",
        option="" if config.model is None else f" --model {config.model}",
        layer=wanted,
        place=place,
    )
