"""Keep what is slow to derive from a model file in the user's cache directory.

Losing, damaging or not being able to write the cache costs time only. As a cache may hold code, and
lie where others can write, only what this user alone can have written is read from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

DIGEST = "sha256"
DRAFT = "draft-"
ENTRY = re.compile(
    r"([0-9a-f]{16})-[0-9a-f]{16}-(.+)|[0-9a-f]{64}-.+|draft-.+"
)  # or as named before
KEPT_DAYS = 30  # without use
DAY_S = 86400.0

LOG = logging.getLogger(__name__)

T = TypeVar("T")


def cache_root() -> Path:
    """Return $PPSD_CACHE, else ppsd under $XDG_CACHE_HOME, else ~/.cache/ppsd.

    Raises FileNotFoundError for a user without a home.
    """
    if own := os.environ.get("PPSD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    told = "no home directory for a cache; set PPSD_CACHE"
    if not base and os.environ.get("HOME") == "":  # Path.home() would be the root directory
        raise FileNotFoundError(told)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ppsd"
    except RuntimeError as error:
        raise FileNotFoundError(told) from error


def cached(
    path: Path,
    kind: str,
    build: Callable[[], T],
    write: Callable[[T, Path], object],
    read: Callable[[Mapping[str, bytes]], T],
    parts: Sequence[Path] = (),
) -> T:
    """Return what ``build`` derives from the file ``path``, from the cache where possible.

    ``write`` stores a value in an empty directory and ``read`` restores it from the files that were
    there, by name. The entry belongs to the file's path, size and modification time, or to those
    of all its ``parts``, to the code that derives it, and to the versions of transformers and
    tokenizers.
    """
    place: Path | None = None
    try:
        place = _place(path, kind, parts or [path])
        return read(_entry(place))
    except FileNotFoundError:
        pass  # nothing is kept yet, or there is no home to keep it in
    except Exception as error:  # damaged or not ours: building anew repairs it if anything can
        if isinstance(error, PermissionError):
            _tell(f"not used: {error}")
    value = build()
    if place is not None:
        with suppress(OSError):  # a cache that cannot be written only makes the next start slower
            _store(place, value, write)
    return value


@cache  # a library is looked for twice, with a lock the second time
def _tell(notice: str) -> None:
    LOG.warning("%s", notice)


def own_bytes(path: Path) -> bytes:
    """Return the content of a file that this user alone can have written.

    Raises PermissionError for any other file, OSError for one that is absent or a link.
    """
    with _opened(path.parent, os.O_DIRECTORY) as parent:
        _check_directory(parent, path.parent)
        return _content(path.name, parent, path)


@contextmanager
def _opened(path: Path | str, flags: int, directory: int | None = None) -> Iterator[int]:
    """Open once: what is checked is what is read. A pipe in a file's place does not block."""
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_directory(descriptor: int, path: Path) -> None:
    """Refuse another user's directory; what lies in our own or root's is looked at by itself."""
    if os.fstat(descriptor).st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} is another user's directory")


def _check_own(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} is another user's, or theirs to write")


def _content(name: str, directory: int, path: Path) -> bytes:
    with _opened(name, os.O_NOFOLLOW, directory) as descriptor:
        _check_own(descriptor, path)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()


def _entry(place: Path) -> dict[str, bytes]:
    """Return the files of a cache entry; raises ValueError when they are not as they were."""
    with _opened(place.parent, os.O_DIRECTORY) as root:
        _check_directory(root, place.parent)
        with _opened(place.name, os.O_DIRECTORY | os.O_NOFOLLOW, root) as entry:
            _check_own(entry, place)
            names = os.listdir(entry)
            files = {name: _content(name, entry, place / name) for name in names}
            if files.pop(DIGEST).decode() != _digest(place, files):
                raise ValueError(f"{place} is damaged")
            if os.fstat(entry).st_mtime < time.time() - DAY_S:  # not each time: it is a write
                os.utime(entry)
            return files


def _place(path: Path, kind: str, parts: Sequence[Path]) -> Path:
    """Return where an entry lies: named by the file, then by its state, then by the kind."""
    file = [_maker(), version("transformers"), version("tokenizers"), str(path.resolve())]
    state = [(status.st_size, status.st_mtime_ns) for status in (part.stat() for part in parts)]
    keys = (hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in (file, state))
    return cache_root() / "-".join((*keys, kind))


@cache
def _maker() -> str:
    """Return a digest of the code that derives entries, so that none outlives a change of it."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _digest(place: Path, files: Mapping[str, bytes]) -> str:
    """Return a digest of an entry; of its name as well, so that one cannot stand for another."""
    digest = hashlib.sha256(place.name.encode())
    for name, data in sorted(files.items()):
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _store(place: Path, value: T, write: Callable[[T, Path], object]) -> None:
    """Write beside the final place and rename, so no reader ever sees half an entry."""
    root = place.parent
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(root, os.O_DIRECTORY) as directory:
        _check_directory(directory, root)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=root))  # with mode 0700
    try:
        write(value, draft)
        files = {file.name: file.read_bytes() for file in draft.iterdir()}
        (draft / DIGEST).write_text(_digest(place, files))
        for file in draft.iterdir():
            file.chmod(0o600)  # also where new files are the group's to write
        _remove(place)
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _prune(place)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _prune(place: Path) -> None:
    """Remove entries of earlier states of the same file, and those that nobody uses any more."""
    subject, _, kind = place.name.split("-", 2)
    unused = time.time() - KEPT_DAYS * DAY_S
    for entry in place.parent.iterdir():
        name = ENTRY.fullmatch(entry.name)
        if name is None or entry == place:
            continue
        if name.groups() == (subject, kind) or entry.lstat().st_mtime < unused:
            with suppress(OSError):  # another process may have been first
                _remove(entry)
