"""Text to token ids and back, also one token at a time, on top of transformers' tokenizers.

Imported by engine/ and cli/; transformers is imported only when a tokenizer is loaded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, ModelError
from ppsd.model.escape import Escape
from ppsd.model.sidecar import cached

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTEXT = 4  # tokens; an unfinished UTF-8 character has at most three bytes, a token at least one
MOST = 3 * CONTEXT  # a window is cut back before it is so long


class Tokenizer:
    """A model's tokenizer and chat template.

    With ``escape_special`` control tokens in prompts and messages are text; those that the chat
    template writes are not touched.
    """

    def __init__(self, inner: Any, name: str, *, escape_special: bool = False) -> None:
        self._inner = inner
        self._name = name
        # what transformers itself asks in the end, without the much that it looks after before
        self._backend = getattr(inner, "backend_tokenizer", None)
        self._escape: Escape | None = None
        if escape_special:
            if self._backend is None:
                raise ModelError(f"{name}: a tokenizer of its kind cannot escape special tokens")
            self._escape = Escape(self._backend, inner.added_tokens_decoder)

    @classmethod
    def load(cls, path: Path, *, escape_special: bool = False) -> Tokenizer:
        """Load the tokenizer of a directory in Hugging Face layout or of a GGUF file.

        Raises ModelError naming the path when there is none or it would need remote code.
        """
        try:
            inner = _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)
        except ModelError:
            raise
        except Exception as error:  # transformers and tokenizers raise many unrelated types
            text = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: has no tokenizer that can be read ({text})") from error
        return cls(inner, str(path), escape_special=escape_special)

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; a model's logits may be padded beyond it."""
        return len(self._inner)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end of sequence, if any; stop at these and at ModelSpec.eos_ids."""
        end = self._inner.eos_token_id
        return () if end is None else (end,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of raw text, with the special tokens the model adds to a plain prompt.

        Raises ConfigError for text that is not valid Unicode (lone surrogates).
        """
        checks.unicode("prompt", text)
        if self._escape and self._escape.found_in([text]):
            return self._escape.encode(self._escape.hide(text), special=True)
        ids: list[int] = self._inner.encode(text)
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next message.

        Raises ModelError when the model has no chat template, and ConfigError when the template
        refuses the messages or a text is not valid Unicode.
        """
        for message in messages:
            for key, value in message.items():
                if isinstance(value, str):
                    checks.unicode(f"message {key}", value)
        if not self._inner.chat_template:
            raise ModelError(f"{self._name} does not define a chat template; use --raw")
        from jinja2 import TemplateError

        escape = self._escape
        if escape and not escape.found_in([text for m in messages for text in m.values()]):
            escape = None
        if escape:
            messages = [{key: escape.hide(text) for key, text in m.items()} for m in messages]
        try:
            text: str = self._inner.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            allowed = f"what the model's chat template accepts ({error})"
            raise ConfigError("messages", messages, allowed) from error
        if escape:
            return escape.encode(text, special=False)
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens; U+FFFD stands for broken UTF-8."""
        text: str
        if self._backend is not None:
            text = self._backend.decode(list(ids), skip_special_tokens=True)
        else:
            text = self._inner.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def visible(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it, or None when ``decode`` leaves it out."""
        if token in self._special:
            return None
        spelling: str | None = self._inner.convert_ids_to_tokens(token)
        return spelling

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._inner.added_tokens_decoder.items()
        return frozenset(token for token, info in added if info.special)


class StreamDecoder:
    """Decodes one growing sequence; what it returns adds up to ``decode`` of all its ids.

    Only the last few tokens are decoded again for each new one, so the cost of a token does not
    depend on the length of the text. Held back until they are settled: the last U+FFFD, which may
    be the beginning of a character, and runs of byte tokens (<0xE2>), which tokenizers with byte
    fallback decode as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._said = ""  # what of the window is settled
        self._bytes: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete, possibly none."""
        return "".join(self._push(token) for token in token_ids)

    def finish(self) -> str:
        """Return the text still held back; broken characters come out as U+FFFD."""
        tail = self._tokenizer.decode(self._window + self._bytes)[len(self._said) :]
        self._window, self._said, self._bytes = [], "", []
        return tail

    def _push(self, token: int) -> str:
        spelling = self._tokenizer.visible(token)
        if spelling is None:
            return ""
        if BYTE_TOKEN.fullmatch(spelling):
            self._bytes.append(token)
            return ""
        longer = [*self._window, *self._bytes, token]
        said = self._settled(longer)
        text = said[len(self._said) :]
        if len(longer) >= MOST:  # not each time: that takes a second decoding
            longer = longer[-CONTEXT:]
            said = self._settled(longer)
        self._window, self._said, self._bytes = longer, said, []
        return text

    def _settled(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).removesuffix(REPLACEMENT)


def _from_directory(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _from_gguf(path: Path) -> Any:
    return cached(
        path,
        "tokenizer",
        build=lambda: _convert_gguf(path),
        write=lambda inner, place: inner.save_pretrained(place),
        read=_restore,
    )


def _restore(files: Mapping[str, bytes]) -> Any:
    """Load a saved tokenizer; transformers reads directories alone."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            Path(place, name).write_bytes(data)
        return PreTrainedTokenizerFast.from_pretrained(place)


def _convert_gguf(path: Path) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ppsd.model.gguf_file import read_header

    splitting = read_header(path).metadata.get("tokenizer.ggml.pre")
    inner = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    if splitting == "smollm":  # transformers' conversion leaves out that digits stand alone
        backend = inner.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return inner
