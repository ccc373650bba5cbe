"""List the models that can be used here: the embedded one, local ones, the hub's cache.

Reads configurations and headers, never weights, and never the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ppsd.errors import PpsdError
from ppsd.model.source import ModelFiles, describe, embedded_file

DEPTH = 2  # levels of directories that are searched for local models
LATER_PART = re.compile(r"-(?!00001-of-)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class FoundModel:
    """A model on disk; ``name`` is what --model takes, None for the default.

    ``size`` counts the bytes of its weight files. ``problem`` says why it cannot be used, or is
    empty; then ``architecture`` and ``layers`` are known.
    """

    name: str | None
    title: str
    source: str
    path: Path
    size: int
    architecture: str = ""
    layers: int = 0
    problem: str = ""


def find_models(directory: Path) -> Iterator[FoundModel]:
    """Yield the embedded model, those in and below ``directory``, and those of the hub's cache."""
    if embedded := embedded_file():
        yield _describe(None, embedded, "embedded")
    for path in _places(directory, DEPTH):
        yield _describe(str(path), path, "local")
    yield from _hub()


def hub_cache() -> Path:
    """Return where models of the hub are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _places(directory: Path, depth: int) -> Iterator[Path]:
    """Yield model directories and .gguf files in and below a directory, in order of their names."""
    entries: list[Path] = []
    with suppress(OSError):  # not readable by this user
        entries = sorted(directory.iterdir())
    if _is_model(entries):
        yield directory
    for entry in entries:
        with suppress(OSError):  # just gone, or not readable by this user
            if entry.suffix == ".gguf" and entry.is_file() and not LATER_PART.search(entry.name):
                yield entry
            elif depth and entry.is_dir() and not entry.name.startswith("."):
                yield from _places(entry, depth - 1)


def _is_model(entries: list[Path]) -> bool:
    names = {entry.name for entry in entries}
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def _hub() -> Iterator[FoundModel]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir(hub_cache()).repos
    except (CacheNotFound, OSError, ValueError):  # nothing was ever downloaded, or it is no cache
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
        for path in _places(newest.snapshot_path, 0):
            whole = path == newest.snapshot_path
            yield _describe(repo.repo_id if whole else str(path), path, "hub cache")


def _describe(name: str | None, path: Path, source: str) -> FoundModel:
    is_gguf = path.suffix == ".gguf" and path.is_file()
    title = name or path.stem
    try:
        size = _size(path)
        spec = describe(ModelFiles(title, path, is_gguf))
    except (PpsdError, OSError) as error:
        return FoundModel(name, title, source, path, 0, problem=str(error))
    return FoundModel(name, title, source, path, size, spec.architecture, spec.num_layers)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
