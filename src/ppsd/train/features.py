"""Keep rows of the frozen model on disk, so that later epochs need not compute them.

A directory holds one file of bfloat16 rows for each kept layer, and an index: a header line, then a
line for each example that is whole in all files. Files only grow; what a kill left behind the last
indexed row is written over. Several runs may share a directory: who writes holds its lock, and
first takes note of what others wrote.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ppsd import checks
from ppsd.errors import PpsdError, cause_of
from ppsd.model.stage import Stage
from ppsd.train.batched import Features, teacher_forward
from ppsd.train.checkpoint import append_line, continue_lines
from ppsd.train.data import Batch, Example, make_batch, plan_epoch

INDEX = "index.jsonl"
STORED = torch.bfloat16
LOCK = "lock"
FILL_TOKENS = 4096  # padded tokens that run at once

FeatureSource = Callable[[Batch], Features]


def live_features(model: Stage, exits: Collection[int]) -> FeatureSource:
    """Return a source of rows that are computed when they are needed."""
    return lambda batch: teacher_forward(model, batch.tokens, exits)


class FeatureStore:
    """Rows after each of ``layers`` and after the last one, C numbers each; a FeatureSource.

    Disk: 2·C bytes a token for each kept layer and the last; memory: a batch. Rows are rounded to
    bfloat16, which inference works in. ``compute`` says what made them. Raises PpsdError when
    ``path`` holds rows of another model or lacks a layer.
    """

    def __init__(self, path: Path, model: Stage, layers: Sequence[int], compute: str) -> None:
        self._path = path
        self._model = model
        self._wanted = tuple(layers)
        self._layers = tuple(sorted(layers))
        self._header = {"width": model.spec.hidden_size, "compute": compute}
        self._places: dict[str, int] = {}  # first row of an example
        self._rows = 0
        self._size = -1  # bytes of the index that are known
        self._maps: dict[int, torch.Tensor] = {}
        with self._locked():
            pass

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs from writing, and know what they have written until now."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            with open(self._path / LOCK, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (self._path / INDEX).exists() or self._known != self._size:
                    self._open()
                yield
                self._size = self._known
        except OSError as error:
            raise PpsdError(f"cannot use {self._path} for --features: {cause_of(error)}") from error

    @property
    def _known(self) -> int:
        return (self._path / INDEX).stat().st_size

    def _open(self) -> None:
        self._places.clear()
        self._rows = 0
        try:
            header, *lines = continue_lines(self._path / INDEX) or [self._create()]
            kept = tuple(header.pop("layers"))
            if header != self._header or not set(self._layers) <= set(kept):
                raise PpsdError(
                    f"{self._path} holds rows of layers {kept} computed as {header}, not of "
                    f"{self._layers} as {self._header}; give another --features"
                )
            for line in lines:
                rows = checks.integer("rows", line["rows"], 1)
                if line.get("first", self._rows) != self._rows:  # earlier versions tell nothing
                    raise ValueError(f"a line is missing before example {line['example']}")
                self._note(line["example"], rows)
        except (ValueError, KeyError, TypeError) as error:
            raise PpsdError(f"cannot use {self._path} for --features: {error}") from error
        self._layers = kept
        self._size = self._known
        needed = self._rows * self._model.spec.hidden_size * STORED.itemsize
        for layer in self.layers:
            if needed and (
                not self._file(layer).exists() or self._file(layer).stat().st_size < needed
            ):
                raise PpsdError(f"{self._file(layer)} lacks rows that {INDEX} names; remove both")

    def _create(self) -> dict[str, Any]:
        header = {"layers": list(self._layers), **self._header}
        append_line(self._path / INDEX, header)
        return header

    def _note(self, name: str, rows: int) -> None:
        self._places[name] = self._rows
        self._rows += rows

    def fill(self, examples: Sequence[Example], report: Callable[[int, int], None]) -> None:
        """Compute what is missing; ``report(tokens done, tokens in all)`` of that."""
        missing = list(
            {name: e for e in examples if (name := _name(e)) not in self._places}.values()
        )
        lengths = [len(e.tokens) for e in missing]
        done, total = 0, sum(lengths)
        for indices in plan_epoch(lengths, FILL_TOKENS, 0, 0):
            batch = make_batch([missing[i] for i in indices], self._model.plan.device)
            self._append(batch)
            done += batch.size
            report(done, total)

    def _append(self, batch: Batch) -> None:
        features = teacher_forward(self._model, batch.tokens, self._layers)
        by_layer = features.exits | {self._model.spec.num_layers: features.last}
        size, length = batch.tokens.shape
        for i, example in enumerate(batch.examples):
            rows = {
                k: x.view(size, length, -1)[i, : len(example.tokens)] for k, x in by_layer.items()
            }
            self.add(example, rows)

    def add(self, example: Example, rows: Mapping[int, torch.Tensor]) -> None:
        """Keep an example's rows [T, C] of each of ``layers``; what is kept already stays."""
        name, count = _name(example), len(example.tokens)
        with self._locked():
            if name in self._places:
                return
            for layer in self.layers:
                self._write(layer, rows[layer].to("cpu", STORED))
            line = {"example": name, "rows": count, "first": self._rows}
            append_line(self._path / INDEX, line)
            self._note(name, count)

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers whose rows are kept, counted from 1; the last is the model's."""
        return (*self._layers, self._model.spec.num_layers)

    def _write(self, layer: int, rows: torch.Tensor) -> None:
        content = rows.contiguous().view(torch.uint8).numpy().tobytes()
        offset = self._rows * rows.shape[1] * STORED.itemsize
        try:
            with open(self._file(layer), "r+b" if self._file(layer).exists() else "w+b") as file:
                while content:
                    written = os.pwrite(file.fileno(), content, offset)
                    content, offset = content[written:], offset + written
        except OSError as error:
            raise PpsdError(
                f"cannot write {self._file(layer)}: {error.strerror}; rows written so far are kept"
            ) from error

    def _file(self, layer: int) -> Path:
        return self._path / f"layer-{layer}.bf16"

    def __call__(self, batch: Batch) -> Features:
        """Return the rows of a batch, zero where it is padded."""
        last = self._model.spec.num_layers
        exits = {layer: self._read(layer, batch) for layer in self._wanted}
        return Features(exits, self._read(last, batch))

    def _read(self, layer: int, batch: Batch) -> torch.Tensor:
        plan, width = self._model.plan, self._model.spec.hidden_size
        padded = torch.zeros(*batch.tokens.shape, width, dtype=plan.dtype)
        stored = self._map(layer)
        for i, example in enumerate(batch.examples):
            first, length = self._places[_name(example)], len(example.tokens)
            padded[i, :length] = stored[first : first + length]
        return padded.flatten(0, 1).to(plan.device)

    def _map(self, layer: int) -> torch.Tensor:
        width = self._model.spec.hidden_size
        found = self._maps.get(layer)
        if found is None or len(found) < self._rows:
            size = self._rows * width
            found = torch.from_file(str(self._file(layer)), False, size, dtype=STORED)
            found = self._maps[layer] = found.view(-1, width)
        return found


def _name(example: Example) -> str:
    return hashlib.sha256(example.tokens.numpy().tobytes()).hexdigest()[:24]
