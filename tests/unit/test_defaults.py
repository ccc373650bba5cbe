"""Sampling as the model's own file asks: generation_config.json, or keys of a GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from ppsd import LLM, SamplingParams
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import ModelFiles

QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
}
VALUES = {name: value for name, value in QWEN.items() if name != "do_sample"}


@pytest.fixture
def asking(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Give a copy of the tiny model whose generation_config.json says so."""

    def make(**record: object) -> Path:
        place = shutil.copytree(tiny_model(), tmp_path / "asking", dirs_exist_ok=True)
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | record))
        return place

    return make


@pytest.mark.parametrize(
    ("record", "values"),
    [
        ({}, {}),
        (QWEN, VALUES),
        (QWEN | {"do_sample": False}, {"repetition_penalty": 1.1}),
        ({"temperature": 0.6}, {}),  # greedy, as transformers reads it
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": -1}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 1.0}, {"temperature": 0.6}),
    ],
)
def test_what_the_file_asks(asking, record, values) -> None:
    found = sampling_defaults(ModelFiles("asking", asking(**record), is_gguf=False))
    assert (dict(found.values), found.ignored) == (values, ())


@pytest.mark.parametrize("value", ["hot", -1.0, [0.7], True, 1e9, {"a": 1}])
def test_a_value_that_cannot_be_is_ignored_by_name(asking, value) -> None:
    record = QWEN | {"temperature": value}
    found = sampling_defaults(ModelFiles("asking", asking(**record), is_gguf=False))
    assert dict(found.values) == {k: v for k, v in VALUES.items() if k != "temperature"}
    [note] = found.ignored
    assert note.startswith("generation_config.json: ignored, as temperature must be a number in ")


def test_keys_of_a_gguf(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 40)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.close()
    found = sampling_defaults(ModelFiles("model", path, is_gguf=True))
    assert dict(found.values) == {"temperature": 0.5, "top_k": 40}
    assert (found.origin, str(found)) == ("model.gguf", "temperature 0.5, top_k 40")


def test_they_hold_where_nothing_else_is_said(asking, ppsd) -> None:
    model = asking(**QWEN)
    settings = {"dtype": "float64", "stages": 1, "mode": "autoregressive", "max_context": 64}
    with LLM(str(model), **settings) as llm:
        [plain] = llm.generate("fox")
        [same] = llm.generate("fox", SamplingParams(**VALUES))
        [greedy] = llm.generate("fox", SamplingParams())
    assert plain.token_ids == same.token_ids != greedy.token_ids
    flags = f"--model {model} --dtype float64 --stages 1 --max-context 64 --raw --json"
    told = ppsd("generate", "fox", *flags.split())
    record = json.loads(told.out)
    assert record["sampling"] == VALUES | {"min_p": 0.0, "seed": 0}
    assert tuple(record["token_ids"]) == plain.token_ids
    asked = "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.1"
    assert f"sampling as generation_config.json asks: {asked}" in told.err
    flags += " --temperature 0 --repetition-penalty 1"
    record = json.loads(ppsd("generate", "fox", *flags.split()).out)
    assert tuple(record["token_ids"]) == greedy.token_ids


def test_samples_differ_where_the_model_is_sampled_by_default(asking, ppsd) -> None:
    flags = ["--dtype", "float64", "--stages", 1, "-n", 8, "--raw", "--json", "--samples", 2]
    both = json.loads(ppsd("generate", "fox", "--model", asking(**QWEN), *flags).out)
    assert [record["sampling"]["temperature"] for record in both] == [0.7, 0.7]
    refused = ppsd("generate", "fox", "--model", asking(), *flags)
    assert refused.code == 1
    assert "samples must be 1 at temperature 0" in refused.err
