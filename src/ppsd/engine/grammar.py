"""Grammars that answers have to follow, by llguidance.

What may come next is a function of the answer's tokens so far. Rank 0 knows them for every row it
feeds, drafts included, so it works out each row's mask, drafts within it, and sends it along; the
last stage chooses within it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ppsd.errors import ConfigError, Described, shortened
from ppsd.speculation.masks import Mask, mask_bytes

FIELD = "response_format"
NEEDED = "llguidance"
MAX_SCHEMA = 1 << 16  # characters
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars for one model's tokens.

    ``backend`` is the tokenizer as tokenizer.json has it, None for one of another kind.
    """

    def __init__(self, backend: str | None, vocab_size: int, eos_ids: Sequence[int]) -> None:
        if find_spec(NEEDED) is None:
            allowed = f"used with {NEEDED}: pip install 'ppsd-llm[structured]'"
            raise ConfigError(FIELD, "a schema", allowed)
        if backend is None or not eos_ids:
            what = "tokenizers that the package tokenizers reads, and an end token"
            raise ConfigError(FIELD, Described("a schema"), f"used with a model that has {what}")
        from llguidance import LLTokenizer

        self._vocab_size = vocab_size
        own = LLTokenizer(backend, eos_token=list(eos_ids))
        if own.vocab_size < vocab_size:
            own = LLTokenizer(backend, n_vocab=vocab_size, eos_token=list(eos_ids))
        self._tokenizer = own

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of JSON that a schema allows; raises ConfigError."""
        from llguidance import LLMatcher

        try:
            text = json.dumps(schema, allow_nan=False)
        except ValueError as error:
            raise ConfigError(FIELD, "a schema", "a JSON schema of finite numbers") from error
        if len(text) > MAX_SCHEMA:
            told = Described(f"{len(text)} characters of schema")
            raise ConfigError(FIELD, told, f"of at most {MAX_SCHEMA} characters")
        matcher = LLMatcher(
            self._tokenizer,
            LLMatcher.grammar_from_json_schema(text, overrides=SPACING),
            log_level=0,
        )
        if matcher.is_error():
            allowed = f"a JSON schema that {NEEDED} supports ({shortened(matcher.get_error())})"
            raise ConfigError(FIELD, "a schema", allowed)
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """A compiled grammar; each request has a Constraint of its own."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> Constraint:
        """Return the constraint of a new answer."""
        return Constraint(self._matcher, self._vocab_size)


class Constraint:
    """Tells which tokens may follow an answer; branches of it may be asked about in any order."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._first = matcher
        self._matcher = matcher.deep_copy()
        self._bytes = mask_bytes(vocab_size)
        self._taken: list[int] = []
        self._mask: Mask | None = None

    def __call__(self, answer: Sequence[int]) -> Mask:
        """Return the mask of the token after ``answer``, whose tokens are all permitted.

        A grammar that grows beyond llguidance's limits permits nothing there, which ends a request
        that goes there; drafts alone do not.
        """
        answer = list(answer)
        if self._mask is None or answer != self._taken:
            self._go(answer)
            mask: bytes = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                mask = b""
            self._mask = mask[: self._bytes].ljust(self._bytes, b"\0")
        return self._mask

    def _go(self, answer: list[int]) -> None:
        """Take the matcher to an answer from the one before."""
        if self._matcher.is_error():  # for good: no rollback leads out of that
            self._matcher, self._taken = self._first.deep_copy(), []
        taken = self._taken
        common = 0
        while common < min(len(taken), len(answer)) and taken[common] == answer[common]:
            common += 1
        if len(taken) > common:
            self._matcher.rollback(len(taken) - common)
        # What follows the end is of no use to anybody, and no grammar speaks of it.
        count = self._matcher.try_consume_tokens(answer[common:])
        self._taken = answer[: common + count]
