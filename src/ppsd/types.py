"""Plain records shared by several layers. Imported by all; imports only errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ppsd.errors import ConfigError

MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class SamplingParams:
    """What to sample and when to stop, for one request.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. The penalties
    follow the usual definitions (repetition: Keskar et al. 2019; presence and frequency: OpenAI)
    and count accepted tokens only. ``seed`` and the position alone decide the noise of a token.
    Raises ConfigError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 256
    min_tokens: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_real("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("n", self.n, 1, 1024)
        _check_bias(self.logit_bias)
        object.__setattr__(self, "stop", _check_stop(self.stop))
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without noise."""
        return self.temperature == 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which ``from_json`` restores an equal object."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return record | {"logit_bias": {str(k): v for k, v in self.logit_bias.items()}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SamplingParams:
        """The inverse of ``to_json``."""
        bias = {int(k): float(v) for k, v in record["logit_bias"].items()}
        lists = {name: tuple(record[name]) for name in ("stop", "stop_token_ids")}
        return cls(**{**record, **lists, "logit_bias": bias})


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(name, value, f"an integer in [{low}, {high}]")


def _check_real(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (low < value if low_open else low <= value)
        and value <= high
    )
    if not inside:
        raise ConfigError(name, value, f"a number in {'(' if low_open else '['}{low:g}, {high:g}]")


def _check_bias(bias: object) -> None:
    if not isinstance(bias, Mapping):
        raise ConfigError("logit_bias", bias, "a mapping of token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        raise ConfigError("logit_bias", f"{len(bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
    for token, value in bias.items():
        _check_int("logit_bias token id", token, 0, 2**31 - 1)
        if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 100:
            raise ConfigError("logit_bias", value, "finite numbers in [-100, 100]")


def _check_stop(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, Iterable):
        raise ConfigError("stop", stop, "a text or several texts")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise ConfigError("stop", f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS} strings")
    for text in strings:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise ConfigError("stop", text, f"non-empty strings of at most {MAX_STOP_LENGTH} chars")
    return strings
