"""What a run of training is expected to bring, and how that is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ppsd.cli.distill import _forecast_line
from ppsd.train.distill import Forecast
from ppsd.train.gain import expected_gain


@pytest.mark.parametrize(
    ("seen", "gained", "told"),
    [
        (None, 0.02, "begins at 0.40 and may come to 0.42, as far as the default model's heads"),
        (None, 0.0, "begins at 0.40 and can hardly rise with so few tokens"),
        (10**8, 0.0, "begins at 0.40 and may rise: the default model's heads have read no more"),
    ],
)
def test_what_to_expect_is_told(seen: int | None, gained: float, told: str) -> None:
    starts = {} if seen is None else {8: SimpleNamespace(tokens=seen)}
    best = SimpleNamespace(kept={8: SimpleNamespace(start=0.4)})
    trainer: Any = SimpleNamespace(best=best, starts=starts)
    assert told in _forecast_line(trainer, Forecast(60.0, 10**6, {8: 0.4 + gained}))


def test_more_text_is_expected_to_bring_more() -> None:
    gains = [expected_gain(tokens) for tokens in (0, 12_000, 100_000, 10**6, 10**7, 10**9)]
    assert gains[:2] == [0, 0]
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(0.217)
    assert expected_gain(10**6) > expected_gain(10**6, seen=10**6) > expected_gain(1, seen=10**8)
