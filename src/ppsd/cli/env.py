"""``ppsd env``: versions, machine, kernels, places and models: what a bug report needs."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from ppsd.cli.display import size
from ppsd.errors import cause_of

NAMES, WIDTH = 17, 80  # columns
LISTED = 12  # models and profiles, at most
VARIABLES = (
    *("PPSD_CACHE", "PPSD_HEAD_DIR", "PPSD_KERNELS", "PPSD_CONFIG"),
    *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "CC", "OMP_NUM_THREADS"),
)
SECRETS = ("PPSD_API_KEY",)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what is in force here, for a bug report: versions, kernels, cores, cache, models."""
    record = _record()
    if as_json:
        print(json.dumps(record, indent=1))
        return
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * NAMES, break_on_hyphens=False)
    wrapper.break_long_words = False  # a cut path could not be used
    for name, value in _lines(record):
        print(wrapper.fill(f"{name:<{NAMES}}{value}"))


def _record() -> dict[str, Any]:
    import psutil

    from ppsd.config import available_cores
    from ppsd.provenance import provenance

    origin = provenance()
    memory = psutil.virtual_memory()
    return {
        "ppsd": origin["versions"].pop("ppsd-llm"),
        "commit": origin["commit"],
        "python": origin["python"],
        "platform": platform.platform(),
        "versions": origin["versions"],
        "cpu": origin["cpu"],
        "cores": origin["cores"],
        "cores_usable": len(available_cores()),
        "load_average": origin["load_average"],
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "accelerators": _accelerators(),
        "kernels": origin["bfloat16_kernels"],
        "environment": {name: _told(name) for name in (*VARIABLES, *_settings())},
    } | _places()


def _told(name: str) -> str | None:
    """Return the value of a variable, without what is nobody else's business."""
    value = os.environ.get(name)
    return "(a secret)" if value and name in SECRETS else value


def _settings() -> list[str]:
    """Return the variables that set something else."""
    return sorted(name for name in os.environ if name.startswith("PPSD_") and name not in VARIABLES)


def _accelerators() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def _places() -> dict[str, Any]:
    """Return the directories in use, and what is in them."""
    from ppsd.model.catalog import find_models, hub_cache
    from ppsd.model.head_library import find_heads

    heads = find_heads()
    models = list(islice(find_models(Path()), LISTED + 1))
    return _caches() | {
        "heads_shipped": sum(head.shipped for head in heads),
        "heads_local": sum(not head.shipped for head in heads),
        "hub_cache": str(hub_cache()),
        "models": _cut([model.title for model in models if not model.problem], len(models)),
        "default_model": next((model.title for model in models if model.name is None), None),
    }


def _caches() -> dict[str, Any]:
    """Return ppsd's own directories, or why there are none, as where nobody has a home."""
    from ppsd.model.head_library import local_root
    from ppsd.model.sidecar import cache_root
    from ppsd.plan.profile import profile_root

    try:
        profiles = sorted(file.name for file in profile_root().glob("*.json"))
        return {
            "cache": str(cache_root()),
            "cache_bytes": _bytes_below(cache_root()),
            "profiles": _cut(profiles, len(profiles)),
            "heads": str(local_root()),
        }
    except OSError as error:
        none = f"none ({cause_of(error)})"
        return {"cache": none, "cache_bytes": 0, "profiles": [], "heads": none}


def _cut(names: list[str], count: int) -> list[str]:
    """Return as many names as a bug report has room for; ``count`` were found."""
    return names if count <= LISTED else [*names[:LISTED], "…"]


def _bytes_below(root: Path) -> int:
    return sum(f.lstat().st_size for f in root.rglob("*") if f.is_file())


def _kernels(name: str | None) -> str:
    if name is None:
        return "none: they could not be compiled; `ppsd generate` says why"
    return f"{name}, for bfloat16 on CPUs"


def _lines(r: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the record as a person reads it."""
    commit = f" (commit {r['commit']})" if r["commit"] else ""
    lines = [
        ("ppsd", f"{r['ppsd']}{commit}"),
        ("python", f"{r['python']}, {r['platform']}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in r["versions"].items())),
        ("cpu", f"{r['cpu']}; {r['cores_usable']} of {r['cores']} cores"),
        ("memory", f"{size(r['memory_free_bytes'])} free of {size(r['memory_bytes'])}"),
        ("accelerators", ", ".join(r["accelerators"]) or "none"),
        ("kernels", _kernels(r["kernels"])),
        ("cache", f"{r['cache']} ({size(r['cache_bytes'])})"),
        ("profiles", ", ".join(r["profiles"]) or "none; `ppsd profile` takes one"),
        ("heads", f"{r['heads_shipped']} shipped, {r['heads_local']} in {r['heads']}"),
        ("models", ", ".join(r["models"]) or "none"),
        ("default model", r["default_model"] or "not embedded: from the hub"),
        ("hub cache", r["hub_cache"]),
    ]
    return lines + [(name, value or "not set") for name, value in r["environment"].items()]
