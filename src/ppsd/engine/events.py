"""What an observer sees of an engine at work (``LLM.observe``); times in nanoseconds.

They are made only while somebody looks. Slices of stage 0 come between them, as tuples
(``worker.recorder.Slice``): the slice of a pass has its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ppsd.speculation.policy import Feed
from ppsd.speculation.waves import Row
from ppsd.worker.recorder import Slice


class FedBlock(NamedTuple):
    """Stage 0 begins with rows of a chain, or with a piece of a prompt."""

    start: int
    slot: int
    feed: Feed


class FedRows(NamedTuple):
    """Stage 0 begins with the rows of a wave."""

    start: int
    rows: Sequence[Row]


class Made(NamedTuple):
    """A verdict made ``tokens`` of a slot final, the first ``accepted`` of which were drafts.

    With them ``committed`` tokens are final, the prompt's among them.
    """

    time: int
    slot: int
    committed: int
    tokens: tuple[int, ...]
    accepted: int


class Left(NamedTuple):
    """The sequence of a slot is over."""

    slot: int


Event = FedBlock | FedRows | Made | Left | Slice
