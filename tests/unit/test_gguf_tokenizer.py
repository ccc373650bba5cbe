"""Tokenizers of GGUF files against what llama.cpp and the original tokenizers do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model import gguf_tokenizer
from ppsd.model.gguf_config import end_ids
from ppsd.model.gguf_header import read_header
from ppsd.model.gguf_tokenizer import SPLITTINGS, convert
from ppsd.model.tokenizer import StreamDecoder, Tokenizer
from tests.support.command import user
from tests.support.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    write_tokenizer,
)

BYTES = list(bytes_to_unicode().values())
TRICKY = "I'LL pay 12345 \n\n x\treturn café! ok\u00a0 日本"


def byte_level(
    path: Path, more: dict[str, int] | None = None, merges: list[str] | None = None, **keys: Any
) -> PreTrainedTokenizerFast:
    """The bytes, the results of ``merges``, and ``more`` tokens with their types."""
    merges = merges or ["a b"]
    tokens = [*BYTES, *(merge.replace(" ", "") for merge in merges)]
    types = [NORMAL] * len(tokens) + list((more or {}).values())
    settings = {"model": "gpt2", "pre": "gpt-2", "merges": merges} | keys
    settings = {key: value for key, value in settings.items() if value is not None}
    return convert(write_tokenizer(path / "t.gguf", [*tokens, *(more or {})], types, **settings))


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """How a text is cut before merging."""
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


PIECES = {
    "llama-bpe": "I|'LL| pay| |123|45| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| \n\n| x|\t|return| café|!| ok|\u00a0| 日本",
    "gpt-2": "I|'|LL| pay| 12345| \n\n| x|\t|return| café|!| ok|\u00a0| 日本",
    "tekken": "I|'LL| pay| |1|2|3|4|5| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "seed-coder": "I|'LL| pay| |1|2|3|4|5| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "dbrx": "I|'LL| pay| |123|45| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "minicpm5": "I|'LL| pay| |123|45| \n\n| x|\treturn| café|!| ok|\u00a0| 日本",
    "viking": "I'LL| pay| |1|2|3|4|5| \n\n| x|\t|return| café|!| ok|\u00a0| 日本",
    "deepseek-coder": "I|'|LL| pay| |1|2|3|4|5| |\n|\n| x|\treturn| café|!| ok|\u00a0| |日本",
}


@pytest.mark.parametrize("name", PIECES)
def test_text_is_cut_as_the_model_learned_it(tmp_path: Path, name: str) -> None:
    assert pieces(byte_level(tmp_path, pre=name), TRICKY) == PIECES[name].split("|")


def test_splitting_equals_that_of_the_tokenizers_library_and_of_transformers(
    tmp_path: Path,
) -> None:
    ours = byte_level(tmp_path, pre="smollm")
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = pre_tokenizers.Sequence([digits, plain])
    assert ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TRICKY) == (
        theirs.pre_tokenize_str(TRICKY)
    )
    ours = byte_level(tmp_path, pre="qwen2")
    qwen = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(BYTES)}, merges=[])
    assert ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TRICKY) == (
        qwen.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TRICKY)
    )


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_known_splitting_loses_no_byte(tmp_path: Path, name: str) -> None:
    tokenizer = byte_level(tmp_path, pre=name, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(TRICKY)) == TRICKY


@pytest.mark.parametrize("name", ["no-such-name", "default", None])
def test_an_unknown_splitting_is_refused(tmp_path: Path, name: str | None) -> None:
    told = "is missing" if name is None else f"'{name}' is not supported"
    with pytest.raises(
        UnsupportedModelError,
        match=rf"t.gguf: tokenizer.ggml.pre {told}, so te.*`gguf-new-metadata --pre-.*qw",
    ):
        byte_level(tmp_path, pre=name)


def test_qwen_texts_are_normalised_and_others_are_not(tmp_path: Path) -> None:
    composed, apart = "é", "e\u0301"
    for name, same in (("qwen2", True), ("llama-bpe", False)):
        tokenizer = byte_level(tmp_path, pre=name)
        assert (tokenizer.encode(composed) == tokenizer.encode(apart)) == same


ODD = {
    "<|im_start|>": CONTROL,
    "<｜end▁of▁sentence｜>": CONTROL,
    "<a control token>": CONTROL,
    "<unk>": UNKNOWN,
    "<think>": USER_DEFINED,
    "  ": USER_DEFINED,
    "": UNUSED,
    "[PAD999]": UNUSED,
    "<|im_end|>": NORMAL,  # by its name it is a control token all the same
}


def test_every_id_has_its_own_spelling_and_control_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, ODD)
    tokens = [*BYTES, "ab", *ODD]
    assert len(tokenizer) == len(tokens)
    for token, spelling in enumerate(tokens):
        spelling = spelling or f"[EMPTY_{token}]"
        assert tokenizer.convert_ids_to_tokens(token) == spelling
        assert tokenizer.convert_tokens_to_ids(spelling) == token
    whole = [t for t, kind in ODD.items() if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    for token in [*whole, "<|im_end|>"]:
        ids = tokenizer.encode(f"ab{token}ab", add_special_tokens=False)
        assert ids == [256, tokens.index(token), 256], token
    assert len(tokenizer.encode("[PAD999]")) == len("[PAD999]")
    text = tokenizer.decode(range(256, len(tokens)), skip_special_tokens=True)
    assert text == f"ab<think>  [EMPTY_{tokens.index('')}][PAD999]"


def test_a_word_that_is_a_token_stays_whole_where_merges_are_ignored(tmp_path: Path) -> None:
    more = {"xyz": NORMAL}  # no merge makes it
    for name, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False)):
        tokenizer = byte_level(tmp_path, more, pre=name, add_bos_token=False)
        assert (tokenizer.encode("xyz") == [257]) == whole


@pytest.mark.parametrize(
    ("keys", "before", "after"),
    [
        ({"pre": "gpt-2"}, False, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True, False),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
        ({"pre": "qwen2", "add_eos_token": True}, False, True),
    ],
)
def test_bos_and_eos_of_byte_level_vocabularies(
    tmp_path: Path, keys: dict[str, Any], before: bool, after: bool
) -> None:
    more = {"<s>": CONTROL, "</s>": CONTROL}
    tokenizer = byte_level(tmp_path, more, bos_token_id=257, eos_token_id=258, **keys)
    assert tokenizer.encode("ab") == [257] * before + [256] + [258] * after
    assert tokenizer.encode("ab", add_special_tokens=False) == [256]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.encode("ab") == tokenizer.encode("ab")


def test_a_beginning_that_the_file_does_not_name_is_not_added(tmp_path: Path) -> None:
    assert byte_level(tmp_path, pre="llama-bpe").encode("ab") == [256]


def test_merges_go_by_their_first_space_beyond_the_first_letter(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, merges=["a b", "c d", "ab cd", "abcd ab"])
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abcdab")) == ["abcdab"]
    halves = gguf_tokenizer._Vocabulary._merge
    for text, expected in (("  a", (" ", "a")), ("a  b", ("a", " b")), ("ab c d", ("ab", "c d"))):
        assert halves(object(), text) == expected  # type: ignore[arg-type]  # not looked at


def test_a_token_of_the_users_is_looked_for_before_text_is_normalised(tmp_path: Path) -> None:
    apart = "e\u0301"
    tokenizer = byte_level(tmp_path, {apart: USER_DEFINED}, pre="qwen2")
    assert tokenizer.encode(f"ab{apart}") == [256, 257]
    assert 257 not in tokenizer.encode("abé")


def test_a_users_letter_that_also_spells_a_byte_is_that_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in DeepSeek's vocabularies, which lack the bytes that no UTF-8 text has."""
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    letters = "ÀÁõö÷øùúûüýþÿ"
    tokens = [*(byte for byte in BYTES if byte not in letters), "ab", *letters, "«ü»"]
    types = [NORMAL] * (len(BYTES) - len(letters) + 1) + [USER_DEFINED] * (len(letters) + 1)
    keys: dict[str, Any] = {"model": "gpt2", "pre": "deepseek-llm", "merges": ["a b"]}
    path = write_tokenizer(tmp_path / "t.gguf", tokens, types, **keys)
    for _ in range(2):  # as converted, and as kept
        tokenizer = Tokenizer.load(path)
        for text in (letters, "für schön «ü» é", "À ÷ 日ÿ"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == StreamDecoder(tokenizer).push(ids) == text
        assert tokenizer.encode("«ü»") == [len(tokens) - 1]


def test_spaces_before_signs_stay(tmp_path: Path) -> None:
    text = "ab . ab , ab ? do n't 's"
    tokenizer = byte_level(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({}, None),
        ({"": "A"}, "A"),
        ({"": "A", ".rag": "B"}, {"rag": "B", "default": "A"}),
        ({".rag": "B", "s": "C"}, {"rag": "B"}),
        ({"": ["A"]}, None),
    ],
)
def test_templates_go_by_their_names(texts, expected) -> None:
    metadata = {f"tokenizer.chat_template{name}": text for name, text in texts.items()}
    assert gguf_tokenizer._templates(metadata) == expected


def test_a_role_makes_no_ordinary_token_special(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, eos_token_id=256, padding_token_id=BYTES.index("x"))
    assert tokenizer.decode(tokenizer.encode("xabx"), skip_special_tokens=True) == "xabx"
    assert tokenizer.eos_token is None


SPM = [
    *("<unk>", "<s>", "</s>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "a", "b", "▁a", "ab", "▁ab", "▁▁"),
]
SPM_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 7]
SPM_SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -2.5]


def sentencepiece(path: Path, **keys: Any) -> PreTrainedTokenizerFast:
    settings = {"model": "llama", "scores": SPM_SCORES} | keys
    return convert(write_tokenizer(path / "t.gguf", SPM, SPM_TYPES, **settings))


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return "|".join(tokenizer.convert_ids_to_tokens(tokenizer.encode(text)))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab", "<s>|▁ab"),
        (" ab", "<s>|▁▁|ab"),  # a space of its own besides the prefix
        ("  ab", "<s>|▁▁|▁ab"),
        ("", "<s>"),
        ("a</s>ab", "<s>|▁a|</s>|▁ab"),  # each stretch of text has its prefix
        ("a</s> ab", "<s>|▁a|</s>|▁▁|ab"),
        ("a\nb", "<s>|▁a|<0x0A>|b"),
        ("é", "<s>|▁|<0xC3>|<0xA9>"),
    ],
)
def test_sentencepiece_texts_have_the_prefix_that_llamacpp_gives(
    tmp_path: Path, text: str, tokens: str
) -> None:
    assert spelled(sentencepiece(tmp_path), text) == tokens


def test_sentencepiece_without_prefix_or_bos(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, add_space_prefix=False, add_bos_token=False)
    assert spelled(tokenizer, "ab</s> ab") == "ab|</s>|▁ab"
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    prefixed = sentencepiece(tmp_path)
    roles = (prefixed.unk_token, prefixed.bos_token, prefixed.eos_token)  # by custom
    assert roles == ("<unk>", "<s>", "</s>")
    assert prefixed.decode(prefixed.encode("  ab"), skip_special_tokens=True) == "  ab"
    assert prefixed.decode(prefixed.encode("ab a"), skip_special_tokens=True) == "ab a"


@pytest.mark.parametrize(("scores", "tokens"), [((-1.0, -2.0), "ab|c"), ((-2.0, -1.0), "a|bc")])
def test_the_best_score_merges_first(
    tmp_path: Path, scores: tuple[float, float], tokens: str
) -> None:
    vocabulary = ["<unk>", "a", "b", "c", "ab", "bc"]
    keys = {"model": "llama", "scores": [0.0, -9.0, -9.0, -9.0, *scores]}
    path = write_tokenizer(
        tmp_path / "t.gguf", vocabulary, add_bos_token=False, add_space_prefix=False, **keys
    )
    assert spelled(convert(path), "abc") == tokens
    assert spelled(convert(path), "cxyc") == "c|<unk>|c"  # for want of byte tokens


@pytest.mark.parametrize(
    ("made", "clash"),
    [
        ({"ab": -1.0, "bc": -1.0}, "'ab' and 'bc'"),  # of abc, llama.cpp makes ab in any case
        ({"ab": -2.0, "ca": -2.0, "abc": -1.0}, "'ab' and 'ca'"),  # abca: abc is made after ab
        ({"ab": -2.0, "cd": -2.0, "abc": -3.0}, None),
    ],
)
def test_equal_scores_are_refused_where_the_order_of_merges_matters(
    tmp_path: Path, made: dict[str, float], clash: str | None
) -> None:
    vocabulary = [*("<unk>", "a", "b", "c", "d"), *made]
    keys = {"model": "llama", "scores": [0.0, *[-9.0] * 4, *made.values()]}
    path = write_tokenizer(tmp_path / "t.gguf", vocabulary, **keys)
    refused = pytest.raises(UnsupportedModelError, match=f"scores gives {clash} the same score")
    with refused if clash else nullcontext():
        convert(path)


def test_a_token_of_parts_that_are_none_is_never_merged(tmp_path: Path) -> None:
    vocabulary = ["<unk>", "a", "b", "c", "bcd"]
    keys = {"model": "llama", "scores": [0.0, -9.0, -9.0, -9.0, -1.0]}
    path = write_tokenizer(
        tmp_path / "t.gguf", vocabulary, add_bos_token=False, add_space_prefix=False, **keys
    )
    assert spelled(convert(path), "abc") == "a|b|c"


def ends(path: Path, tokens: list[str], **keys: Any) -> list[str]:
    header = read_header(write_tokenizer(path / "t.gguf", tokens, **keys))
    return sorted(tokens[i] for i in end_ids(header, tokens, "here"))


NAMES = ["a", "<|im_end|>", "<|endoftext|>", "b", "</s>", "<|end|>", "<|file_sep|>"]


def test_end_tokens_are_found_by_key_and_by_name(tmp_path: Path) -> None:
    by_name = sorted({*NAMES} - {"a", "b"})
    assert ends(tmp_path, NAMES, model="gpt2") == by_name
    assert ends(tmp_path, NAMES, model="gpt2", eos_token_id=3, eot_token_id=0) == (
        sorted([*by_name, "a", "b"])
    )
    assert ends(tmp_path, ["a", "b", "c"], model="llama") == ["c"]  # SentencePiece's custom
    assert ends(tmp_path, ["a", "b", "c"], model="llama", eos_token_id=0) == ["a"]
    assert ends(tmp_path, ["<|end|>", "<|call|>", "<|return|>"], model="gpt2") == (
        ["<|call|>", "<|return|>"]
    )
    assert ends(tmp_path, ["<|tool_response>", "</s>"], model="gpt2") == ["<|tool_response>"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model": "bert"}, r"tokenizer.ggml.model 'bert' is not supported; supported are 'gpt2'"),
        ({"model": None}, r"tokenizer.ggml.model None is not supported"),
        ({"merges": ["a b", "ab zz"]}, r"merges joins 'ab' and 'zz', but 'zz' is no token"),
        ({"merges": ["no"]}, "merges joins 'no' and ''"),
        (
            {"add_bos_token": True},
            "add_bos_token is true, .* but tokenizer.ggml.bos_token_id names no",
        ),
        ({"pre": "llama-bpe", "bos_token_id": 999}, "tokenizer.ggml.bos_token_id names no token"),
        ({"add_eos_token": True, "eos_token_id": 999}, "tokenizer.ggml.eos_token_id names no tok"),
        ({"bos_token_id": "1"}, "tokenizer.ggml.bos_token_id must be a token id, got '1'"),
        ({"bos_token_id": 1.0}, "tokenizer.ggml.bos_token_id must be a token id, got 1.0"),
        ({"bos_token_id": True}, "tokenizer.ggml.bos_token_id must be a token id, got True"),
        ({"unknown_token_id": [1]}, "tokenizer.ggml.unknown_token_id must be a .*, got an array"),
        ({"pre": "llama-bpe", "bos_token_id": 257}, "bos_token_id names no token"),  # the next one
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be True or False, got 1"),
        ({"more": {"a": NORMAL}}, "tokenizer.ggml.tokens holds 'a' twice"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=f"t.gguf: .*{told}"):
        byte_level(tmp_path, **keys)


def test_too_few_types_are_named(tmp_path: Path) -> None:
    path = write_tokenizer(
        tmp_path / "t.gguf", SPM, SPM_TYPES[:9], model="llama", scores=SPM_SCORES
    )
    with pytest.raises(ModelError, match="token_type has 9 entries for 266 tokens"):
        convert(path)


def test_too_few_scores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="scores has 1 entries for 266 tokens"):
        sentencepiece(tmp_path, scores=[0.0])


def test_a_file_of_several_templates_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    templates = {"rag": "R{{ messages[0]['content'] }}", "../tool": "T{{ 1 }}"}
    keys: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}
    path = write_tokenizer(tmp_path / "t.gguf", [*BYTES, "ab"], templates=templates, **keys)
    made = Tokenizer.load(path, "rag").encode_chat(user("ab"))
    monkeypatch.setattr(gguf_tokenizer, "convert", pytest.fail)
    assert Tokenizer.load(path, "rag").encode_chat(user("ab")) == made
    assert Tokenizer.load(path, "../tool").encode_chat(user("ab")) == [
        BYTES.index("T"),
        BYTES.index("1"),
    ]
