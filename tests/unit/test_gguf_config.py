"""Keys of GGUF files that change the numbers, split files, and sizes out of range."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model.gguf_file import GGUFSource, stored_name
from ppsd.model.names import expected_shapes
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import ModelSpec, spec_from_config
from ppsd.model.weights import check_shapes
from tests.support.gguf_files import add_value, random_model, write_model

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))


def written(path: Path, **keys: Any) -> GGUFSource:
    """A tiny Llama with more metadata; an underscored key replaces one that is always written."""
    named = {key.replace("__", "."): value for key, value in keys.items()}

    def extend(writer: gguf.GGUFWriter) -> None:
        for key, value in named.items():
            writer.kv_data[0].pop(f"llama.{key}", None)
            add_value(writer, f"llama.{key}", value)

    write_model(path / "m.gguf", random_model(LlamaConfig(**SIZES)), extend=extend)
    return GGUFSource(path / "m.gguf")


def with_rope(**rope: Any) -> ModelSpec:
    settings = {"rope_theta": 10000.0, **rope}
    return spec_from_config(LlamaConfig(**SIZES, rope_parameters=settings), "m")


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, LINEAR),
        ({"rope__scaling__factor": 4.0}, LINEAR),
        ({"rope__scale_linear": 4.0}, LINEAR),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, LINEAR),
        ({"rope__scaling__type": "linear"}, {}),
        ({"rope__scaling__factor": 1.0}, {}),
        ({"rope__scaling__factor": 0.0}, {}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {}),
        ({"rope__scaling__finetuned": True}, {}),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, YARN),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__yarn_beta_fast": 16.0,
                "rope__scaling__yarn_ext_factor": 1.0,
            },
            YARN | {"beta_fast": 16.0},
        ),
        ({"rope__freq_base": 5e5}, {"rope_theta": 5e5}),
    ],
    ids=str,
)
def test_rope_keys_are_read_as_llamacpp_reads_them(
    tmp_path: Path, keys: dict[str, Any], rope: dict[str, Any]
) -> None:
    spec, expected = written(tmp_path, **keys).spec("m"), with_rope(**rope)
    assert (spec.inv_freq, spec.rope_scale) == (expected.inv_freq, expected.rope_scale)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.yarn_beta_fast", 16.0),  # of no use without yarn
        ("rope.scaling.attn_factor", 2.0),
        ("rope.dimension_sections", [4, 4, 4, 4]),
        ("rope.freq_base_swa", 1e4),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.type", "su"),
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 2.0),
        ("expert_count", 8),
        ("attention.value_length", 8),
    ],
)
def test_keys_that_change_the_numbers_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not supported") as caught:
        written(tmp_path, **{key.replace(".", "__"): value}).spec("m")
    if key != "attention.value_length":
        assert key.rpartition(".")[2].removesuffix("type") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("block_count", 2**32 - 1, "num_hidden_layers must be an integer in [1, 1024], got 429"),
        ("block_count", 0, "llama.block_count must be a positive integer, got 0"),
        ("attention.head_count", 0, "llama.attention.head_count must be a positive integer, got 0"),
        ("attention.head_count", [2, 2], "llama.attention.head_count is missing or not a single"),
        ("attention.head_count_kv", [1, 1], "head_count_kv is missing or not a single value"),
        ("attention.head_count", "2", "must be a positive integer, got '2'"),
        ("embedding_length", 2**31, "hidden_size must be an integer in [1, 1048576]"),
        ("context_length", 2.5, "llama.context_length must be a positive integer, got 2.5"),
        ("rope.dimension_count", 2**31, "head_dim must be an integer in [1, 16384]"),
        ("rope.freq_base", float("nan"), "rope.freq_base must be a finite number, not negative"),
        ("rope.freq_base", 0.0, "rope settings"),
        ("rope.scaling.factor", -2.0, "rope.scaling.factor must be a finite number, not negative"),
        ("rope.scaling.type", 1, "llama.rope.scaling.type must be a text, got 1"),
        ("attention.layer_norm_rms_epsilon", float("inf"), "must be a finite number"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(tmp_path: Path, key: str, value: Any, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        written(tmp_path, **{key.replace(".", "__"): value}).spec("m")
    assert told in str(caught.value)


def test_errors_name_tensors_as_the_file_does(tmp_path: Path) -> None:
    source = written(tmp_path)
    spec = source.spec("m")
    names = {
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "lm_head.weight": "output.weight",
        "else": "else",
    }
    assert {name: stored_name(name) for name in names} == names
    assert all(source.name_in_file(n) == stored_name(n) for n in expected_shapes(spec))
    with pytest.raises(ModelError, match=r"m: tensor blk.2.attn_norm.weight is missing"):
        check_shapes(source, replace(spec, num_layers=3))
    with pytest.raises(ModelError, match=r"tensor blk.0.ffn_gate.weight has shape \[24, 32\], but"):
        check_shapes(source, replace(spec, intermediate_size=25))
    with pytest.raises(ModelError, match=r"9 tensors do not belong .* first is blk.1.\w+.weight"):
        check_shapes(source, replace(spec, num_layers=1))


def split(path: Path, cut: Callable[[list[str]], list[list[str]]], **keys: Any) -> list[Path]:
    """Cut a tiny model's file into parts, as gguf-split does."""
    write_model(path / "whole.gguf", random_model(LlamaConfig(**SIZES)))
    reader = gguf.GGUFReader(path / "whole.gguf")
    parts = cut([tensor.name for tensor in reader.tensors])
    numbers = {"split.count": len(parts), "split.tensors.count": len(reader.tensors)} | keys
    files = []
    for number, names in enumerate(parts):
        file = path / f"m-{number + 1:05}-of-{len(parts):05}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        for key, value in numbers.items():
            writer.add_uint32(key, value)
        writer.add_uint16("split.no", number)
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("llama."):
                    add_value(writer, field.name, field.contents())
        for tensor in reader.tensors:
            if tensor.name in names:
                writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files


def thirds(names: list[str]) -> list[list[str]]:
    return [names[::3], names[1::3], names[2::3]]


def test_the_first_part_brings_the_others(tmp_path: Path) -> None:
    first, *_ = split(tmp_path, thirds)
    files = resolve_model(str(first))
    assert files.name == "m"
    parts, whole = GGUFSource(first), GGUFSource(tmp_path / "whole.gguf")
    spec = describe(files)
    assert replace(spec, eos_ids=()) == replace(whole.spec("m"), eos_ids=())
    check_shapes(parts, spec)
    for name in whole.shapes():
        assert torch.equal(parts.load(name, torch.float32), whole.load(name, torch.float32)), name


def test_a_changed_later_part_is_not_described_by_the_old_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    first, second, _ = split(tmp_path, thirds)
    spec = describe(resolve_model(str(first)))
    monkeypatch.setattr(GGUFSource, "spec", lambda _, name: replace(spec, num_layers=99))
    assert describe(resolve_model(str(first))) == spec
    os.utime(second, (1, 1))
    assert describe(resolve_model(str(first))).num_layers == 99
    second.unlink()
    with pytest.raises(ModelError, match=f"{second.name} must lie beside it"):
        describe(resolve_model(str(first)))


def test_parts_that_are_missing_later_or_misnamed_are_named(tmp_path: Path) -> None:
    first, second, third = split(tmp_path, thirds)
    with pytest.raises(
        ModelError, match=f"{second}: is part 2 of 3 .*give the first one, {first.name}"
    ):
        GGUFSource(second)
    third.unlink()
    with pytest.raises(
        ModelError, match=f"{first}: is part 1 of 3 .*; {third.name} must lie beside"
    ):
        GGUFSource(first)
    with pytest.raises(ModelError, match=r"name must end in -00001-of-00003.gguf"):
        GGUFSource(first.rename(tmp_path / "model.gguf"))


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    first, *_ = split(tmp_path, thirds, **{"split.tensors.count": 99})
    with pytest.raises(ModelError, match=r"split.tensors.count is 99, but the 3 parts hold 21"):
        GGUFSource(first)
    first, *_ = split(tmp_path, lambda names: [names, names[:1]])
    with pytest.raises(ModelError, match=r"tensor .* is also in an earlier part"):
        GGUFSource(first)
    first, *_ = split(tmp_path, lambda names: [names, []], **{"split.count": 2**31})
    with pytest.raises(ModelError, match="is part 1 of 2147483648 of a split model"):
        GGUFSource(first)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match=r"pipe.gguf: cannot be read \(not a regular file\)"):
        GGUFSource(tmp_path / "pipe.gguf")
