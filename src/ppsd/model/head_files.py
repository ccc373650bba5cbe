"""Read and write head directories, and check that a head belongs to a model.

A directory holds ``head.json`` (a HeadConfig) and ``head.safetensors``: the head's own weights,
whose matrices may be in 8-bit codes (head_codes.py). The LM head's rows come from the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import hexdigits
from typing import Any

import torch
from safetensors.torch import save_file

from ppsd import checks
from ppsd.errors import HeadError, cause_of
from ppsd.model.identity import Identity
from ppsd.model.spec import ModelSpec

FORMAT = 2
KINDS = ("norm", "transformer")
CONFIG_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"
PROMPTS_FILE = "prompts.txt"
PROMPT_DIGITS = 12  # hexadecimal, of a prompt's digest; heads of before have sixteen


@dataclass(frozen=True)
class HeadConfig:
    """A head's kind, the exit layer it reads, and the model it belongs to.

    ``layers`` is the number of decoder layers (0 for ``norm``), ``mlp`` the neurons of their MLPs,
    None for the model's own; ``draft_vocab`` the number of tokens it scores, None for all.
    ``feedback`` says that it also reads the last layer's rows of verified positions, ``copy_gate``
    that it tells when earlier text is worth copying, ``trained`` whether drafts can be expected to
    be accepted. ``model`` is the content of the model's ``Identity``, empty in older heads.
    """

    kind: str
    exit_layer: int
    layers: int
    draft_vocab: int | None
    base_model: str
    fingerprint: str
    mlp: int | None = None
    feedback: bool = False
    copy_gate: bool = False
    trained: bool = True
    model: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        """Return the identity of the model that the head was trained on; raises ValueError."""
        return Identity.from_json(self.fingerprint, self.model)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``head.json``."""
        return {"format": FORMAT, **asdict(self)}


def save_head(
    directory: Path,
    config: HeadConfig,
    weights: dict[str, torch.Tensor],
    prompts: Iterable[str] = (),
) -> None:
    """Write a head directory; ``weights`` are those of ``head_tensor_shapes``.

    ``prompts`` are digests of what it was trained on, so that others can check for overlap.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in weights.items()}, directory / WEIGHTS_FILE)
    (directory / PROMPTS_FILE).write_text("".join(f"{digest}\n" for digest in prompts))
    (directory / CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=1) + "\n")


def read_prompts(directory: Path) -> list[str]:
    """Return the digests of what a head was trained on; none where nothing is told.

    Raises HeadError for a file of anything else.
    """
    path = directory / PROMPTS_FILE
    check_regular(path)
    try:
        digests = path.read_text().split() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise HeadError(f"cannot read {path}: {cause_of(error)}") from error
    digests = [digest[:PROMPT_DIGITS] for digest in digests]
    for digest in digests:
        if len(digest) < PROMPT_DIGITS or set(digest) - set(hexdigits):
            raise HeadError(f"{path}: {digest!r} is no digest of {PROMPT_DIGITS} digits")
    return digests


def weights_digest(directory: Path) -> str:
    """Return the SHA-256 of a head's weights; raises HeadError."""
    path = directory / WEIGHTS_FILE
    check_regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HeadError(f"cannot read {path}: {error.strerror}") from error


def record_metrics(directory: Path, name: str, figures: dict[str, Any]) -> None:
    """Put ``figures`` under ``name`` into a head's metrics; raises HeadError."""
    config = read_head_config(directory)
    config = replace(config, metrics={**config.metrics, name: figures})
    draft = directory / f"{CONFIG_FILE}.new"
    try:
        draft.write_text(json.dumps(config.to_json(), indent=1) + "\n")
        draft.replace(directory / CONFIG_FILE)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            draft.unlink(missing_ok=True)
        raise HeadError(f"cannot write {directory / CONFIG_FILE}: {error.strerror}") from error


def read_head_config(directory: Path) -> HeadConfig:
    """Read and check ``head.json``; raises HeadError naming the file and what is wrong."""
    path = directory / CONFIG_FILE
    check_regular(path)
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != FORMAT:
            raise HeadError(f"{path} is not of head format {FORMAT}")
        config = HeadConfig(**record)
    except FileNotFoundError as error:
        known = "`ppsd heads list` names those that there are"
        message = f"no exit head at {directory}: {CONFIG_FILE} is missing; {known}"
        raise HeadError(message) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HeadError(f"{path} is not a head configuration: {error}") from error
    _check_config(config, path)
    return config


def check_regular(path: Path) -> None:
    """Raise HeadError for what is there and no file."""
    if path.exists() and not path.is_file():  # reading a named pipe would wait for ever
        raise HeadError(f"cannot read {path}: not a regular file")


def _check_config(config: HeadConfig, path: Path) -> None:
    """Raise HeadError unless every field is of its type and kind and layers agree."""
    with checks.inside(str(path), HeadError):
        checks.integer("exit_layer", config.exit_layer, 1)
        checks.integer("layers", config.layers, 0)
        for name, count in (("draft_vocab", config.draft_vocab), ("mlp", config.mlp)):
            if count is not None:
                checks.integer(name, count, 1)
        checks.string("base_model", config.base_model)
        checks.string("fingerprint", config.fingerprint)
    try:
        _ = config.identity
    except ValueError as error:
        raise HeadError(f"{path}: {error}") from error
    if config.kind not in KINDS or (config.layers > 0) != (config.kind == "transformer"):
        raise HeadError(f"{path} names kind {config.kind!r} with {config.layers!r} layers")
    if not isinstance(config.trained, bool):
        raise HeadError(f"{path}: trained must be true or false, got {config.trained!r}")
    for name in ("feedback", "copy_gate"):
        value = getattr(config, name)
        if not isinstance(value, bool) or (value and config.kind != "transformer"):
            raise HeadError(f"{path}: {name} must be true or false, and false for a norm head")
    for name in ("model", "metrics", "provenance"):
        if not isinstance(getattr(config, name), Mapping):
            raise HeadError(f"{path}: {name} must be an object, got {getattr(config, name)!r}")


def check_head(
    config: HeadConfig,
    spec: ModelSpec,
    identity: Identity,
    exit_layer: int,
    where: str,
    *,
    force: bool = False,
) -> None:
    """Raise HeadError unless the head was made for this exit layer and, without ``force``, model.

    Another model's head costs acceptance, never exactness.
    """
    if not force and (difference := config.identity.difference(identity)):
        raise HeadError(
            f"exit head {where} belongs to {config.base_model}, not to {spec.name}: {difference}; "
            "ppsd generate --force-head uses it all the same"
        )
    if config.exit_layer != exit_layer:
        raise HeadError(
            f"exit head {where} reads layer {config.exit_layer}, but stage 0 ends at layer "
            f"{exit_layer}; choose the split or the head so that both agree"
        )
