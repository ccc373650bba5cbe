"""Where exit heads are found: those shipped with the package, and the user's own.

Imported by engine/ and cli/. Loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ppsd.errors import HeadError
from ppsd.model.exit_head import CONFIG_FILE, WEIGHTS_FILE, HeadConfig, read_head_config
from ppsd.model.sidecar import cache_root

SHIPPED = Path(__file__).parents[1] / "heads"


@dataclass(frozen=True)
class FoundHead:
    """A head directory; ``config`` is None when it is damaged, and ``problem`` says how."""

    path: Path
    shipped: bool
    config: HeadConfig | None
    problem: str = ""

    @property
    def alpha(self) -> float | None:
        """See ``measured_alpha``."""
        return None if self.config is None else measured_alpha(self.config)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.iterdir() if f.is_file())


def measured_alpha(config: HeadConfig, *, lookup: bool = True) -> float | None:
    """Acceptance as recorded by ``ppsd acceptance``, else agreement in training; None for neither.

    Training holds out text like its own; what a prompt file measured says more of others. Without
    prompt ``lookup`` training says nothing.
    """
    for name in ("acceptance", "validation") if lookup else ("acceptance_alone",):
        with suppress(KeyError, TypeError, ValueError):  # not measured, or not by us
            return float(config.metrics[name]["alpha"])
    return None


def local_root() -> Path:
    """Return $PPSD_HEADS, else ``heads`` in ppsd's cache directory (see ``cache_root``)."""
    own = os.environ.get("PPSD_HEADS")
    return Path(own) if own else cache_root() / "heads"


def find_heads() -> list[FoundHead]:
    """All head directories: shipped ones first, each group by path."""
    found = _below(SHIPPED, shipped=True)
    with suppress(OSError):  # there is no home, or it is not ours to look into
        found += _below(local_root(), shipped=False)
    return found


def _below(root: Path, *, shipped: bool) -> list[FoundHead]:
    """Heads anywhere below ``root``, without those a run is just writing."""
    places = sorted(file.parent for file in root.rglob(CONFIG_FILE))
    return [_describe(p, shipped) for p in places if not p.name.startswith(".")]


def _describe(path: Path, shipped: bool) -> FoundHead:
    try:
        if not shipped:
            _check_owner(path)
        config = read_head_config(path)
        if not (path / WEIGHTS_FILE).is_file():
            raise HeadError(f"{path} has no {WEIGHTS_FILE}")
    except HeadError as error:
        return FoundHead(path, shipped, None, str(error))
    return FoundHead(path, shipped, config)


def _check_owner(path: Path) -> None:
    """Raise HeadError for a head of another user: it is found, not named, so not trusted."""
    for file in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
        if file.exists() and not {file.stat().st_uid, file.lstat().st_uid} <= {0, os.geteuid()}:
            raise HeadError(f"{file} is another user's; --head {path} uses it all the same")


def suitable(
    heads: Iterable[FoundHead], fingerprint: str, exit_layer: int | None
) -> list[FoundHead]:
    """Trained heads for a model, and for one exit layer unless that is None; the best α first.

    Heads whose α nobody measured come last; among equals the shipped one wins.
    """
    fitting = [
        h
        for h in heads
        if h.config is not None
        and h.config.trained
        and h.config.fingerprint == fingerprint
        and exit_layer in (None, h.config.exit_layer)
    ]
    return sorted(fitting, key=lambda h: -1.0 if h.alpha is None else h.alpha, reverse=True)
