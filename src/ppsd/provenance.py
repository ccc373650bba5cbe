"""Where a figure comes from: command, commit, versions, machine. Goes beside every result."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ppsd.config import EngineConfig
from ppsd.errors import PpsdError
from ppsd.model import kernels

GIT_TIMEOUT_S = 5.0
PACKAGES = ("ppsd-llm", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")


def provenance(config: EngineConfig | None = None) -> dict[str, Any]:
    """Return everything needed to run the same again; JSON-ready."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        **machine(),
        "bfloat16_kernels": _bfloat16_kernels(config),
        "load_average": os.getloadavg()[0],
        "config": None if config is None else portable(config),
    }


def _program() -> list[str]:
    """Return what runs: a command of ours, or Python with a module or a script."""
    name = Path(sys.argv[0]).name
    if name in ("ppsd", "ppsd-lab"):
        return [name]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return ["python", name]
    module = spec.name.removesuffix(".__main__")
    return [module] if module == "ppsd" else ["python", "-m", module]


def machine() -> dict[str, Any]:
    """Return what times depend on beside the model: processor, cores and kernels."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "kernels": _kernels()}


def _bfloat16_kernels(config: EngineConfig | None) -> str | None:
    """Return the name of what computes bfloat16 here (see kernels.py); None if nothing does."""
    if config is not None and config.dtype not in ("auto", "bfloat16"):
        return None
    try:
        return kernels.name("bfloat16")
    except PpsdError:  # nothing was computed with what cannot be had
        return None


def portable(config: EngineConfig) -> dict[str, Any]:
    """Return the fields of a configuration; a head that ships without where ppsd is installed."""
    shipped, head = Path(__file__).parent / "heads", Path(config.head)
    if not head.is_relative_to(shipped):
        return asdict(config)
    return asdict(config) | {"head": f"shipped {head.relative_to(shipped)}"}


def _commit() -> str | None:
    """Return the checkout's commit, marked when files differ from it; None outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # fails where ppsd is installed
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("-modified" if _git("status", "--porcelain", ":/src") else "")
    except (OSError, subprocess.SubprocessError):  # no checkout, or no git
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_TIMEOUT_S,
    )
    return done.stdout.strip()


def _kernels() -> str:
    """Name the code that computes: a digest of the compiled kernels' sources, and PyTorch."""
    digest = hashlib.sha256()
    for source in sorted(Path(kernels.__file__).parent.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"{digest.hexdigest()[:12]}, torch {_version('torch')}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an optional one
        return None


def _cpu() -> str:
    """Return the processor's name, with family and model where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [
        f"{key.removeprefix('cpu ')} {said[key]}" for key in ("cpu family", "model") if key in said
    ]
    return ", ".join([said.get("model name", platform.processor()), *parts])
