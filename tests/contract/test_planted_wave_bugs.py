"""L5 of waves: every bug planted in them is caught, and docs/exactness.md lists them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.planted_wave_bugs import WAVE_BUGS
from tests.support.wave_rig import check_at_random
from tests.unit.test_waves import check_opinions

DOC = Path(__file__).parents[2] / "docs" / "exactness.md"
CASES = 18
BY_THE_POLICY = "opinion of an old root taken for the new one's"
TIMEOUT_S = 0.3  # a planted bug may leave everybody waiting


def check_waves(timeout: float = 2.0) -> None:
    for seed in range(CASES):
        check_at_random(seed, timeout)


def test_the_page_lists_exactly_the_planted_bugs() -> None:
    section = DOC.read_text().split("## Bugs planted in waves")[1].split("##")[0]
    listed = [line[2:] for line in section.splitlines() if line.startswith("* ")]
    assert listed == list(WAVE_BUGS)


def test_without_a_bug_every_check_passes() -> None:
    check_waves()


@pytest.mark.parametrize("name", WAVE_BUGS)
def test_each_is_caught(name, monkeypatch) -> None:
    WAVE_BUGS[name](monkeypatch)
    check = check_opinions if name == BY_THE_POLICY else lambda: check_waves(TIMEOUT_S)
    with pytest.raises(Exception):  # noqa: B017, PT011 - a bug shows in its own way
        check()
