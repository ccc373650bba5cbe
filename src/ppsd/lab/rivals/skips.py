"""KNN-SSD's skip sets: which sub-layers a draft leaves out, by the prompt's nearest neighbour.

arXiv 2505.16162. A sub-layer is a layer's attention (number 2·layer) or its MLP (2·layer + 1).
How the sets are found is in search.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppsd.errors import PpsdError
from ppsd.model.sidecar import cache_root, own_bytes

MOST_DRAFTS = 12
LEAST_CHANCE = 0.8  # a draft less probable is a round's last
SHIPPED = Path(__file__).parent
ATTENTION, MLP = 0, 1

Half = tuple[int, int]  # a layer, and which half of it
Rows = np.ndarray[Any, np.dtype[np.float32]]


def odd_layers(layers: int) -> tuple[int, ...]:
    """Return the skip set for an unknown task: both halves of every odd layer."""
    return tuple(2 * i + half for i in range(1, layers, 2) for half in (ATTENTION, MLP))


def kept_halves(skip: Iterable[int], first: int, last: int) -> list[Half]:
    """Return what is left of layers [first, last), in order."""
    skipped = set(skip)
    every = ((layer, half) for layer in range(first, last) for half in (ATTENTION, MLP))
    return [(layer, half) for layer, half in every if 2 * layer + half not in skipped]


def together(halves: Iterable[Half]) -> Iterator[tuple[int, int, int | None]]:
    """Yield (first, last, None) for whole layers in a row, (layer, layer + 1, half) for others."""
    kept = list(halves)
    at = 0
    while at < len(kept):
        first = last = kept[at][0]
        while kept[at : at + 2] == [(last, ATTENTION), (last, MLP)]:
            at, last = at + 2, last + 1
        if last > first:
            yield first, last, None
        else:
            yield first, first + 1, kept[at][1]
            at += 1


@dataclass(frozen=True)
class SkipSets:
    """What a search found for a model: skip sets by task, and the centres of its prompts.

    ``centres`` are unit vectors [tasks × centres, C], ``owners`` the task of each. ``budget`` says
    what was spent on it.
    """

    fingerprint: str
    skips: Mapping[str, tuple[int, ...]]
    owners: Sequence[str]
    centres: Rows
    budget: Mapping[str, Any]

    def nearest(self, row: Rows) -> tuple[str, tuple[int, ...]]:
        """Return the task whose centre is nearest to a prompt's mean row by cosine, and its set."""
        task = self.owners[int((self.centres @ row).argmax())]
        return task, self.skips[task]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the content of a file; centres are half floats in base 64."""
        record = asdict(self)
        numbers = self.centres.astype("<f2").tobytes()
        return record | {"centres": base64.b64encode(numbers).decode()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SkipSets:
        """Read what ``to_json`` wrote."""
        numbers = np.frombuffer(base64.b64decode(record["centres"]), "<f2").astype(np.float32)
        owners = list(record["owners"])
        skips = {str(task): tuple(skip) for task, skip in record["skips"].items()}
        centres = numbers.reshape(len(owners), -1)
        return cls(str(record["fingerprint"]), skips, owners, centres, record["budget"])


def place_of(fingerprint: str) -> Path:
    """Return where this user's own search for a model is kept."""
    return cache_root() / f"knn-ssd-{fingerprint[:16]}.json"


def find_skips(fingerprint: str) -> SkipSets | None:
    """Return this user's search for a model, else a shipped one, else None."""
    for path, read in ((place_of(fingerprint), own_bytes), *_shipped()):
        try:
            found = SkipSets.from_json(json.loads(read(path)))
        except OSError:  # there is none here
            continue
        except (ValueError, LookupError, TypeError) as error:
            raise PpsdError(f"{path} is no result of knn-ssd-search ({error!r})") from error
        if found.fingerprint == fingerprint:
            return found
    return None


def _shipped() -> list[tuple[Path, Any]]:
    return [(path, Path.read_bytes) for path in sorted(SHIPPED.glob("*.json"))]
