"""Ids of files and of users: gaps, padding, end tokens and prompts beyond the model's rows."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppsd import LLM, SamplingParams
from ppsd.cli.app import main
from ppsd.errors import ConfigError, ModelError
from ppsd.measure.verify import verify
from ppsd.measure.workload import Task
from ppsd.model.source import describe, resolve_model
from ppsd.model.tokenizer import Tokenizer
from tests.support.tiny_models import VOCAB

TinyModel = Callable[[str], Path]
KNOWN = VOCAB - 4  # tokens of the tiny tokenizer
FAR = VOCAB - 2  # the id of one more token, with gaps before and padding after it
PROMPT = [5, 40, 60, 77]


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def add_token(directory: Path, token: str, number: int) -> None:
    entry = {"id": number, "content": token, "special": True, "normalized": False}
    entry |= {"single_word": False, "lstrip": False, "rstrip": False}

    def change(record: dict[str, Any]) -> None:
        record["added_tokens"].append(entry)
        record["model"]["vocab"][token] = number  # else the library numbers it anew

    edit(directory / "tokenizer.json", change)


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of a tiny model with an LM head of its own."""
    return Path(shutil.copytree(tiny_model("llama-biased"), tmp_path / "copy"))


@pytest.fixture
def sparse(model: Path) -> Path:
    """A model whose likeliest row has no token, and whose next likeliest one comes after it."""
    add_token(model, "<|far|>", FAR)
    tensors = load_file(model / "model.safetensors")
    head = tensors["lm_head.weight"]
    norm = tensors["model.norm.weight"]
    head[FAR], head[FAR - 1], head[FAR + 1] = 3 * norm, 4 * norm, 5 * norm
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def open_llm(model: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float64", "transport": "inprocess", "head": "untrained", "plan": "off"}
    return LLM(str(model), **fixed | {"threads_per_stage": 1} | settings)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("mode", ["autoregressive", "ppsd"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_without_a_token_are_never_sampled_and_tokens_after_a_gap_are(
    sparse: Path, dtype: str, mode: str, temperature: float
) -> None:
    with open_llm(sparse, dtype=dtype, mode=mode) as llm:
        spec = llm.layout.spec
        assert (spec.num_tokens, spec.unused_ids) == (FAR + 1, (KNOWN, KNOWN + 1))
        params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=temperature)
        ids = llm.generate(PROMPT, params)[0].token_ids
    assert FAR in ids
    assert not {FAR - 1, FAR + 1, KNOWN} & set(ids)


def test_a_token_after_a_gap_may_end_and_prompt(sparse: Path) -> None:
    edit(sparse / "config.json", lambda record: record.update(eos_token_id=FAR))
    with open_llm(sparse) as llm:
        completion = llm.generate(PROMPT, SamplingParams(max_tokens=24))[0]
        assert (completion.token_ids[-1], completion.finish_reason) == (FAR, "stop")
        assert llm.encode([FAR]) == [FAR]
        assert llm.encode("a<|far|>")[-1] == FAR
        with pytest.raises(
            ConfigError, match=rf"prompt token id must be an integer in \[0, {FAR}\]"
        ):
            llm.encode([FAR + 1])


@pytest.mark.parametrize("end", [-1, 999999, [2, 999999], [2, VOCAB - 1]])
def test_end_tokens_that_the_model_cannot_say_are_dropped_with_a_notice(
    model: Path, end: int | list[int]
) -> None:
    edit(model / "config.json", lambda record: record.update(eos_token_id=end))
    with open_llm(model) as llm:
        assert llm.layout.spec.eos_ids == (2,)  # the tokenizer's own
        (notice,) = llm.layout.spec.notices
        outside = end[1] if isinstance(end, list) else end
        assert notice.startswith(f"end token {outside} is ignored: the model's tokens are [0, ")
        assert len(llm.generate(PROMPT, SamplingParams(max_tokens=3))[0].token_ids) <= 3


def test_an_end_token_of_the_tokenizer_beyond_the_rows_is_dropped(model: Path) -> None:
    add_token(model, "<|im_end|>", VOCAB)
    edit(model / "tokenizer_config.json", lambda record: record.update(eos_token="<|im_end|>"))
    spec = describe(resolve_model(str(model)))
    fitted = Tokenizer.load(model).fit(spec)
    assert (fitted.eos_ids, len(fitted.notices)) == ((2,), 1)
    assert fitted.num_tokens == KNOWN


BEYOND = (
    f"prompt must be of the {VOCAB} tokens that the model knows, got token '[PAD]' with id {VOCAB}"
)


def test_a_prompt_of_tokens_beyond_the_rows_is_one_sentence(model: Path) -> None:
    add_token(model, "[PAD]", VOCAB)
    with open_llm(model) as llm:
        for prompt in ("a [PAD] b", [{"role": "user", "content": "a [PAD] b"}]):
            with pytest.raises(ConfigError) as caught:
                llm.generate(prompt)
            assert str(caught.value) == BEYOND


def test_a_chat_goes_on_after_such_a_line_and_after_a_template_that_failed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_token(model, "[PAD]", VOCAB)
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.content == 'fail' %}{{ 1 // 0 }}{% endif %}"
        "{% endfor %}"
    )
    flags = ["-m", str(model), "-n", "3", "--transport", "inprocess", "--chat-template", template]
    monkeypatch.setattr(sys, "argv", ["ppsd", "chat", "--stages", "1", *flags])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\na [PAD] b\nfail\nhello\n"))
    seen: list[list[str]] = []
    encode = Tokenizer.encode_chat

    def spy(self: Tokenizer, messages: list[dict[str, Any]], given: dict[str, Any]) -> list[int]:
        seen.append([m["content"] for m in messages if m["role"] == "user"])
        return encode(self, messages, given)

    monkeypatch.setattr(Tokenizer, "encode_chat", spy)
    assert main() == 0
    err = capsys.readouterr().err
    assert BEYOND in err
    assert "template can render (ZeroDivisionError: integer" in err
    assert seen[-1] == ["hello", "hello"]


@pytest.mark.parametrize("end", ["2", {"a": 1}, [2, "x"], [[2]], True, 2.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_of_another_type_get_the_same_sentence_in_both_files(
    model: Path, file: str, end: Any
) -> None:
    (model / file).touch()
    if file != "config.json":
        (model / file).write_text("{}")
    edit(model / file, lambda record: record.update(eos_token_id=end))
    with pytest.raises(
        ModelError, match=rf"{file}: eos_token_id must be a token id or a list of th"
    ):
        describe(resolve_model(str(model)))


def test_padding_that_a_converter_named_counts_as_padding(model: Path) -> None:
    for number in range(KNOWN, VOCAB):
        add_token(model, f"[PAD{number}]", number)
    fitted = Tokenizer.load(model).fit(describe(resolve_model(str(model))))
    assert (fitted.num_tokens, fitted.unused_ids) == (KNOWN, ())


def test_masked_logits_are_those_of_the_gaps(sparse: Path) -> None:
    rows: dict[int, torch.Tensor] = {}
    with open_llm(sparse) as llm:
        llm.run(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True), logits=rows.__setitem__)
    for row in rows.values():
        assert row.isneginf().nonzero().flatten().tolist() == [KNOWN, KNOWN + 1]


def test_logits_of_gaps_do_not_differ(sparse: Path) -> None:
    task = Task("a", "", ({"role": "user", "content": "the quick"},))
    with open_llm(sparse) as llm:
        result = verify(llm, [task], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [(c.bitwise, c.max_logit_difference) for c in result.comparisons] == [(True, 0.0)]


def test_a_gap_is_found_where_tokens_beyond_all_rows_make_up_for_it(model: Path) -> None:
    for number in range(KNOWN + 1, VOCAB + 1):
        add_token(model, f"<|{number}|>", number)
    fitted = Tokenizer.load(model).fit(describe(resolve_model(str(model))))
    assert (fitted.num_tokens, fitted.unused_ids) == (VOCAB, (KNOWN,))
