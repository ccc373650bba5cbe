"""Keep a run's checkpoints and metrics through a kill, a full disk and a restart.

Nothing is ever overwritten in place: a file is whole, or is the one before.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ppsd.errors import PpsdError, cause_of
from ppsd.model.head_files import HeadConfig, save_head

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
FINISHED = "finished.json"
LOCK = "lock"


@dataclass(frozen=True)
class Checkpoint:
    """The state of training that changes; the data position is a function of ``step``."""

    step: int
    tokens: int
    tensors: Mapping[str, torch.Tensor]
    best: Mapping[str, Any]


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Make a run's directory, and be the only run in it; raises PpsdError."""
    _make(path)
    try:
        lock = open(path / LOCK, "w")  # noqa: SIM115 - closed below, with the lock
    except OSError as error:
        raise PpsdError(f"cannot write {path / LOCK}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PpsdError(f"another run is at work in {path}; give another --out") from error
        yield


class RunDirectory:
    """Files of one run, whose ``settings`` decide whether it may be continued."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        _make(path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; raises PpsdError with the old one untouched."""
        state = {name: getattr(checkpoint, name) for name in ("step", "tokens", "best")}
        state["settings"] = self._settings
        tensors = {name: t.detach().cpu() for name, t in checkpoint.tensors.items()}
        write_whole(self.path / CHECKPOINT, save(tensors, {"state": json.dumps(state)}))

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint, None if there is none; raises PpsdError for another run's."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                settings = dict(state["settings"])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise PpsdError(
                f"{path} is not a checkpoint that can be read: {cause_of(error)}"
            ) from error
        self._check_same(settings)
        return Checkpoint(state["step"], state["tokens"], tensors, state.get("best", {}))

    def finish(self) -> None:
        """Note that the heads are written, and remove the checkpoint, by far the largest file."""
        write_whole(self.path / FINISHED, (json.dumps(self._settings, indent=1) + "\n").encode())
        with suppress(OSError):  # it is only large
            (self.path / CHECKPOINT).unlink(missing_ok=True)

    def finished(self) -> bool:
        """Tell if this run was finished here; raises PpsdError for another run's end."""
        path = self.path / FINISHED
        if not path.exists():
            return False
        try:
            settings = json.loads(path.read_text())
            self._check_same(settings)
        except (OSError, ValueError, AttributeError) as error:
            raise PpsdError(f"{path} cannot be read: {cause_of(error)}") from error
        return True

    def _check_same(self, other: Mapping[str, Any]) -> None:
        names = sorted(other.keys() | self._settings.keys())
        changed = [n for n in names if other.get(n) != self._settings.get(n)]
        if changed:
            name = changed[0]
            raise PpsdError(
                f"{self.path} holds another run: {name} was {other.get(name)!r} and is now "
                f"{self._settings.get(name)!r}; give another --out, or the same settings to resume"
            )

    @property
    def begun(self) -> bool:
        """Return True if training has been saved here, or is finished."""
        return any((self.path / name).exists() for name in (CHECKPOINT, FINISHED))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        append_line(self.path / METRICS, record)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all metrics so far, without an unfinished last line."""
        path, lines = self.path / METRICS, read_lines(self.path / METRICS)
        for number, record in enumerate(lines, 1):
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise PpsdError(f"{path}, line {number}: not a record of a step; remove the line")
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Forget what will be done again: later steps, and validations from ``step`` on."""
        kept = [r for r in self.metrics() if r["step"] < step + ("loss" in r)]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_whole(self.path / METRICS, text.encode())

    def write_head(
        self,
        name: str,
        config: HeadConfig,
        weights: dict[str, torch.Tensor],
        prompts: Sequence[str],
    ) -> Path:
        """Write a head directory (see ``save_head``) as a whole and return its path."""
        place, draft = self.path / name, self.path / f".{name}.new"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            save_head(draft, config, weights, prompts)
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
        except (OSError, SafetensorError) as error:
            raise PpsdError(
                f"cannot write {place}: {cause_of(error)}; the checkpoint holds the trained "
                "weights, so the same command will finish once there is room"
            ) from error
        return place


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PpsdError(f"cannot create {directory}: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old or the new one; raises PpsdError."""
    draft = path.with_name(path.name + ".new")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            draft.unlink(missing_ok=True)
        kept = "; the one before is untouched" if path.exists() else ""
        raise PpsdError(f"cannot write {path}: {error.strerror}{kept}") from error


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a JSON line and hand it to the system at once; raises PpsdError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise PpsdError(
            f"cannot write {path}: {error.strerror}; nothing written so far is lost, the same "
            "command will go on from there"
        ) from error


def continue_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file to be appended to; a last line that a kill cut short is removed from it."""
    rows = read_lines(path)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that grows; nothing if it is absent, and no torn last line."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows += [json.loads(line)] if line else []
        except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError, too
            raise PpsdError(f"{path}, line {number}: not JSON ({error})") from error
    return rows
