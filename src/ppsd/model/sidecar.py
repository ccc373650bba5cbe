"""What is slow to derive from a model file is kept in the user's cache directory.

Used by model/ and, for the place alone, by cost/. Losing, damaging or not being able to write the
cache costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

FORMAT = 2
DIGEST = "sha256"

T = TypeVar("T")


def cache_root() -> Path:
    """Return $PPSD_CACHE, else ppsd under $XDG_CACHE_HOME, else ~/.cache/ppsd."""
    if own := os.environ.get("PPSD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ppsd"


def cached(
    path: Path,
    kind: str,
    build: Callable[[], T],
    write: Callable[[T, Path], object],
    read: Callable[[Path], T],
) -> T:
    """Return what ``build`` derives from the file ``path``, from the cache where possible.

    ``write`` stores a value in an empty directory and ``read`` restores it. The entry belongs to
    the file's path, size and modification time and to the transformers version.
    """
    with suppress(Exception):  # absent, damaged or unreadable: building anew repairs it all
        place = _place(path, kind)
        _verify(place)
        return read(place)
    value = build()
    with suppress(OSError):  # a cache that cannot be written only makes the next start slower
        _store(_place(path, kind), value, write)
    return value


def _place(path: Path, kind: str) -> Path:
    status = path.stat()
    identity = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    key = json.dumps([FORMAT, version("transformers"), *identity])
    return cache_root() / f"{hashlib.sha256(key.encode()).hexdigest()}-{kind}"


def _content_digest(place: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()):
        if file.name != DIGEST:
            data = file.read_bytes()
            digest.update(f"{file.name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _verify(place: Path) -> None:
    if (place / DIGEST).read_text() != _content_digest(place):
        raise ValueError(f"{place} is damaged")


def _store(place: Path, value: T, write: Callable[[T, Path], object]) -> None:
    """Write beside the final place and rename, so no reader ever sees half an entry."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        write(value, draft)
        (draft / DIGEST).write_text(_content_digest(draft))
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
