"""Progress without a terminal: a line a minute, and no bar."""

from __future__ import annotations

import pytest

from ppsd.cli import progress
from ppsd.cli.display import draw
from ppsd.errors import PpsdError


def test_a_log_gets_a_line_when_it_is_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("training", 100, "{task.fields[note]}") as (bar, task):
        for seconds in range(0, 150, 10):
            now[0] = float(seconds)
            bar.update(task, completed=seconds / 2, note=f"{seconds} tokens")
        assert capsys.readouterr().err.splitlines() == [
            "training: 30% · 60 tokens",
            "training: 60% · 120 tokens",
        ]


def test_a_picture_that_fails_is_told_and_nothing_else_is_lost(capsys) -> None:
    def fail() -> None:
        raise PpsdError("cannot write x.png: No space left on device")

    draw(fail)
    assert capsys.readouterr().err == "no plot: cannot write x.png: No space left on device\n"
