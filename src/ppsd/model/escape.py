"""Read control tokens in a user's text, such as <|im_end|>, as the characters they consist of.

Otherwise a text can end its own message and begin another, as in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ppsd.errors import ConfigError

PRIVATE = range(0x100000, 0x10FFFE)  # characters that nobody has given a meaning (plane 16)


class Escape:
    """Encodes texts with a tokenizers.Tokenizer ``backend``; ``added`` are its added tokens by id.

    A chat template writes control tokens of its own around the user's text. So the user's get
    stand-ins before it, the template's get others after it, and then the user's come back. A copy
    of the tokenizer knows the template's stand-ins, with all that holds for the tokens they stand
    for, and takes no other text for a control token.
    """

    def __init__(self, backend: Any, added: Mapping[int, Any]) -> None:
        self._backend = backend
        self._special = {token.content: token for token in added.values() if token.special}
        self._ids = {token.content: number for number, token in added.items()}
        names = sorted(self._special, key=len, reverse=True)  # of two that fit, the longer
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._users = dict(zip(names, map(chr, PRIVATE), strict=False))
        self._templates = dict(zip(names, map(chr, PRIVATE[len(names) :]), strict=False))
        taken = (*self._users.values(), *self._templates.values())
        self._taken = re.compile(f"[{''.join(taken)}]" if taken else "(?!)")

    def found_in(self, texts: Sequence[str]) -> bool:
        """Return True if there is a control token in a text, or what stands for one here."""
        return any(self._names.search(text) or self._taken.search(text) for text in texts)

    def hide(self, text: str) -> str:
        """Return a user's text with stand-ins for its control tokens, to give to a template."""
        if used := self._taken.search(text):
            raise ConfigError("prompt", used[0], "without private characters to escape it")
        return self._names.sub(lambda found: self._users[found[0]], text)

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of hidden text, also inside a template; ``special`` adds those of a model.

        Control tokens that are not hidden stay what they are.
        """
        text = self._names.sub(lambda found: self._templates[found[0]], text)
        for name, stand_in in self._users.items():
            text = text.replace(stand_in, name)
        ids: list[int] = self._copy.encode(text, add_special_tokens=special).ids
        return [self._originals.get(number, number) for number in ids]

    @cached_property
    def _copy(self) -> Any:
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True  # that is, as text
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        copy.add_tokens(
            [
                AddedToken(stand_in, **{flag: getattr(self._special[name], flag) for flag in flags})
                for name, stand_in in self._templates.items()
            ]
        )
        return copy

    @cached_property
    def _originals(self) -> dict[int, int]:
        """Return the id of each token by the id of its stand-in."""
        pairs = self._templates.items()
        return {self._copy.token_to_id(stand_in): self._ids[name] for name, stand_in in pairs}
