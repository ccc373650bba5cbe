"""Progress of long work on standard error: loading a frozen model, and letting it write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ppsd import checks
from ppsd.cli.display import log_console
from ppsd.train.settings import DistillConfig

if TYPE_CHECKING:
    from ppsd.train.run import Teacher
    from ppsd.train.targets import GenerateReport


LINE_EVERY_S = 60.0


class TimeColumn(TimeRemainingColumn):
    """The time that is left, and at the end the time it took, each named as such."""

    def __init__(self) -> None:
        super().__init__(elapsed_when_finished=True)

    def render(self, task: Task) -> Text:
        """Return the time with its name before it."""
        return Text("took " if task.finished else "ETA ", end="") + super().render(task)


@contextmanager
def bar(description: str, total: int, fields: str) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar with its time; ``fields`` is rich's format of what else it shows."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:.0f}%"),
        TimeColumn(),
        TextColumn(fields),
    )
    # Steps take seconds: an estimate from the last half minute would jump about.
    with _Bar(*columns, console=log_console(), speed_estimate_period=600.0) as shown:
        yield shown, shown.add_task(description, total=total, note="")


class _Bar(Progress):
    """A bar on a terminal; a line a minute in a log."""

    def __init__(self, *columns: ProgressColumn, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._told = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task as in rich, and write a line when it is time."""
        super().update(task_id, **changes)
        now = time.monotonic()
        if self.console.is_terminal or now - self._told < LINE_EVERY_S:
            return
        self._told = now
        task = self.tasks[0]
        note = f" · {task.fields['note']}" if task.fields["note"] else ""
        self.console.print(f"{task.description}: {task.percentage:.0f}%{note}")


def speed(count: int, seconds: float | None) -> str:
    """Return how many a second, for a bar."""
    return f"{count / seconds:.0f}" if seconds else "–"


def set_threads(threads: int) -> None:
    """Set the number of CPU threads of this process; 0 leaves PyTorch's choice."""
    import torch

    checks.integer("threads", threads, 0)
    if threads:
        torch.set_num_threads(threads)


def load(model: str | None, config: DistillConfig, device: str) -> Teacher:
    """Load the frozen model with a bar."""
    from ppsd.train.run import load_teacher

    with bar("loading the model", 1, "{task.completed} of {task.total}") as (shown, task):
        return load_teacher(
            model,
            config,
            device,
            lambda done, total: shown.update(task, completed=done, total=total),
        )


@contextmanager
def writing() -> Iterator[Callable[[GenerateReport], None]]:
    """Show a bar for ``write_targets``, whose ``report`` this gives."""
    with bar("writing targets", 1, "{task.fields[note]}") as (shown, task):

        def report(r: GenerateReport) -> None:
            if r.tokens == 0:  # what an earlier call wrote must not count as this one's speed
                shown.reset(task, total=1, note="")
            rate = speed(r.tokens, shown.tasks[0].elapsed)
            note = f"{r.done:,} of {r.total:,} prompts · {r.tokens:,} tokens · {rate} tokens/s"
            if not r.tokens:
                note = f"reading prompts: {r.read:,} tokens"
            shown.update(task, completed=r.share, note=note)

        yield report
