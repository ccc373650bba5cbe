"""A profile: what a model's parts and a transport cost, with spread and provenance, as floats.

``ppsd profile`` measures one (engine/profiler.py); ``estimate`` makes one of sizes and a memory
bandwidth where nothing was measured. The planner reads either. No torch.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

from ppsd.errors import ConfigError, cause_of
from ppsd.model.sidecar import cache_root, own_bytes
from ppsd.plan.model import Link
from ppsd.plan.sizes import Sizes

FORMAT = "ppsd-profile-3"
COUNTS = "parameter counts"  # the source of times that are only good for ratios
NOMINAL_BANDWIDTH = 1e10  # bytes a second; only ratios of such times mean anything

Measured = TypeVar("Measured", "LayerTime", "RowsTime", "HeadTime")


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of ``repeats`` measurements; 0 repeats: computed, not measured."""

    median: float
    low: float
    high: float
    repeats: int

    def __post_init__(self) -> None:
        values = (self.low, self.median, self.high)
        numbers = all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values)
        if not numbers or not self.low <= self.median <= self.high:
            raise ConfigError("timing", values, "finite, at least 0, and quartiles in order")

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Summarise measurements."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, len(values))

    @classmethod
    def computed(cls, value: float) -> Timing:
        """Return a figure without spread."""
        return cls(value, value, value, 0)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one decoder layer for ``rows`` rows behind ``context`` cached positions."""

    context: int
    rows: int
    time: Timing


@dataclass(frozen=True)
class RowsTime:
    """Seconds of final norm, LM head and sampling for ``rows`` rows."""

    rows: int
    time: Timing


@dataclass(frozen=True)
class HeadTime:
    """Seconds of one draft by a head of ``layers`` layers (0: kind norm) over a vocabulary.

    A transformer head without feedback, its MLPs as large as the model's.
    """

    layers: int
    draft_vocab: int
    time: Timing


@dataclass(frozen=True)
class Profile:
    """All times in seconds, on one machine, for one model, dtype and number of threads.

    ``entry``: what rank 0 spends on a token beside layers and messages.
    ``overhead``: what a stage spends between two blocks when the second is there already, on
    sending, receiving, laying out. ``latency`` is what a message takes longer than that when it is
    waited for, ``bandwidth`` in bytes a second.
    ``contention`` is a ratio: how much longer a layer takes while another worker works.
    ``source`` says where the figures come from, ``measured`` whether they are measurements,
    ``kernels`` whose operations they time (model/kernels.py), and ``codes`` which weights of the
    file were read in its own codes: none if empty (``weights.codes_digest``).
    """

    model: str
    fingerprint: str
    sizes: Sizes
    dtype: str
    itemsize: int
    threads: int
    transport: str
    source: str
    measured: bool
    layer: tuple[LayerTime, ...]
    lm_head: tuple[RowsTime, ...]
    heads: tuple[HeadTime, ...]
    entry: Timing
    latency: Timing
    bandwidth: float
    overhead: Timing
    contention: Timing
    kernels: str = ""
    codes: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> Link:
        """Return the link of one hop."""
        return Link(self.latency.median, self.bandwidth)

    @property
    def jitter(self) -> float:
        """Return σ of a log-normal factor whose quartiles are those of a pass of one row."""
        spreads = [math.log(t.time.high / t.time.low) for t in self.layer if t.rows == 1]
        return float(np.median(spreads)) / 2 / NormalDist().inv_cdf(0.75)

    def layer_time(self, context: int, rows: int = 1) -> float:
        """Return a layer's seconds, interpolated; beyond what was measured the last value holds."""
        single = {t.context: t.time.median for t in self.layer if t.rows == 1}
        return _interpolate(single, context) * self.growth(rows)

    def growth(self, rows: int) -> float:
        """Return how many times as long as for one row a layer takes for ``rows``.

        Beyond what was timed it goes on as between the last two; nothing timed means free rows.
        """
        contexts = {t.context for t in self.layer if t.rows > 1}
        points = {t.rows: t.time.median for t in self.layer if t.context in contexts}
        return _grown(points, rows) / points[1] if points else 1.0

    def lm_head_time(self, rows: int = 1) -> float:
        """Return the seconds of final norm, LM head and sampling.

        Beyond what was timed they go on as in ``growth``.
        """
        return _grown({t.rows: t.time.median for t in self.lm_head}, rows)

    def head_time(self, layers: float, draft_vocab: int | None) -> float:
        """Return the seconds of a draft by such a head: a norm head's, and so much for every layer.

        ``layers`` are those of the model that its weights amount to (Sizes.head_layers).
        """
        scored = self.sizes.vocabulary if draft_vocab is None else draft_vocab
        norm = {t.draft_vocab: t.time.median for t in self.heads if not t.layers}
        bare = _extrapolate(norm, scored)
        extra = [
            (t.time.median - norm[t.draft_vocab]) / self.sizes.head_layers(t.layers)
            for t in self.heads
            if t.layers and t.draft_vocab in norm
        ]
        return max(0.0, bare) + layers * max(0.0, float(np.median(extra)))

    @property
    def age(self) -> str:
        """Return how long ago it was measured, in words."""
        try:
            taken = datetime.fromisoformat(self.provenance["date"])
            days = (datetime.now(UTC) - taken).days
        except (KeyError, TypeError, ValueError):  # by an earlier version, or not by us
            return "of unknown age"
        return f"{days} days old" if days > 1 else "a day old" if days == 1 else "taken today"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary from which ``from_json`` restores an equal object."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Profile:
        """Restore what ``to_json`` was called on; raises ValueError, KeyError or TypeError."""
        values = dict(record)
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        for name in ("entry", "latency", "overhead", "contention"):
            values[name] = Timing(**values[name])
        for name, kind in (("layer", LayerTime), ("lm_head", RowsTime), ("heads", HeadTime)):
            values[name] = _timed(kind, values[name])
        profile = cls(**values | {"sizes": Sizes(**values["sizes"])})
        needed = (
            profile.bandwidth,
            profile.layer_time(0) / profile.growth(1),
            profile.lm_head_time(),
            profile.head_time(1, None),
        )
        if not all(0 < value < math.inf for value in needed):
            raise ValueError("it lacks the time of a layer, the LM head or an exit head")
        return profile

    def save(self, path: Path) -> None:
        """Write the profile; no reader ever sees half of it. Raises ConfigError where it cannot."""
        with _draft_of(path) as draft:
            with draft.open("w") as file:
                json.dump(self.to_json(), file, indent=1, allow_nan=False)
                file.write("\n")
            draft.replace(path)


def check_writable(path: Path) -> None:
    """Raise ConfigError unless a profile can be saved at ``path``, which measuring it may follow.

    Makes the directory.
    """
    with _draft_of(path):
        pass


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """Give a new file beside ``path``, gone at the end; ConfigError where none can be written."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError("out", str(path), "a file, not a directory or a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise ConfigError("out", str(path), allowed) from error


def _timed(kind: type[Measured], records: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    if not records:
        raise ValueError(f"it holds no {kind.__name__}")
    return tuple(kind(**dict(record) | {"time": Timing(**record["time"])}) for record in records)


def load_profile(path: Path, *, own: bool = False) -> Profile:
    """Read a profile; ConfigError names the file and what is wrong with it.

    With ``own`` one that another user can have written is wrong, too.
    """
    try:
        data = own_bytes(path) if own else path.read_bytes()
        return Profile.from_json(json.loads(data))
    except OSError as error:
        reason = cause_of(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    allowed = f"a file that `ppsd profile` wrote ({reason})"
    raise ConfigError("profile", str(path), allowed)


def profile_root() -> Path:
    """Return where the profiles of this machine are kept."""
    return cache_root() / "profiles"


def profile_path(fingerprint: str, dtype: str, threads: int, codes: str = "") -> Path:
    """Return where the profile of a model on this machine is kept (see ``cache_root``)."""
    weights = f"{dtype}-{codes}" if codes else dtype
    return profile_root() / f"{fingerprint[:16]}-{weights}-{threads}-threads.json"


def estimate(
    sizes: Sizes,
    itemsize: int = 2,
    bandwidth: float = NOMINAL_BANDWIDTH,
    link: Link | None = None,
    *,
    model: str = "",
    fingerprint: str = "",
    dtype: str = "bfloat16",
    source: str = COUNTS,
) -> Profile:
    """Estimate times as bytes over memory bandwidth: decoding a token reads every weight once.

    A lower bound that batch-1 decoding approaches: caches, kernel launches and activations are
    left out, and further rows of a block are free.
    """

    def seconds(numbers: int) -> Timing:
        return Timing.computed(numbers * itemsize / bandwidth)

    free, link = Timing.computed(0.0), link or Link()
    vocabulary = sizes.vocabulary
    heads = ((0, 0), (0, vocabulary), (1, vocabulary))
    return Profile(
        model=model,
        fingerprint=fingerprint,
        sizes=sizes,
        dtype=dtype,
        itemsize=itemsize,
        threads=1,
        transport="assumed",
        source=source,
        measured=False,
        layer=(LayerTime(0, 1, seconds(sizes.layer)),),
        lm_head=(RowsTime(1, seconds(sizes.lm_head)),),
        heads=tuple(
            HeadTime(n, v, seconds(sizes.exit_head(sizes.head_layers(n), v))) for n, v in heads
        ),
        entry=free,
        latency=Timing.computed(link.latency),
        bandwidth=link.bandwidth,
        overhead=free,
        contention=Timing.computed(1.0),
    )


def _grown(points: Mapping[int, float], rows: int) -> float:
    """Interpolate between times of numbers of rows, and go on as between the last two."""
    *before, last = sorted(points)
    slope = max(0.0, points[last] - points[before[-1]]) / (last - before[-1]) if before else 0.0
    return _interpolate(points, rows) + max(0, rows - last) * slope


def _interpolate(points: Mapping[int, float], at: float) -> float:
    places = sorted(points)
    return float(np.interp(at, places, [points[place] for place in places]))


def _extrapolate(points: Mapping[int, float], at: int) -> float:
    """Return a straight line through the outermost points."""
    low, high = min(points), max(points)
    if low == high:
        return points[low]
    return points[low] + (points[high] - points[low]) * (at - low) / (high - low)
