"""Find exit heads: those shipped with the package, and the user's own.

Loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ppsd.errors import HeadError, cause_of
from ppsd.model.head_files import CONFIG_FILE, WEIGHTS_FILE, HeadConfig, read_head_config
from ppsd.model.identity import Identity
from ppsd.model.sidecar import cache_root

SHIPPED = Path(__file__).parents[1] / "heads"


@dataclass(frozen=True)
class Rate:
    """A head's rate of right drafts, ``measured`` on a prompt file or else ``held out``.

    What training held out is text like its own: other text is often drafted worse.
    ``interval`` is the 95 % interval of ``alpha`` over prompts, None where none is known.
    """

    alpha: float
    measured: bool
    interval: tuple[float, float] | None = None

    @property
    def origin(self) -> str:
        """Return the mark that stands beside ``alpha`` wherever it is shown."""
        return "measured" if self.measured else "held out"

    @property
    def expected(self) -> tuple[float, str]:
        """Return the rate to plan with, and its mark: the low end of what was only held out."""
        if self.measured or self.interval is None:
            return self.alpha, self.origin
        return self.interval[0], f"low end of {self.alpha:.2f} held out"


@dataclass(frozen=True)
class FoundHead:
    """A head directory; ``config`` is None when it is damaged, and ``problem`` says how."""

    path: Path
    shipped: bool
    config: HeadConfig | None
    problem: str = ""

    @property
    def name(self) -> str:
        """Return what --head takes: short below the places that are searched, else the path."""
        for root in _roots():
            if self.path.is_relative_to(root):
                short = str(self.path.relative_to(root))
                return short if head_directory(short) == self.path else str(self.path)
        return str(self.path)

    @property
    def rate(self) -> Rate | None:
        return None if self.config is None else known_rate(self.config)

    @property
    def size(self) -> int:
        return sum(f.stat().st_size for f in self.path.iterdir() if f.is_file())


def known_rate(config: HeadConfig, *, lookup: bool = True) -> Rate | None:
    """Return what ``ppsd acceptance`` recorded, else agreement in training; None for neither.

    What is no rate counts as not measured. Without prompt ``lookup`` training says nothing.
    """
    for name in ("acceptance", "validation") if lookup else ("acceptance_alone",):
        # not measured, or not by us
        with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            figures = config.metrics[name]
            between = figures.get("interval")
            low, high = (None, None) if between is None else map(_rate, between)
            interval = None if low is None or high is None else (low, high)
            return Rate(_rate(figures["alpha"]), name != "validation", interval)
    return None


def _rate(value: Any) -> float:
    """Return a rate as a number; raises ValueError for one out of [0, 1]."""
    rate = float(value)
    if not 0 <= rate <= 1:
        raise ValueError(f"{rate} is no rate")
    return rate


def local_root() -> Path:
    """Return $PPSD_HEAD_DIR, else ``heads`` in ppsd's cache directory (see ``cache_root``)."""
    own = os.environ.get("PPSD_HEAD_DIR")
    return Path(own) if own else cache_root() / "heads"


def _roots() -> Iterator[Path]:
    yield SHIPPED
    with suppress(OSError):  # there is no home
        yield local_root()


def head_directory(name: str) -> Path:
    """Return a head's directory: ``name`` itself, or what is found by it as ``FoundHead.name``."""
    if not Path(name).is_dir():
        for root in _roots():
            if (root / name / CONFIG_FILE).is_file():
                return root / name
    return Path(name)


def find_heads() -> list[FoundHead]:
    """Return all head directories, shipped ones first, each group by path."""
    found = _below(SHIPPED, shipped=True)
    with suppress(OSError):  # there is no home, or it is not ours to look into
        found += _below(local_root(), shipped=False)
    return found


def find_head(name: str) -> tuple[Path, HeadConfig]:
    """Return the head of ``find_heads`` with this name; raises HeadError if it cannot be used."""
    found = next((head for head in find_heads() if head.name == name), None)
    if found is None:
        raise HeadError(f"head {name} is not on this host; `ppsd heads list` shows those that are")
    if found.config is None:
        raise HeadError(found.problem)
    return found.path, found.config


def _below(root: Path, *, shipped: bool) -> list[FoundHead]:
    """Yield heads anywhere below ``root``, without those that a run is just writing."""
    places = sorted(file.parent for file in root.rglob(CONFIG_FILE))
    return [_describe(p, shipped) for p in places if not p.name.startswith(".")]


def _describe(path: Path, shipped: bool) -> FoundHead:
    try:
        if not shipped:
            _check_owner(path)
        config = read_head_config(path)
        _check_weights(path / WEIGHTS_FILE)
    except HeadError as error:
        return FoundHead(path, shipped, None, str(error))
    return FoundHead(path, shipped, config)


def _check_weights(path: Path) -> None:
    """Raise HeadError for a file that is not there or not whole, as its first bytes tell."""
    if not path.is_file():
        raise HeadError(f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise HeadError(f"cannot read {path}: {cause_of(error)}") from error


def _check_owner(path: Path) -> None:
    """Raise HeadError for a head of another user: it is found, not named, so not trusted."""
    for file in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
        if file.exists() and not {file.stat().st_uid, file.lstat().st_uid} <= {0, os.geteuid()}:
            raise HeadError(f"{file} is another user's; --head {path} uses it all the same")


def suitable(
    heads: Iterable[FoundHead], identity: Identity, exit_layer: int | None
) -> list[FoundHead]:
    """Return trained heads for a model (and exit layer, unless None), the best α first.

    Heads of unknown α come last; among equals the shipped one wins.
    """
    fitting = [
        h
        for h in heads
        if h.config is not None
        and h.config.trained
        and not h.config.identity.difference(identity)
        and exit_layer in (None, h.config.exit_layer)
    ]
    return sorted(
        fitting, key=lambda h: -1.0 if h.rate is None else h.rate.expected[0], reverse=True
    )
