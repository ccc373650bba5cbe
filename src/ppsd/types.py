"""Plain records shared by several layers. Imported by all; imports errors, checks and settings."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, Described, counted
from ppsd.settings import setting

MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 1024
MAX_STOP_IDS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MOST_TOKENS = 2**31 - 1
STOP_TEXTS = "a text or several texts"


@dataclass(frozen=True)
class SamplingParams:
    """What to sample and when to stop, for one request.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. The penalties
    follow the usual definitions (repetition: Keskar et al. 2019; presence and frequency: OpenAI)
    and count accepted tokens only. ``seed`` and the position alone decide the noise of a token.
    None is as if left out, but for ``seed``, where it draws one, and ``max_tokens``, where it
    means as many as the context has room for. Raises ConfigError for a value out of range.
    """

    temperature: float = setting(
        "0 is greedy. This, --top-k, --top-p, --min-p and --repetition-penalty are the model's "
        "own if left out.",
        0.0,
        short="-t",
        open_default=True,
    )
    top_k: int = setting("Keep the k most likely tokens; 0 keeps all.", 0, open_default=True)
    top_p: float = setting("Keep the smallest set of this probability.", 1.0, open_default=True)
    min_p: float = setting(
        "Drop tokens below this share of the best one's.", 0.0, open_default=True
    )
    repetition_penalty: float = setting("Above 1 discourages repetition.", 1.0, open_default=True)
    presence_penalty: float = setting("Subtracted once for a token used.", 0.0, expert=True)
    frequency_penalty: float = setting("Subtracted for every use.", 0.0, expert=True)
    logit_bias: Mapping[int, float] = setting(
        "Added to logits, such as 42:-100,7:2.5.", factory=dict, metavar="ID:BIAS,…", expert=True
    )
    seed: int = setting("Noise is a function of seed and position.", 0)
    stop: tuple[str, ...] = setting(
        "Text that ends the output; may be repeated.", (), metavar="TEXT", repeated=True
    )
    stop_token_ids: tuple[int, ...] = setting(
        "Token ids that end the output.", (), metavar="ID,…", expert=True
    )
    ignore_eos: bool = setting("Go on after end-of-sequence tokens.", False, expert=True)
    max_tokens: int = setting(
        "Limit on new tokens; 256 if left out, in chat what the context holds.",
        256,
        short="-n",
        open_default=True,
    )
    min_tokens: int = setting("Fewest new tokens before an answer may end.", 0, expert=True)
    n: int = 1

    def __post_init__(self) -> None:
        unset = {"seed": secrets.randbits(63), "max_tokens": MOST_TOKENS}
        for f in fields(self):  # None: as if left out, or what only None can say
            if getattr(self, f.name) is None:
                self._set(f.name, unset.get(f.name, _default(f)))
        for name, low, high in _INTEGERS:
            self._set(name, checks.integer(name, getattr(self, name), low, high))
        low, high = 0, self.max_tokens
        self._set("min_tokens", checks.integer("min_tokens", self.min_tokens, low, high))
        for name, least, most in _NUMBERS:
            open_below = name == "top_p"
            value = getattr(self, name)
            self._set(name, checks.number(name, value, least, most, low_open=open_below))
        self._set("ignore_eos", checks.truth("ignore_eos", self.ignore_eos))
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _stop_ids(self.stop_token_ids))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def sample(self, index: int) -> SamplingParams:
        """Return the parameters of the completion ``index`` of ``n``, whose seed is its own."""
        return replace(self, n=1, seed=(self.seed + index) % 2**63)

    @property
    def greedy(self) -> bool:
        """Return True if the most likely token is taken, without noise."""
        return self.temperature == 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary from which ``from_json`` restores an equal object."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return record | {"logit_bias": {str(k): v for k, v in self.logit_bias.items()}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SamplingParams:
        """Restore what ``to_json`` was called on."""
        bias = {int(k): float(v) for k, v in record["logit_bias"].items()}
        lists = {name: tuple(record[name]) for name in ("stop", "stop_token_ids")}
        return cls(**{**record, **lists, "logit_bias": bias})


_INTEGERS = (
    ("top_k", 0, 2**31 - 1),
    ("seed", 0, 2**63 - 1),
    ("max_tokens", 1, MOST_TOKENS),
    ("n", 1, MAX_CHOICES),
)
_NUMBERS = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    # Logits are divided by it: a denormal number would make any of them infinite.
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _default(of: Field[Any]) -> object:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ConfigError("logit_bias", bias, "a mapping of token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        told = Described(counted(len(bias), "token"))
        raise ConfigError("logit_bias", told, f"at most {MAX_LOGIT_BIAS} tokens")
    return {
        checks.integer("logit_bias token id", token, 0, 2**31 - 1): checks.number(
            "logit_bias", value, -100.0, 100.0
        )
        for token, value in bias.items()
    }


def _stop_ids(stop: object) -> tuple[int, ...]:
    ids = checks.items("stop_token_ids", stop, "several token ids")
    if len(ids) > MAX_STOP_IDS:
        told = Described(counted(len(ids), "id"))
        raise ConfigError("stop_token_ids", told, f"at most {MAX_STOP_IDS} ids")
    return tuple(checks.integer("stop_token_ids", token, 0, 2**31 - 1) for token in ids)


def _stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else checks.items("stop", stop, STOP_TEXTS)
    if len(strings) > MAX_STOP_STRINGS:
        told = Described(counted(len(strings), "string"))
        raise ConfigError("stop", told, f"at most {MAX_STOP_STRINGS} strings")
    for text in strings:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise ConfigError("stop", text, f"non-empty strings of at most {MAX_STOP_LENGTH} chars")
        checks.unicode("stop", text)
    return strings
