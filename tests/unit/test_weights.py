"""Safetensors reading: values, refusals that name file and tensor, and the fingerprint."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from ppsd.errors import ModelError
from ppsd.model.catalog import find_models
from ppsd.model.names import EMBEDDING
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import ModelSpec, spec_from_config
from ppsd.model.weights import (
    SafetensorsSource,
    check_shapes,
    fingerprint,
    open_source,
    weights_mark,
)

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _save(directory: Path, seed: int = 0, shard: str = "1GB", config_class=LlamaConfig, **options):
    torch.manual_seed(seed)
    config = config_class(**SIZES, **options)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, max_shard_size=shard)
    return model, spec_from_config(config, "tiny")


@pytest.fixture
def tiny(tmp_path: Path):
    return tmp_path, *_save(tmp_path)


@pytest.mark.parametrize("shard", ["1GB", "2KB"])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_every_tensor_equals_the_saved_model(tmp_path, shard, config_class):
    model, spec = _save(tmp_path, shard=shard, config_class=config_class)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "2KB")
    source = open_source(tmp_path)
    check_shapes(source, spec)
    state = model.state_dict()
    assert set(source.shapes()) == set(state)
    for name, value in state.items():
        assert torch.equal(source.load(name, torch.float32), value)
        assert torch.equal(source.load(name, torch.bfloat16), value.to(torch.bfloat16))
    reader, rows = source.rows(EMBEDDING, torch.bfloat16), torch.tensor([5, 0, 7])
    del source
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert torch.equal(reader(rows), state[EMBEDDING][rows].bfloat16())


def test_loaded_tensors_own_their_memory(tiny):
    directory, model, _ = tiny
    source = SafetensorsSource(directory)
    source.load(Q_PROJ, torch.float32).zero_()
    assert torch.equal(source.load(Q_PROJ, torch.float32), model.state_dict()[Q_PROJ])


def test_files_are_opened_only_when_asked_for(tmp_path):
    model, _ = _save(tmp_path, shard="2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(index.values()) - {index[Q_PROJ]}:
        (tmp_path / file).unlink()
    source = SafetensorsSource(tmp_path)
    assert torch.equal(source.load(Q_PROJ, torch.float32), model.state_dict()[Q_PROJ])
    with pytest.raises(ModelError, match=r"model-\d+-of-\d+.safetensors: this shard is missing"):
        source.shapes()


def _rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
        (lambda t: t.update({Q_PROJ: torch.zeros(16, 8)}), r"q_proj.*\[16, 8\].*\[16, 16\]"),
        (lambda t: t.update({"model.layers.2.x": torch.zeros(1)}), r"first is model.layers.2.x"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
    ],
)
def test_wrong_tensors_are_named(tiny, change, message):
    directory, _, spec = tiny
    _rewrite(directory, change)
    with pytest.raises(ModelError, match=message):
        check_shapes(SafetensorsSource(directory), spec)


def test_known_extras_are_accepted(tiny):
    directory, _, spec = tiny
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    _rewrite(directory, lambda tensors: tensors.update(extra))
    check_shapes(SafetensorsSource(directory), replace(spec, tie_embeddings=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "not a readable safetensors file"),
        (lambda data: struct.pack("<Q", 2**40) + data[8:], "not a readable safetensors file"),
        (lambda data: b"", "not a readable safetensors file"),
    ],
    ids=["truncated", "absurd header", "empty"],
)
def test_corrupt_files_are_named(tiny, damage, message):
    directory, _, _ = tiny
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=f"{file}: {message}"):
        SafetensorsSource(directory).shapes()


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/x.safetensors", "x.bin"])
def test_index_may_not_point_elsewhere(tmp_path, target):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q_PROJ: target}}))
    with pytest.raises(ModelError, match=f"{index}: tensor {Q_PROJ} points to '{target}'"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index.json: not a safetensors index"):
        SafetensorsSource(tmp_path)


def test_index_naming_a_tensor_the_shard_lacks(tiny):
    directory, _, _ = tiny
    index = {"weight_map": {"model.ghost.weight": "other.safetensors"}}
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"other.safetensors: tensor model.ghost.weight is missing"
    ):
        SafetensorsSource(directory).shapes()


@pytest.mark.parametrize(
    "weight_map",
    [
        {Q_PROJ: "model.safetensors"},  # lacks all other tensors of the file
        {Q_PROJ: "model-00001-of-00001.safetensors"},
    ],
)
def test_a_single_file_and_an_index_that_disagree_are_refused(tiny, weight_map):
    directory, _, _ = tiny
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"model.safetensors and model.safetensors.index.json dis"):
        SafetensorsSource(directory)
    stored = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    index.write_text(json.dumps({"weight_map": stored}))
    assert SafetensorsSource(directory).shapes().keys() == stored.keys()


def test_named_pipes_in_place_of_weights_are_refused_and_not_waited_for(tiny):
    directory, _, _ = tiny
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors: .*not a regular file"):
        SafetensorsSource(directory)


def test_a_tied_model_uses_another_lm_head_that_its_file_holds(tmp_path):
    _save(tmp_path, tie_word_embeddings=True)
    files = resolve_model(str(tmp_path))
    assert describe(files).tie_embeddings
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert describe(files).tie_embeddings
    assert describe(files).notices == ()
    _rewrite(tmp_path, lambda t: t["lm_head.weight"][3].add_(1))
    spec = describe(files)
    assert not spec.tie_embeddings
    assert spec.notices == (
        "tie_word_embeddings is ignored: the file's LM head differs from its embedding",
    )
    check_shapes(SafetensorsSource(tmp_path), spec)


def test_pickle_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match="only pickle weights"):
        SafetensorsSource(tmp_path)


def test_quantised_dtype_is_refused(tiny):
    directory, _, _ = tiny
    _rewrite(directory, lambda t: t.update({Q_PROJ: torch.zeros(16, 16, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=f"model.safetensors: tensor {Q_PROJ} has dtype I8"):
        SafetensorsSource(directory).load(Q_PROJ, torch.float32)
    _rewrite(directory, lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=f"tensor {EMBEDDING} has dtype F8_E4M3; supported are F"):
        SafetensorsSource(directory).rows(EMBEDDING, torch.float32)


@pytest.mark.parametrize("both", [False, True])
def test_a_quantised_lm_head_of_a_tied_model_is_refused_when_it_is_loaded(tmp_path, both):
    """A directory of models can be listed all the same."""
    _save(tmp_path, tie_word_embeddings=True)
    small = load_file(tmp_path / "model.safetensors")[EMBEDDING].to(torch.float8_e4m3fn)
    stored = {"lm_head.weight": small.clone()} | ({EMBEDDING: small} if both else {})
    _rewrite(tmp_path, lambda t: t.update(stored))
    assert not describe(resolve_model(str(tmp_path))).tie_embeddings
    assert [model.problem for model in find_models(tmp_path) if model.source == "local"] == [""]
    with pytest.raises(ModelError, match=r"tensor lm_head.weight has dtype F8_E4M3; supp"):
        SafetensorsSource(tmp_path).load("lm_head.weight", torch.float32)


def _print(directory: Path, spec: ModelSpec) -> str:
    return fingerprint(spec, SafetensorsSource(directory))


def test_the_mark_of_weights_follows_matrices_as_well(tiny):
    """Of a merged LoRA, too, in whatever matrix it lies."""
    directory, _, spec = tiny
    marks = [weights_mark(spec, SafetensorsSource(directory)) for _ in range(2)]
    assert marks[0] == marks[1]
    for name in (EMBEDDING, Q_PROJ, "model.layers.0.mlp.down_proj.weight"):
        _rewrite(directory, lambda tensors, name=name: tensors[name].add_(0.01))
        marks.append(weights_mark(spec, SafetensorsSource(directory)))
    assert len(set(marks)) == 4


def test_fingerprint_follows_norms_and_sizes_but_not_matrices_or_names(tiny):
    directory, _, spec = tiny
    first = _print(directory, spec)
    _rewrite(directory, lambda tensors: tensors[Q_PROJ].add_(1))
    assert _print(directory, replace(spec, name="other", max_context=7)) == first
    assert _print(directory, replace(spec, intermediate_size=21)) != first
    _rewrite(directory, lambda t: t["model.layers.1.input_layernorm.weight"][3].add_(1e-3))
    assert _print(directory, spec) != first
