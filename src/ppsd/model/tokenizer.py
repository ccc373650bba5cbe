"""Turn text into token ids and back, also one at a time, by transformers' tokenizers.

Transformers is imported only when a tokenizer is loaded.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, Described, ModelError, shortened
from ppsd.model.chat_template import choose_template, render
from ppsd.model.escape import Escape
from ppsd.model.sidecar import cached
from ppsd.model.source import read_json
from ppsd.model.spec import ModelSpec, config_from_dict, speakable

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
CONTEXT = 4  # tokens; an unfinished UTF-8 character has at most three bytes, a token at least one
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_LENGTH = 1 << 62  # the engine checks lengths: a tokenizer's own limit would only warn
MOST = 3 * CONTEXT  # a window is cut back before it is so long


class Tokenizer:
    """A model's tokenizer and chat template.

    With ``escape_special`` control tokens in prompts and messages are text; those that the chat
    template writes are not touched.
    """

    def __init__(
        self,
        inner: Any,
        name: str,
        chat_template: str | None = None,
        *,
        escape_special: bool = False,
    ) -> None:
        self._inner = inner
        self._name = name
        self._wanted = chat_template
        if chat_template is not None:
            self._template()  # refuses what is no template now
        # what transformers itself asks in the end, without the much that it looks after before
        self._backend = getattr(inner, "backend_tokenizer", None)
        self._rows: int | None = None  # of the model's embedding, once ``fit`` was asked
        self._escape: Escape | None = None
        if escape_special:
            if self._backend is None:
                raise ModelError(f"{name}: a tokenizer of its kind cannot escape special tokens")
            self._escape = Escape(self._backend, inner.added_tokens_decoder)

    @classmethod
    def load(
        cls, path: Path, chat_template: str | None = None, *, escape_special: bool = False
    ) -> Tokenizer:
        """Load the tokenizer of a directory in Hugging Face layout or of a GGUF file.

        ``chat_template``, a file, Jinja text or the name of one that the model has, takes the
        place of the model's default. Raises ConfigError when it is none of these, and ModelError
        naming the path when there is no tokenizer or it would need remote code.
        """
        try:
            inner = _from_directory(path) if path.is_dir() else _from_gguf(path)
        except (ModelError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # many unrelated types, and a panic of Rust is no Exception
            told = shortened(str(error))
            raise ModelError(f"{path}: has no tokenizer that can be read ({told})") from error
        inner.model_max_length = MAX_LENGTH
        return cls(inner, str(path), chat_template, escape_special=escape_special)

    def fit(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with this tokenizer's end tokens and with the rows that have no token.

        An end token that the model cannot say is dropped with a notice. From now on, text with a
        token that the model has no row for is refused.
        """
        self._rows = spec.vocab_size
        unused = self._unused_ids(spec.vocab_size)
        count, inner = spec.vocab_size, len(unused)
        while inner and unused[inner - 1] == count - 1:
            inner, count = inner - 1, count - 1
        eos_ids, dropped = speakable((*spec.eos_ids, *self.eos_ids), count)
        return replace(
            spec,
            num_tokens=count,
            unused_ids=tuple(unused[:inner]),
            eos_ids=eos_ids,
            notices=spec.notices + dropped,
        )

    def _unused_ids(self, rows: int) -> Sequence[int]:
        """Return the ids below ``rows`` without a token, ascending: padding at the end, and gaps.

        Converters to GGUF give padding a token that is named after its id.
        """
        count = min(self.vocab_size, rows)
        while count and self._is_padding(count - 1):
            count -= 1
        # Asking for every id takes a third of a second with large vocabularies. Ids that number
        # as many as the highest one says have no gaps; added tokens may lie beyond all rows.
        beyond = max(self._inner.added_tokens_decoder, default=0) + 1
        if count and all(self._is_padding(i) for i in range(count, max(rows, beyond))):
            return range(count, rows)
        return [i for i in range(rows) if self._is_padding(i)]

    def _is_padding(self, token: int) -> bool:
        return self.spelling(token) in (None, f"[PAD{token}]")

    def spelling(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it, or None for an id without a token."""
        spelling: str | None = self._inner.convert_ids_to_tokens(token)
        return spelling

    @property
    def vocab_size(self) -> int:
        """Count the tokens; a model may have fewer rows or more."""
        return len(self._inner)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokenizer's own end of sequence, if any; ModelSpec.eos_ids end a text, too."""
        end = self._inner.eos_token_id
        return () if end is None else (end,)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of raw text; ``special`` adds the tokens a model wants around a prompt.

        Raises ConfigError for text that is not valid Unicode (lone surrogates).
        """
        escape = self._escaping([text])
        return self._encode(escape.hide(text) if escape else text, escape, special=special)

    def _escaping(self, texts: Sequence[str]) -> Escape | None:
        """Return what escapes control tokens, if there are any in the texts and it is asked for."""
        return self._escape if self._escape and self._escape.found_in(texts) else None

    def _encode(self, text: str, escape: Escape | None, special: bool) -> list[int]:
        checks.unicode("prompt", text)
        if escape:
            return self.within_rows(escape.encode(text, special=special))
        return self.within_rows(self._inner.encode(text, add_special_tokens=special))

    def within_rows(self, ids: list[int]) -> list[int]:
        """Return token ids that the model knows; raises ConfigError for others."""
        if self._rows is not None and ids and not 0 <= min(ids) <= max(ids) < self._rows:
            token = max(ids) if min(ids) >= 0 else min(ids)
            spelt = f"token {self.spelling(token)!r} with " if token >= 0 else ""
            told = Described(f"{spelt}id {token}")
            raise ConfigError("prompt", told, f"of the {self._rows} tokens that the model knows")
        return ids

    def encode_chat(
        self, messages: list[dict[str, Any]], more: Mapping[str, Any] = MappingProxyType({})
    ) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next message.

        The chat template finds ``more`` by name. Raises ModelError when no chat template applies,
        and ConfigError when it cannot render the messages or a text is not valid Unicode.
        """
        for message in messages:
            for key, value in message.items():
                if isinstance(value, str):
                    checks.unicode(f"message {key}", value)
        given = [*messages, dict(more)]
        escape = self._escaping(list(_texts(given)))
        if escape:
            given = _replaced(given, escape.hide)
        *messages, more = given
        text = render(self._inner, self._template(), messages, more)
        return self._encode(text, escape, special=False)

    @property
    def backend(self) -> str | None:
        """Return what tokenizer.json holds, None for a tokenizer of another kind."""
        return None if self._backend is None else self._backend.to_str()

    @property
    def about(self) -> dict[str, Any]:
        """Return what clients ask of a tokenizer, in the names of tokenizer_config.json."""
        template = None
        with suppress(ModelError):  # it has none
            template = self._template()
        return {
            "tokenizer_class": type(self._inner).__name__,
            "vocab_size": self.vocab_size,
            **{name: getattr(self._inner, name) for name in NAMED_TOKENS},
            "chat_template": template,
        }

    def _template(self) -> str:
        return choose_template(self._inner.chat_template, self._wanted, self._name)

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

    def piece(self, token: int) -> str:
        """Return the text of a token that others precede, without which it may lose its space."""
        return self.decode([token, token])[len(self.decode([token])) :]

    def visible(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it, or None when ``decode`` leaves it out."""
        if token in self._special:
            return None
        return self.spelling(token)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._inner.added_tokens_decoder.items()
        return frozenset(token for token, info in added if info.special)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with other texts; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_replaced(each, change) for each in value]
    if isinstance(value, dict):
        return {key: _replaced(each, change) for key, each in value.items()}
    return value


class StreamDecoder:
    """Decoder of one growing sequence; what it returns adds up to ``decode`` of all its ids.

    Only the last few tokens are decoded again for each new one, so the cost of a token does not
    depend on the length of the text. Held back until they are settled: the last U+FFFD, which may
    be the beginning of a character, and runs of byte tokens (<0xE2>), which tokenizers with byte
    fallback decode as a whole.

    What follows ``before``, a prompt, keeps the space that SentencePiece drops where text begins.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._before = before  # until the first token comes: event loops do not wait for its end
        self._window: list[int] = []
        self._said = ""  # what of the window is settled
        self._bytes: list[int] = []

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Return the last token of whole characters, if any: no other can change what follows."""
        for token in reversed(prompt):
            spelling = self._tokenizer.visible(token)
            if spelling is None or BYTE_TOKEN.fullmatch(spelling):
                continue
            if REPLACEMENT not in self._tokenizer.decode([token]):
                return [token]
        return []

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete, possibly none."""
        if self._before:
            self._window, self._before = self._end_of(self._before), ()
            self._said = self._tokenizer.decode(self._window)
        return "".join(self._push(token) for token in token_ids)

    def finish(self) -> str:
        """Return the text still held back; broken characters come out as U+FFFD."""
        tail = self.held
        self._window, self._said, self._bytes = [], "", []
        return tail

    @property
    def held(self) -> str:
        """Return the text held back as it is so far; broken characters are U+FFFD."""
        return self._tokenizer.decode(self._window + self._bytes)[len(self._said) :]

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
    sentencepiece = path / "tokenizer.model"
    alone = sentencepiece.is_file() and not (path / "tokenizer.json").is_file()
    if alone and importlib.util.find_spec("sentencepiece") is None:
        raise ModelError(
            f"{sentencepiece}: reading it needs the package sentencepiece; "
            "pip install 'ppsd-llm[sentencepiece]'"
        )
    from transformers import AutoTokenizer

    file, config = path / "config.json", None
    if file.is_file():  # transformers would read it whole, which can take minutes
        config = config_from_dict(read_json(file), str(file))
    return AutoTokenizer.from_pretrained(
        path, config=config, trust_remote_code=False, local_files_only=True
    )


def _from_gguf(path: Path) -> Any:
    from ppsd.model.gguf_tokenizer import convert

    return cached(
        path,
        "tokenizer",
        build=lambda: convert(path),
        # An entry holds files alone, and one for each of several templates would need a directory.
        write=lambda inner, place: inner.save_pretrained(place, save_jinja_files=False),
        read=_restore,
    )


def _restore(files: Mapping[str, bytes]) -> Any:
    """Load a saved tokenizer; transformers reads directories alone."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            Path(place, name).write_bytes(data)
        return PreTrainedTokenizerFast.from_pretrained(place)
