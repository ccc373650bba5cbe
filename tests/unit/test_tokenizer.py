"""Tokenizer and StreamDecoder on small byte-level and byte-fallback vocabularies made here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ppsd.errors import ConfigError, ModelError
from ppsd.model import tokenizer as module
from ppsd.model.tokenizer import StreamDecoder, Tokenizer

END = "<|end|>"
TEXTS = ["Hello wörld 😀👩‍👩‍👧", "日本語 and  two  spaces", "\n\n1. x\t\ud7ff\ufffd", " naïve café"]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    backend.train_from_iterator(["😀 😃 😄 hello wörld the the"] * 9, trainer)
    return backend


def _byte_fallback() -> Backend:
    pieces = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "a", "b", "é", "▁a", "▁é", "日", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "a"), ("▁", "é"), ("a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return backend


def _wrap(backend: Backend, **options) -> PreTrainedTokenizerFast:
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **options)
    inner.add_tokens(["<think>"])
    return inner


TOKENIZERS = {
    "byte level": Tokenizer(_wrap(_byte_level()), "byte level"),
    "byte fallback": Tokenizer(_wrap(_byte_fallback()), "byte fallback"),
}


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push([token]) for token in ids), decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_stream_equals_decode_for_random_ids(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_equals_decode_for_cut_and_joined_texts(name, data):
    tokenizer = TOKENIZERS[name]
    ids: list[int] = []
    for text in data.draw(st.lists(st.sampled_from(TEXTS), max_size=4)):
        whole = tokenizer.encode(text)
        ids += whole[data.draw(st.integers(0, 6)) : len(whole) - data.draw(st.integers(0, 6))]
    cut = data.draw(st.integers(0, len(ids)))
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(ids[:cut]), decoder.push(ids[cut:]), decoder.finish()]
    assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_what_follows_a_prompt_makes_one_text_with_it(name, data):
    tokenizer = TOKENIZERS[name]
    before = tokenizer.encode(data.draw(st.sampled_from(["", "a", "日 ", "ab\t", "b\n\n é", END])))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    whole, prompt = tokenizer.decode(before + ids), tokenizer.decode(before)
    assume(whole.startswith(prompt))  # else broken bytes broke its last characters, too
    decoder = StreamDecoder(tokenizer, before)
    assert prompt + decoder.push(ids) + decoder.finish() == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_valid_text_never_shows_a_replacement_character(name, text):
    tokenizer = TOKENIZERS[name]
    parts = _stream(tokenizer, tokenizer.encode(text))
    assert "\ufffd" not in "".join(parts)
    if name == "byte level":
        assert "".join(parts) == text


def test_a_split_character_appears_when_its_last_byte_does():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a\U00010437b")
    assert len(ids) == 6
    assert _stream(tokenizer, ids) == ["a", "", "", "", "\U00010437", "b", ""]
    assert _stream(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]


def test_endless_broken_bytes_are_not_held_back():
    tokenizer = TOKENIZERS["byte level"]
    (lead, *_), count = tokenizer.encode("\U00010437"), 50
    parts = _stream(tokenizer, [lead] * count)
    assert parts == ["", *["\ufffd"] * count]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_push_decodes_a_bounded_window(name, monkeypatch):
    tokenizer, longest = TOKENIZERS[name], 0
    decode = Tokenizer.decode

    def spy(self, ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", spy)
    _stream(tokenizer, tokenizer.encode("ab a" * 300))
    assert longest == module.MOST


class Other:
    """A tokenizer of transformers that is none of the tokenizers library."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner

    def decode(self, ids: list[int], **options: bool) -> str:
        assert options["clean_up_tokenization_spaces"] is False, "a text is what its tokens say"
        return self._inner.decode(ids, **options)

    def __getattr__(self, name: str) -> object:
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_what_transformers_says(name):
    tokenizer = TOKENIZERS[name]
    backend = _byte_level() if name == "byte level" else _byte_fallback()
    other = Other(_wrap(backend))
    slow = Tokenizer(other, "slow")
    assert (slow.backend, tokenizer.backend is None) == (None, False)
    for text in TEXTS:
        ids = tokenizer.encode(f"{text} {END}!")
        assert tokenizer.decode(ids) == slow.decode(ids) != ""
    with pytest.raises(ModelError, match="slow: a tokenizer of its kind cannot escape special"):
        Tokenizer(other, "slow", escape_special=True)


def test_encode_decode_and_ids():
    tokenizer = TOKENIZERS["byte level"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    (end,) = tokenizer.eos_ids
    assert tokenizer.encode(f"x{END}")[-1] == end
    assert tokenizer.decode([end]) == ""
    assert tokenizer.encode("<think>") == [tokenizer.vocab_size - 1]
    with pytest.raises(ConfigError, match="prompt must be valid Unicode"):
        tokenizer.encode("\ud800")


def _saved(directory: Path, **options) -> Tokenizer:
    _wrap(_byte_level(), **options).save_pretrained(directory)
    return Tokenizer.load(directory)


def test_chat_template_adds_the_generation_prompt(tmp_path):
    tokenizer = _saved(tmp_path, chat_template=TEMPLATE)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids == tokenizer.encode(f"[user]hi{END}")
    assert ids[-1] == tokenizer.eos_ids[0]


def test_a_template_finds_what_a_request_gives_it(tmp_path):
    tokenizer = _saved(tmp_path, chat_template="{{ messages[0].content }}{{ tone }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}], {"tone": "!"})
    assert ids == tokenizer.encode("hi!")


def test_a_template_alone_says_what_a_conversation_begins_with(tmp_path):
    inner = _wrap(_byte_level(), chat_template=TEMPLATE)
    backend = inner.backend_tokenizer
    end = backend.token_to_id(END)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, end)]
    )
    tokenizer = Tokenizer(inner, "opens")
    text = f"[user]hi{END}"
    assert tokenizer.encode(text) == [end, *tokenizer.encode(text, special=False)]
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == tokenizer.encode(
        text, special=False
    )
    with pytest.raises(ConfigError, match="message content must be valid Unicode"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


def test_missing_and_refusing_chat_templates(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path} does not define a chat template; use --raw"):
        _saved(tmp_path).encode_chat([{"role": "user", "content": "hi"}])
    strict = _saved(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        strict.encode_chat([{"role": "user", "content": "hi"}])


def test_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}: has no tokenizer that can be read"):
        Tokenizer.load(tmp_path)


def test_a_file_of_sentencepiece_alone_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", {"sentencepiece": None}.__getitem__)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"tokenizer.model: reading it needs the package sentence"):
        Tokenizer.load(tmp_path)
    monkeypatch.undo()
    assert _saved(tmp_path).encode("a"), "beside tokenizer.json nobody reads it"


def test_a_gguf_file_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, path = _wrap(_byte_level()), tmp_path / "model.gguf"
    monkeypatch.setattr(module, "_from_gguf", {path: inner}.get)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert inner.model_max_length == module.MAX_LENGTH


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, asked = _wrap(_byte_level()), []

    def load(*place: Path, **settings: object) -> PreTrainedTokenizerFast:
        asked.append((*place, settings["local_files_only"], settings["trust_remote_code"]))
        return inner

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    Tokenizer.load(tmp_path)
    assert asked == [(tmp_path, True, False)]


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    inner = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), eos_token=END)
    inner.save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n"
    (tmp_path / "evil.py").write_text(code)
    file = tmp_path / "tokenizer_config.json"
    told = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with suppress(ModelError):
        Tokenizer.load(tmp_path)
    assert not ran.exists()
