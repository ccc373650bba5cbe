"""The core of every benchmark: interleaved runs, kept as JSON lines, resumed where they stopped.

A benchmark is a plan of cells and a function that measures one; summaries are pure functions of the
measurements.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ppsd.errors import ConfigError, PpsdError, cause_of

BEGINNING = b'{"settings": '  # of a file of measurements
PLAIN = "plain"  # the variant that all are compared with: plain decoding on the pipeline


class Cell(NamedTuple):
    """One thing to measure: a variant on a task, for the repeat-th time."""

    variant: str
    task: str
    repeat: int


@dataclass(frozen=True)
class Measurement:
    """What one cell cost.

    ``tokens`` came in ``seconds``, counted from the first token, which is in neither; it took
    ``first_seconds``. ``counts`` are those of the policy; ``hits`` has a 1 for each of the tokens
    that was an accepted draft, the first token included; ``details`` belong to the benchmark.
    """

    variant: str
    task: str
    repeat: int
    tokens: int
    seconds: float
    first_seconds: float
    counts: dict[str, Any]
    hits: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """Return what was measured."""
        return Cell(self.variant, self.task, self.repeat)

    @property
    def token_time(self) -> float:
        """Return the seconds per token."""
        return self.seconds / self.tokens

    @property
    def alpha(self) -> float:
        """Return the share of judged drafts that were accepted; 0 without any.

        With blocks of one, just what decides the time: the verdict on each but the last token's
        draft says whether the next token comes a tick or a whole latency later. The last token is
        never drafted, and the first one's draft is judged.
        """
        judged = self.counts["judged"]
        return self.counts["accepted"] / judged if judged else 0.0


def interleaved(variants: Sequence[str], tasks: Sequence[str], repeats: int) -> list[Cell]:
    """Order all cells so that a drift of the machine meets all variants alike.

    Each repeat runs all variants on a task before the next; every other repeat in reverse. Raises
    ConfigError for fewer than one repeat, and for names that come twice.
    """
    if repeats < 1:
        raise ConfigError("repeats", repeats, "at least 1")
    for kind, names in (("variants", variants), ("tasks", tasks)):
        if len(set(names)) < len(names):
            raise ConfigError(kind, list(names), "different from one another")
    return [
        Cell(variant, task, repeat)
        for repeat in range(repeats)
        for task in tasks
        for variant in (variants[::-1] if repeat % 2 else variants)
    ]


def _begins_only(text: bytes) -> bool:
    """Return True for nothing, or what a kill left of our first line."""
    return b"\n" not in text and BEGINNING[: len(text)] == text[: len(BEGINNING)]


class Results:
    """Measurements in a file of JSON lines, or in memory without a ``path``.

    The first line holds the ``settings`` that all of them share, and their provenance; further
    provenance stands before the measurements of each later run. Opening a file continues it; a line
    that a kill cut off is dropped. Raises PpsdError for a file of other settings, or one that
    cannot be read or written.
    """

    def __init__(
        self, path: Path | None, settings: dict[str, Any], provenance: dict[str, Any]
    ) -> None:
        self.path = path
        self.measurements: dict[Cell, Measurement] = {}
        self.provenance: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read
        self._continuing: dict[str, Any] | None = None  # provenance, while nothing new is measured
        text = self._read()
        if _begins_only(text):
            self.provenance.append(provenance)
            self._write({"settings": self.settings, "provenance": provenance}, "w")
            return
        self._continuing = provenance
        self._load(text[: text.rfind(b"\n") + 1])
        self._cut_off_torn_line(text)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self.measurements

    def __len__(self) -> int:
        return len(self.measurements)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement, on disk before this returns."""
        if self._continuing is not None:
            self.provenance.append(self._continuing)
            self._write({"provenance": self._continuing})
            self._continuing = None
        self.measurements[measurement.cell] = measurement
        self._write(asdict(measurement))

    def get(self, cell: Cell) -> Measurement:
        """Return the measurement of a cell."""
        return self.measurements[cell]

    def only(self, keep: Callable[[Measurement], bool]) -> Results:
        """Return the measurements that ``keep`` says yes to, in memory."""
        kept = Results(None, self.settings, {})
        kept.measurements = {cell: m for cell, m in self.measurements.items() if keep(m)}
        kept.provenance = self.provenance
        return kept

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes() if self.path is not None and self.path.exists() else b""
        except OSError as error:
            raise PpsdError(
                f"cannot read measurements from {self.path}: {cause_of(error)}"
            ) from error

    def _load(self, text: bytes) -> None:
        try:
            head, *lines = [json.loads(line) for line in text.splitlines()]
            before = dict(head["settings"])
            for name in sorted(before.keys() | self.settings.keys()):
                if before.get(name) != self.settings.get(name):
                    raise PpsdError(f"{self.path} holds measurements of other settings ({name})")
            self.provenance.append(head["provenance"])
            for line in lines:
                self._take(line)
        except (ValueError, TypeError, KeyError) as error:
            raise PpsdError(f"{self.path} is no file of measurements: {error!r}") from error

    def _take(self, line: dict[str, Any]) -> None:
        if set(line) == {"provenance"}:
            self.provenance.append(line["provenance"])
            return
        measurement = Measurement(**line)
        self.measurements[measurement.cell] = measurement

    def _cut_off_torn_line(self, text: bytes) -> None:
        if self.path is None or text.endswith(b"\n"):
            return
        try:
            os.truncate(self.path, text.rfind(b"\n") + 1)
        except OSError as error:
            raise PpsdError(
                f"cannot write measurements to {self.path}: {cause_of(error)}"
            ) from error

    def _write(self, record: dict[str, Any], mode: str = "a") -> None:
        if self.path is None:
            return
        try:
            with self.path.open(mode) as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PpsdError(
                f"cannot write measurements to {self.path}: {cause_of(error)}"
            ) from error


def run(
    cells: Sequence[Cell],
    results: Results,
    measure: Callable[[Cell], Measurement],
    done: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Measure the cells that ``results`` does not hold yet; ``done`` is called for every cell."""
    for cell in cells:
        if cell not in results:
            results.add(measure(cell))
        done(cell)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``count`` values."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return the median and quartiles (inclusive) of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def pairs(
    results: Results, variant: str, baseline: str
) -> Iterator[tuple[Measurement, Measurement]]:
    """Yield each measurement of ``variant`` with the baseline's of the same task and repeat."""
    for cell, measurement in results.measurements.items():
        partner = cell._replace(variant=baseline)
        if cell.variant == variant and partner in results:
            yield measurement, results.get(partner)


def total(results: Results, detail: str) -> int:
    """Sum one of the ``details`` over all measurements."""
    return sum(measurement.details[detail] for measurement in results.measurements.values())
