"""Numbers of other libraries, None and broken text: taken as meant, or refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppsd import LLM, SamplingParams, checks
from ppsd.cli import app
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, ModelError, PpsdError, RequestError
from ppsd.measure.workload import load_tasks
from ppsd.train.records import read_data
from tests.support.tiny_models import VOCAB

FEW = SamplingParams(max_tokens=6, ignore_eos=True)
REAL_TOKENS = VOCAB - 4  # the model's vocabulary is padded


@pytest.fixture(scope="module", params=["inprocess", "shared-memory"])
def llm(request: Any, tiny_model: Callable[[], Path]) -> Iterator[LLM]:
    settings = {"stages": 2, "head": "untrained", "plan": "off", "dtype": "float64"}
    with LLM(
        str(tiny_model()), transport=request.param, threads_per_stage=np.int64(1), **settings
    ) as llm:
        yield llm


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
        ({"top_p": np.float64(0.5), "min_p": np.int8(0)}, {"top_p": 0.5}),
        ({"seed": np.uint64(7), "max_tokens": np.int32(3)}, {"seed": 7, "max_tokens": 3}),
        ({"top_k": torch.tensor(4), "n": np.array(2)}, {"top_k": 4, "n": 2}),
        ({"stop_token_ids": np.array([4, 5])}, {"stop_token_ids": (4, 5)}),
        ({"stop_token_ids": [np.int64(4)]}, {"stop_token_ids": (4,)}),
        ({"logit_bias": {np.int64(3): np.float32(0.5)}}, {"logit_bias": {3: 0.5}}),
        ({"ignore_eos": np.True_}, {"ignore_eos": True}),
        ({"stop": None, "stop_token_ids": None, "logit_bias": None, "top_p": None}, {}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"max_tokens": None}, {"max_tokens": 2**31 - 1}),
    ],
    ids=str,
)
def test_parameters_are_taken_as_meant(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    taken = SamplingParams(**theirs)
    assert taken == SamplingParams(**ours)
    assert SamplingParams.from_json(json.loads(json.dumps(taken.to_json()))) == taken


def test_no_seed_is_another_one_each_time() -> None:
    seeds = {SamplingParams(seed=None).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert SamplingParams(seed=2**63 - 1, n=2).sample(1).seed == 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stop_token_ids": 5}, "stop_token_ids must be several token ids, got 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be several token ids, got '5'"),
        ({"stop": 5}, "stop must be a text or several texts, got 5"),
        ({"stop": b"x"}, "stop must be a text or several texts, got b'x'"),
        ({"stop": "\ud800"}, "stop must be valid Unicode, without lone surrogates, got '\\ud800'"),
        ({"max_tokens": np.float64(3)}, "max_tokens must be an integer in [1, 2147483647], got"),
        ({"seed": True}, "seed must be an integer in [0, 9223372036854775807], got True"),
        ({"temperature": np.float32("nan")}, "temperature must be a number in [0, 100], got"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty must be a number in [0.01, 100], got"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"logit_bias": {3: True}}, "logit_bias must be a number in [-100, 100], got True"),
    ],
    ids=str,
)
def test_parameters_of_no_meaning_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(sentence)


def test_settings_are_taken_as_meant() -> None:
    theirs = EngineConfig(
        split=np.array([2, 4]), devices="cpu", timeout=np.float32(2), pace=np.float64(0.5)
    )
    assert theirs == EngineConfig(split=(2, 4), devices=("cpu",), timeout=2.0, pace=(0.5,))
    assert EngineConfig(stages=np.int64(3), block=np.int8(2), split=None).stages == 3
    for field, value in (("split", 5), ("devices", 5), ("pace", "fast"), ("gate", "on")):
        with pytest.raises(ConfigError, match=f"^{field} must be "):
            EngineConfig(**{field: value})


def test_prompts_are_taken_as_meant(llm: LLM) -> None:
    want = llm.generate([5, 6, 7], FEW)[0].token_ids
    for prompt in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int32(5), 6, 7], (5, 6, 7)):
        assert llm.generate(prompt, FEW)[0].token_ids == want


PROMPTS: list[tuple[object, str]] = [
    (b"hello", "prompt must be a text, token ids or chat messages, got b'hello'"),
    (bytearray(b"hi"), "prompt must be a text, token ids or chat messages"),
    (None, "prompt must be a text, token ids or chat messages, got None"),
    (np.array([[5]]), "prompt token id must be an integer in"),
    ([np.float64(5)], "prompt token id must be an integer in"),
    ([{"role": "user"}], "message must be a mapping of texts with role and content, such as"),
    ([{"content": "hi"}], "message must be a mapping of texts with role and content, such as"),
    ([{"role": "user", "content": b"hi"}], "message must be a mapping of texts with role and"),
    ([{"role": "user", "content": "\udfff"}], "message content must be valid Unicode, without"),
    ([{"role": "\udfff", "content": "x"}], "message role must be valid Unicode, without lone"),
    ("x" * 60 + "\ud800", "prompt must be valid Unicode, without lone surrogates, got 'xxx"),
]


@pytest.mark.parametrize(("prompt", "sentence"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_of_no_meaning_are_named(llm: LLM, prompt: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.generate(prompt)
    assert str(caught.value).startswith(sentence)


def test_a_requests_own_numbers_fail_that_request_alone(llm: LLM) -> None:
    """All tokens stop the answer, and may not for the first four: nothing is left to choose."""
    want = llm.generate([5, 6, 7], FEW)[0].token_ids
    every = tuple(range(REAL_TOKENS))
    for max_tokens in (4, 40):
        doomed = SamplingParams(max_tokens=max_tokens, min_tokens=4, stop_token_ids=every)
        with pytest.raises(RequestError, match="must leave a finite largest logit at position 3"):
            llm.generate([5, 6, 7], doomed)
        assert llm.generate([5, 6, 7], FEW)[0].token_ids == want


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 0.01, "temperature": 5e-324},
        {"repetition_penalty": 100, "temperature": 100, "top_p": 5e-324},
        {"min_p": 5e-324, "temperature": 1e-300, "presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": dict.fromkeys(range(REAL_TOKENS), -100.0), "min_p": 1.0, "temperature": 1},
    ],
    ids=str,
)
def test_no_legal_value_kills_the_llm(llm: LLM, values: dict[str, Any]) -> None:
    llm.generate([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True, **values))
    assert len(llm.generate([5, 6, 7], FEW)[0].token_ids) == 6


def test_files_of_prompts_with_lone_surrogates_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": "x\ud800"}))
    for read in (lambda: load_tasks(file), lambda: read_data([str(file)])):
        with pytest.raises(PpsdError, match=r"prompts.jsonl, line 2: .*without lone surrogates"):
            read()


def test_json_is_not_taken_for_text(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "target": "two"}, {"prompt": "three", "target": "four"}]
    whole, lines = tmp_path / "prompts.json", tmp_path / "PROMPTS.JSONL"
    whole.write_text(json.dumps(rows))
    lines.write_text("\n".join(map(json.dumps, rows)))
    for read in (lambda: load_tasks(whole), lambda: read_data([str(whole)])):
        with pytest.raises(PpsdError, match=r"prompts.json is one JSON value; give a .jsonl file"):
            read()
    assert [r.target for r in read_data([str(lines)])[0]] == ["two", "four"]
    assert [task.messages[0]["content"] for task in load_tasks(lines)] == ["one", "three"]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (["generate", "\udcff"], "prompt"),
        (["generate", "\udcff", "--raw"], "prompt"),
        (["generate", "hi", "--system", "\udcff"], "system"),
        (["chat", "--system", "\udcff"], "system"),
    ],
)
def test_command_lines_that_are_not_unicode_are_told_at_once(
    line: list[str], field: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["ppsd", *line, "--model", "/nowhere"])
    assert app.main() == 1
    told = f"ppsd: {field} must be valid Unicode, without lone surrogates, got '\\udcff'\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.integer("n", 0, 1), "n must be an integer of at least 1, got 0"),
        (lambda: checks.integer("n", 1.5, 1), "n must be an integer of at least 1, got 1.5"),
        (lambda: checks.integer("n", True, 0), "n must be an integer of at least 0, got True"),
        (lambda: checks.number("x", np.nan, 0), "x must be a number of at least 0, got nan"),
        (lambda: checks.number("x", np.inf, 0), "x must be a number of at least 0, got inf"),
        (lambda: checks.number("x", 0, 0, low_open=True), "x must be a number above 0, got 0"),
        (lambda: checks.number("x", 2, 0, 1), r"x must be a number in \[0, 1\], got 2"),
        (lambda: checks.string("t", 3), "t must be a text, got 3"),
        (lambda: checks.one_of("t", "c", ("a", "b")), "t must be one of a, b, got 'c'"),
    ],
    ids=range(9),
)
def test_what_is_out_of_range_is_named(check: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check()
    with (
        pytest.raises(ModelError, match=f"^some file: {message}$"),
        checks.inside("some file", ModelError),
    ):
        check()
