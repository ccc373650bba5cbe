"""When a head runs rows that may wait: before what rests on them, and never for another request."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppsd.model.exit_head import most_probable
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
    head = InnerHead(noted)  # type: ignore[arg-type]  # acts as a head
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


class Certain(Noted):
    """A head whose row i is likeliest to be followed by token i, then by lower ids."""

    ids = np.array([1, 3, 4, 9, 10])

    def forward_rows(self, hidden: torch.Tensor, places: object) -> torch.Tensor:
        return hidden

    def finish(self, rows: torch.Tensor, verified: object) -> torch.Tensor:
        return rows

    def copy_odds(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(rows), 1)

    def opinions(self, rows: torch.Tensor, k: int, perturb):
        scores = perturb(torch.arange(5.0).expand(len(rows), -1), self.ids)
        columns, probabilities = most_probable(scores, 2)
        return torch.from_numpy(self.ids)[columns], probabilities


def allowed(*tokens: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(4, "little")


def test_a_head_names_only_what_the_grammar_permits() -> None:
    head = InnerHead(Certain())  # type: ignore[arg-type]  # all of a head that it asks for
    masks = (allowed(1, 3, 5), allowed(*range(32)), allowed(5))
    rows = [certain(position) for position in (10, 11, 12)]
    said = head.opinion(0, rows, torch.zeros(3, 2), masks=masks)
    assert said.tokens == ((3, 1), (10, 9), (10, 9))  # the last could say nothing at all
    assert said.numbers[0, :2].sum() == pytest.approx(1.0)  # all probability is on these two
    free = head.opinion(0, rows, torch.zeros(3, 2))
    assert free.tokens == ((10, 9),) * 3
