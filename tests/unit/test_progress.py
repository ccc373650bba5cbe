"""Progress without a terminal: a line a minute, and no bar."""

from __future__ import annotations

import pytest

from ppsd.cli import progress


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
