"""Read how a model's authors want it sampled: generation_config.json, or a GGUF file's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppsd.errors import ConfigError
from ppsd.model.source import ModelFiles
from ppsd.types import SamplingParams

GENERATION_CONFIG = "generation_config.json"
NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Fields of SamplingParams that the model's file gives, its name, and what was ignored."""

    values: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the values in a line, empty when there are none."""
        return ", ".join(f"{name} {value:g}" for name, value in self.values.items())

    def params(self, given: SamplingParams | None, *, one: bool = False) -> SamplingParams:
        """Return checked parameters, these values if none are ``given``; ``one`` refuses ``n``."""
        params = SamplingParams(**self.values) if given is None else given
        if not isinstance(params, SamplingParams):
            raise ConfigError("params", params, "SamplingParams or None")
        if one and params.n > 1:
            raise ConfigError("n", params.n, "1 in a stream")
        return params


def sampling_defaults(files: ModelFiles) -> SamplingDefaults:
    """Return what the model's file says; a value that cannot be is ignored by name."""
    if files.is_gguf:
        from ppsd.model.gguf_header import read_header

        metadata = read_header(files.path).metadata
        given = {name: metadata.get(key) for name, key in GGUF_KEYS.items()}
        return _checked(given, files.path.name)
    record = _record(files.path / GENERATION_CONFIG)
    given = {name: record.get(name) for name in NAMES}
    if record.get("do_sample") is not True:  # greedy: the rest is for those who sample
        given = {"repetition_penalty": given["repetition_penalty"]}
    elif given["temperature"] is None:
        given["temperature"] = 1.0
    return _checked(given, GENERATION_CONFIG)


def _record(file: Path) -> Mapping[str, Any]:
    try:
        if not file.is_file():  # reading a named pipe would wait for ever
            return {}
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # there is none, or ``describe`` refused it
        return {}
    return record if isinstance(record, dict) else {}


def _checked(given: Mapping[str, Any], origin: str) -> SamplingDefaults:
    values: dict[str, Any] = {}
    ignored: list[str] = []
    neutral = SamplingParams()
    for name, value in given.items():
        off = name == "top_k" and value == -1  # as some write it
        if value is None or off or value == getattr(neutral, name):
            continue
        try:
            SamplingParams(**{name: value})
        except ConfigError as error:
            ignored.append(f"{origin}: ignored, as {str(error)[:200]}")
        else:
            values[name] = value
    return SamplingDefaults(values, origin, tuple(ignored))
