"""When a head runs rows that may wait: before what rests on them, and never for another request."""

from __future__ import annotations

import pytest
import torch

from ppsd.speculation.waves import Row
from ppsd.types import SamplingParams
from ppsd.worker.inner_head import MAX_LAG_ROWS, InnerHead
from ppsd.worker.messages import Begin, Block


class Noted:
    """A head that notes where rows are run."""

    def __init__(self) -> None:
        self.run: list[tuple[int, int]] = []  # position, rows

    def forward(self, hidden: torch.Tensor, position: int, slot: int) -> torch.Tensor:
        self.run.append((position, len(hidden)))
        return hidden

    def commit(self, slot: int, length: int, moves: object) -> None:
        pass


def certain(position: int) -> Row:
    return Row(0, position, position - 1, position, 1, position, (), ())


def begin(shared: int) -> Begin:
    return Begin(0, SamplingParams(), 4, (), 9, shared=shared)


def lagging(rows: int) -> tuple[InnerHead, Noted]:
    noted = Noted()
    head = InnerHead(noted)  # type: ignore[arg-type]
    for position in range(10, 10 + rows):
        head.commit(0, position, ())
        head.lag([certain(position)], torch.zeros(1, 2))
    return head, noted


@pytest.mark.parametrize(("shared", "expected"), [(0, [(0, 4)]), (8, [(10, 3), (0, 4)])])
def test_rows_that_wait_are_void_once_nothing_is_taken_over(shared, expected) -> None:
    head, noted = lagging(3)
    head.begin(begin(shared))
    head.observe(0, Block(0, 1, 0, -1, 0, (1,) * 4, torch.zeros(4, 2)), torch.zeros(4, 2))
    assert noted.run == expected


def test_certain_rows_run_together() -> None:
    _, noted = lagging(MAX_LAG_ROWS)
    assert noted.run == []
    _, noted = lagging(MAX_LAG_ROWS + 1)
    assert noted.run == [(10, MAX_LAG_ROWS)]
