"""The tokenizer that a GGUF file describes, built so that it gives the ids llama.cpp gives.

Every id keeps the file's own spelling and control tokens stay whole; what the file does not say
unmistakably is refused, since other ids are other text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ppsd import checks
from ppsd.errors import ModelError, UnsupportedModelError, shortened
from ppsd.model.gguf_config import END_NAMES, token_id
from ppsd.model.gguf_header import Header, read_header

PREFIX = "tokenizer.ggml."
ARRAYS = [PREFIX + name for name in ("tokens", "token_type", "scores", "merges")]
TEMPLATE = "tokenizer.chat_template"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # token types that text contains whole
SPACE = "▁"  # in SentencePiece vocabularies
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
REMEDY = (
    "use a newer conversion of the model, or, if you know how it splits, "
    "`gguf-new-metadata --pre-tokenizer NAME IN.gguf OUT.gguf`"
)

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MINICPM5 = rf"{WORDS}|\p{{N}}+|{REST}"
NO_STOPS = r" ?[^(\s|.,!?…。，、।۔،)]+"
SEED_CODER = rf"{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class _Splitting:
    """Patterns that cut a text before merging, applied one after the other.

    ``whole``: a piece that is a token stays whole, whatever the merges say. ``bos``: a prompt
    begins with BOS unless the file says otherwise. ``nfc``: text is normalised first.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA3 = _Splitting((LLAMA3,), whole=True, bos=True)
_QWEN2 = _Splitting((QWEN2,), nfc=True)
_DIGITS = _Splitting((r"\p{N}", GPT2))
_GPT2 = _Splitting((GPT2,))
SPLITTINGS: dict[str, _Splitting] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "trillion"), _GPT2),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Splitting((LLAMA3,))),
    "minicpm5": _Splitting((r"\p{N}{1,3}", MINICPM5), whole=True),
    "viking": _Splitting((NO_STOPS, r"\p{N}")),
    "tekken": _Splitting((TEKKEN,), whole=True, bos=True),
    "seed-coder": _Splitting((SEED_CODER,)),
    "deepseek-coder": _Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    "deepseek-llm": _Splitting(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            CJK,
            r"\p{N}",
        )
    ),
}


def convert(path: Path) -> Any:
    """Return the file's tokenizer and chat templates as transformers' class.

    Raises ModelError naming the key when the vocabulary is damaged, and UnsupportedModelError when
    its kind or its way of splitting text is not known.
    """
    import transformers

    header = read_header(path, ARRAYS)
    vocabulary = _Vocabulary(header, str(path))
    backend = vocabulary.backend()
    build: Any = transformers.PreTrainedTokenizerFast  # not typed
    return build(
        tokenizer_object=backend,
        chat_template=_templates(header.metadata),
        clean_up_tokenization_spaces=False,
        **vocabulary.named(),
    )


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the file's chat template, or all of them by name when there are several."""
    first = len(TEMPLATE) + 1
    named = {key[first:]: text for key, text in metadata.items() if key.startswith(TEMPLATE + ".")}
    named |= {"default": metadata[TEMPLATE]} if TEMPLATE in metadata else {}
    named = {name: text for name, text in named.items() if isinstance(text, str)}
    return named["default"] if named.keys() == {"default"} else named or None


class _Vocabulary:
    """The tokens of a GGUF file, and what its keys say about them."""

    def __init__(self, header: Header, where: str) -> None:
        self._header = header
        self._where = where
        self.model = self._key("model")
        if self.model not in ("gpt2", "llama"):
            told = shortened(repr(self.model))
            raise UnsupportedModelError(
                f"{where}: tokenizer.ggml.model {told} is not supported; supported are 'gpt2' and "
                "'llama'"
            )
        # An empty spelling would match everywhere; llama.cpp gives it the same name.
        spellings = self._array("tokens", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(spellings)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise ModelError(f"{where}: tokenizer.ggml.tokens holds {shortened(repr(twice))} twice")
        types = self._array("token_type", int) if self._key("token_type") is not None else []
        self.types = [types[i] if types else 1 for i in range(len(self.tokens))]
        for name in END_NAMES:
            if name in self.ids:
                self.types[self.ids[name]] = CONTROL
        self.splitting = self._splitting() if self.model == "gpt2" else None

    def backend(self) -> Tokenizer:
        """Build the tokenizer of the tokenizers library."""
        tokenizer = self._byte_level() if self.splitting else self._sentencepiece()
        tokenizer.add_special_tokens(self._added(UNKNOWN, CONTROL))
        tokenizer.add_tokens(self._added(USER_DEFINED))
        first, last = self._always_added()
        if first or last:
            template = [*first, "$A", *last]
            ids = [(token, self.ids[token]) for token in (*first, *last)]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=ids
            )
        return tokenizer

    def named(self) -> dict[str, str]:
        """Return the tokens that have a role, for templates; ordinary text never has one."""
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
        named = {role: self._token(key) for role, key in roles.items()}
        return {
            role: token
            for role, token in named.items()
            if token is not None and self.types[self.ids[token]] in (UNKNOWN, CONTROL)
        }

    def _byte_level(self) -> Tokenizer:
        assert self.splitting is not None
        merges = [self._merge(text) for text in self._array("merges", str)]
        model = self._bpe(merges, ignore_merges=self.splitting.whole)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.NFC() if self.splitting.nfc else None
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.splitting.patterns]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, BYTES_ONLY])
        literal = self._literal()
        last = decoders.ByteLevel()
        tokenizer.decoder = decoders.Sequence([*literal, last]) if literal else last
        return tokenizer

    def _literal(self) -> list[decoders.Replace]:
        """Return what keeps users' tokens as they are that could be read as spellings of bytes.

        DeepSeek has one for each letter that spells a byte which UTF-8 never uses, such as ü.
        """
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        return [
            decoders.Replace(Regex(rf"\A{re.escape(token)}\z"), _byte_spelling(token))
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind == USER_DEFINED and not token.isascii() and alphabet.issuperset(token)
        ]

    def _sentencepiece(self) -> Tokenizer:
        scores = self._array("scores", float)
        unknown = self._token("unknown")
        merges = _score_merges(self.ids, scores)
        for clash in _clashes(merges, self.ids, scores):
            first, second = sorted(clash, key=self.ids.__getitem__)
            raise UnsupportedModelError(
                f"{self._where}: tokenizer.ggml.scores gives {shortened(repr(first))} and "
                f"{shortened(repr(second))} the same score, so text cannot be split unmistakably; "
                "supported are scores that say which of two overlapping tokens is made first"
            )
        model = self._bpe(merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        prefix = self._flag("add_space_prefix", True)
        # Each stretch of text gets its own prefix, also after a control token and before a space.
        before = [normalizers.Prepend(SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
        after = [decoders.Strip(content=" ", left=1)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        )
        return tokenizer

    def _bpe(self, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
        for left, right in merges:
            for token in (left, right, left + right):
                if token not in self.ids:
                    raise ModelError(
                        f"{self._where}: tokenizer.ggml.merges joins {shortened(repr(left))} and "
                        f"{shortened(repr(right))}, but {shortened(repr(token))} is no token"
                    )
        return models.BPE(vocab=self.ids, merges=merges, **settings)

    def _merge(self, text: str) -> tuple[str, str]:
        left, _, right = text[1:].partition(" ")  # the first half may itself begin with a space
        return text[:1] + left, right

    def _added(self, *types: int) -> list[AddedToken]:
        return [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in types
        ]

    def _always_added(self) -> tuple[list[str], list[str]]:
        """Return what comes before and what comes after every prompt."""
        usual = self.splitting.bos if self.splitting else True
        sides = []
        for key, default in (("bos", usual), ("eos", False)):
            wanted, token = self._flag(f"add_{key}_token", default), self._token(key)
            stated = {f"{PREFIX}{name}" for name in (f"add_{key}_token", f"{key}_token_id")}
            if wanted and token is None and stated & self._header.metadata.keys():
                raise ModelError(
                    f"{self._where}: tokenizer.ggml.add_{key}_token is true, if only by default, "
                    f"but tokenizer.ggml.{key}_token_id names no token"
                )
            sides.append([token] if wanted and token is not None else [])
        return sides[0], sides[1]

    def _token(self, role: str) -> str | None:
        """Return the token of a role, by its key or by SentencePiece's custom."""
        custom = {"unknown": 0, "bos": 1, "eos": 2} if self.model == "llama" else {}
        token = token_id(self._header, self._where, f"{role}_token_id", custom.get(role))
        return self.tokens[token] if token is not None and 0 <= token < len(self.tokens) else None

    def _splitting(self) -> _Splitting:
        name = self._key("pre")
        if name not in SPLITTINGS:
            told = "is missing" if name is None else f"{shortened(repr(name))} is not supported"
            raise UnsupportedModelError(
                f"{self._where}: tokenizer.ggml.pre {told}, so text cannot be split as the model "
                f"learned it; {REMEDY}, where NAME is one of {', '.join(sorted(SPLITTINGS))}"
            )
        return SPLITTINGS[name]

    def _key(self, name: str, default: Any = None) -> Any:
        return self._header.metadata.get(PREFIX + name, default)

    def _flag(self, name: str, default: bool) -> bool:
        with checks.inside(self._where, ModelError):
            return checks.truth(f"tokenizer.ggml.{name}", self._key(name, default))

    def _array(self, name: str, kind: type) -> Sequence[Any]:
        values = self._key(name)
        if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
            raise ModelError(f"{self._where}: tokenizer.ggml.{name} is missing or of another type")
        if name in ("scores", "token_type") and len(values) < len(self.tokens):
            raise ModelError(
                f"{self._where}: tokenizer.ggml.{name} has {len(values)} entries for "
                f"{len(self.tokens)} tokens"
            )
        return values


def _byte_spelling(text: str) -> str:
    return "".join(piece for piece, _ in BYTES_ONLY.pre_tokenize_str(text))


def _score_merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece does: any two tokens that make one, best score first."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token]))
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]


def _clashes(
    merges: Sequence[tuple[str, str]], ids: Mapping[str, int], scores: Sequence[float]
) -> Iterator[tuple[str, str]]:
    """Yield tokens of one score whose order matters: that of their places in llama.cpp, not here.

    They share a part, or one's making lets a part of the other go into a token that is no worse.
    """
    made = {left + right: scores[ids[left + right]] for left, right in merges}
    if len(set(made.values())) == len(made):  # as SentencePiece's own BPE has it
        return
    begun, ended = defaultdict[Any, list[str]](list), defaultdict[Any, list[str]](list)
    for left, right in merges:
        token = left + right
        begun[made[token], left].append(token)
        ended[made[token], right].append(token)
    groups = [(ended[key], begun[key]) for key in ended if key in begun]
    for left, right in merges:
        score = made[left + right]
        if score >= made.get(left, inf):
            groups.append(([left], begun[made[left], right]))
        if score >= made.get(right, inf):
            groups.append(([right], ended[made[right], left]))
    for group in groups:
        yield from ((one, other) for one, other in product(*group) if one != other)
