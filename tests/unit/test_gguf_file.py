"""GGUF reading against files written here with the gguf package from tiny transformers models."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model.gguf_file import GGUFSource
from ppsd.model.gguf_header import read_header
from ppsd.model.identity import Identity
from ppsd.model.sidecar import cache_root
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import spec_from_config
from ppsd.model.tokenizer import Tokenizer
from ppsd.model.weights import check_shapes, fingerprint, open_source
from tests.support.gguf_files import add_value, as_stored, random_model, write_model

HEADS, KV_HEADS, LAYERS = 4, 2, 2
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


CONFIGS = [
    LlamaConfig(**SIZES),
    LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e6}),
    Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_tensors_and_spec_equal_the_original(tmp_path, config):
    model, path = random_model(config), tmp_path / "m.gguf"
    write_model(path, model)
    source = open_source(path)
    spec = source.spec("m")
    original = spec_from_config(config, "m", {5, 3})
    assert replace(spec, eos_ids=()) == replace(original, eos_ids=())
    assert spec.eos_ids == (3, 5)
    check_shapes(source, spec)
    for name in source.shapes():
        assert torch.equal(source.load(name, torch.float32), model.state_dict()[name]), name
    rounded = source.load("model.embed_tokens.weight", torch.bfloat16)
    assert torch.equal(rounded, model.get_input_embeddings().weight.bfloat16())


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_quantised_tensors_are_dequantised_and_unpermuted(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("ppsd.model.gguf_file.CHUNK", 64 * 7)  # several chunks, the last shorter
    model, path = random_model(LlamaConfig(**SIZES)), tmp_path / "m.gguf"
    values = write_model(path, model, kind)
    source = GGUFSource(path)
    for name, expected in values.items():
        loaded = source.load(name, torch.float32)
        assert np.array_equal(as_stored(name, loaded.numpy(), model.config), expected), name
        assert loaded.is_contiguous()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_rows_of_a_table_are_read_as_loaded(tmp_path, kind):
    path, name = tmp_path / "m.gguf", "model.embed_tokens.weight"
    write_model(path, random_model(LlamaConfig(**SIZES)), kind)
    source, rows = GGUFSource(path), torch.tensor([5, 0, 7])
    expected, reader = source.load(name, torch.bfloat16)[rows], source.rows(name, torch.bfloat16)
    del source
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.rename(tmp_path / "elsewhere.gguf")
    assert torch.equal(reader(rows), expected)
    os.truncate(tmp_path / "elsewhere.gguf", 100)
    with pytest.raises(ModelError, match=r"m\.gguf: was cut short"):
        reader(rows)


def test_loaded_tensors_own_their_memory(tmp_path):
    model = random_model(LlamaConfig(**SIZES))
    write_model(tmp_path / "m.gguf", model)
    source = GGUFSource(tmp_path / "m.gguf")
    source.load("model.norm.weight", torch.float32).zero_()
    assert torch.equal(source.load("model.norm.weight", torch.float32), model.model.norm.weight)


def test_fingerprint_is_that_of_the_safetensors(tmp_path):
    model = random_model(LlamaConfig(**SIZES)).half()
    model.save_pretrained(tmp_path / "original")
    original = resolve_model(str(tmp_path / "original"))
    expected = fingerprint(describe(original), open_source(original.path))
    write_model(tmp_path / "q.gguf", model.float(), Kind.Q4_0)
    write_model(tmp_path / "other.gguf", random_model(LlamaConfig(**SIZES), seed=1), Kind.Q4_0)
    prints = [
        fingerprint(GGUFSource(path).spec("x"), GGUFSource(path))
        for path in (tmp_path / "q.gguf", tmp_path / "other.gguf")
    ]
    assert prints[0] == expected
    assert prints[1] != expected


def test_rope_factors_divide_the_inverse_frequencies(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    model = random_model(LlamaConfig(**SIZES))
    write_model(
        tmp_path / "m.gguf", model, extend=lambda w: w.add_tensor("rope_freqs.weight", factors)
    )
    source = GGUFSource(tmp_path / "m.gguf")
    spec = source.spec("m")
    check_shapes(source, spec)
    plain = torch.tensor(spec_from_config(model.config, "m").inv_freq)
    assert torch.equal(torch.tensor(spec.inv_freq), plain / torch.from_numpy(factors))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_goes_through_transformers(tmp_path, kind):
    def extend(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    model = random_model(LlamaConfig(**SIZES))
    write_model(tmp_path / "m.gguf", model, extend=extend)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
    expected = spec_from_config(LlamaConfig(**SIZES, rope_parameters=rope), "m")
    spec = GGUFSource(tmp_path / "m.gguf").spec("m")
    assert (spec.inv_freq, spec.rope_scale) == (expected.inv_freq, expected.rope_scale)


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (lambda w: w.add_expert_count(8), "metadata llama.expert_count 8 is not supported"),
        (lambda w: w.add_rope_dimension_count(8), "partial_rotary_factor 0.5"),
        (lambda w: w.add_rope_scaling_yarn_beta_fast(3.0), "yarn_beta_fast"),
    ],
)
def test_unsupported_metadata_is_named(tmp_path, extend, message):
    def with_head_size(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(16)
        extend(writer)

    write_model(tmp_path / "m.gguf", random_model(LlamaConfig(**SIZES)), extend=with_head_size)
    with pytest.raises(UnsupportedModelError, match=message):
        GGUFSource(tmp_path / "m.gguf").spec("m")


@pytest.mark.parametrize("architecture", ["mamba", "Llama", "gemma2"])
def test_other_architectures_are_named_before_keys_they_lack(tmp_path, architecture):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=f"architecture '{architecture}' is not supp"):
        GGUFSource(tmp_path / "m.gguf").spec("m")


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("general.alignment", [7], "general.alignment 7"),
        ("general.alignment", [True], "general.alignment True"),
        ("llama.rope.scaling.factor", [2.0, 4.0], "llama.rope.scaling.factor stands there twice"),
    ],
)
def test_headers_that_can_be_read_in_two_ways_are_refused(tmp_path, key, values, message):
    def extend(writer: gguf.GGUFWriter) -> None:
        for number, value in enumerate(values):  # the writer itself takes a key once
            add_value(writer, key[:-1] + str(number), value)

    write_model(tmp_path / "m.gguf", random_model(LlamaConfig(**SIZES)), extend=extend)
    data = (tmp_path / "m.gguf").read_bytes()
    for number in range(len(values)):
        data = data.replace((key[:-1] + str(number)).encode(), key.encode())
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_header(tmp_path / "m.gguf")


def test_tensors_without_a_meaning_are_refused(tmp_path):
    extra = np.zeros(4, dtype=np.float32)
    write_model(
        tmp_path / "m.gguf",
        random_model(LlamaConfig(**SIZES)),
        extend=lambda w: w.add_tensor("blk.0.mystery.weight", extra),
    )
    source = GGUFSource(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"blk.0.mystery.weight"):
        check_shapes(source, source.spec("m"))
    with pytest.raises(ModelError, match=r"m.gguf: tensor model.ghost is missing"):
        source.load("model.ghost", torch.float32)


def test_unsupported_type_names_tensor_and_type(tmp_path):
    data = np.zeros((8, 64), dtype=np.float64)
    write_model(
        tmp_path / "m.gguf",
        random_model(LlamaConfig(**SIZES)),
        extend=lambda w: w.add_tensor("blk.7.attn_v.weight", data),
    )
    with pytest.raises(UnsupportedModelError, match=r"m.gguf: tensor blk.7.attn_v.weight .* F64"):
        GGUFSource(tmp_path / "m.gguf").load("model.layers.7.self_attn.v_proj.weight", torch.half)


def test_codes_whose_offsets_do_not_fit_are_refused(tmp_path):
    """Q4_0 means -8 scales, which a float16 holds for any weight there is, but not for all."""
    model, name = random_model(LlamaConfig(**SIZES)), "model.layers.0.mlp.up_proj.weight"
    for parameter in model.parameters():
        parameter.data *= 5e4
    write_model(tmp_path / "m.gguf", model, Kind.Q4_0)
    source = GGUFSource(tmp_path / "m.gguf")
    assert source.load(name, torch.float32).isfinite().all()
    with pytest.raises(ModelError, match=r"m.gguf: tensor blk.0.ffn_up.weight has scales beyond"):
        source.codes(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: b"GGML" + data[4:], "does not start with GGUF"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "little-endian"),
        (lambda data: data[:100], "ends inside the header"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "header|tensor"),
        (lambda data: data[:24] + struct.pack("<Q", 2**63) + data[32:], "ends inside the header"),
        (lambda data: data[:-200], r"tensor .* reaches past the end"),
    ],
    ids=["empty", "magic", "big-endian", "cut header", "counts", "length", "cut data"],
)
def test_corrupt_files_are_named(tmp_path, damage, message):
    path = tmp_path / "m.gguf"
    write_model(path, random_model(LlamaConfig(**SIZES)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=f"{path}: .*({message})"):
        read_header(path)


def _byte_tokenizer(writer: gguf.GGUFWriter) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    newline = bytes_to_unicode()[10]
    tokens = [*bytes_to_unicode().values(), newline * 2, "<|end|>"]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{newline} {newline}"])
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")


def test_tokenizer_and_spec_come_from_the_sidecar_the_second_time(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_model(path, random_model(LlamaConfig(**SIZES)), extend=_byte_tokenizer)
    files, prompt = resolve_model(str(path)), [{"role": "user", "content": "é\n\n12"}]
    spec, tokenizer = describe(files), Tokenizer.load(path)
    ids = tokenizer.encode_chat(prompt)
    assert ids[-4] == 256, "digits stand alone, so the two newlines before them merge"
    assert ids[-1] == 257
    monkeypatch.setattr(GGUFSource, "spec", None)
    monkeypatch.setattr("ppsd.model.gguf_tokenizer.convert", None)
    assert describe(files) == spec
    assert Tokenizer.load(path).encode_chat(prompt) == ids


@pytest.mark.parametrize("damage", ["content", "extra", "absent", "unwritable"])
def test_damaged_or_unwritable_sidecars_are_rebuilt(tmp_path, monkeypatch, damage):
    path = tmp_path / "m.gguf"
    write_model(path, random_model(LlamaConfig(**SIZES)))
    files = resolve_model(str(path))
    if damage == "unwritable":
        monkeypatch.setenv("PPSD_CACHE", "/dev/null/nowhere")
    spec = describe(files)
    (place,) = cache_root().iterdir() if cache_root().exists() else (None,)
    if damage == "content":
        file = place / "spec.json"
        file.write_text(file.read_text().replace('"num_heads": 4', '"num_heads": 8'))
    if damage == "extra":
        (place / "other.json").write_text("{}")
    if damage == "absent":
        (place / "spec.json").unlink()
    assert describe(files) == spec
    assert cache_root().exists() == (damage != "unwritable")
    if place:
        assert sorted(file.name for file in place.iterdir()) == ["sha256", "spec.json"]
        assert list(cache_root().iterdir()) == [place]


def test_a_changed_file_is_not_described_by_its_old_sidecar(tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path, random_model(LlamaConfig(**SIZES)))
    files = resolve_model(str(path))
    assert describe(files).num_layers == LAYERS
    write_model(path, random_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 3})))
    assert describe(files).num_layers == 3


def test_a_quantised_file_is_the_model_of_its_bfloat16_copy(tmp_path):
    """Its norms carry a quantiser's scales in float32, and the epsilon is a float32 too."""
    model = random_model(LlamaConfig(**SIZES | {"rms_norm_eps": 1e-6}))
    write_model(tmp_path / "q.gguf", model, Kind.Q4_0)
    model.config.rms_norm_eps = float(np.float32(1e-6))
    model.bfloat16().save_pretrained(tmp_path / "copy")
    files = resolve_model(str(tmp_path / "copy"))
    copy = Identity.of(describe(files), open_source(files.path))
    source = GGUFSource(tmp_path / "q.gguf")
    quantised = Identity.of(source.spec("x"), source)
    assert quantised.fingerprint != copy.fingerprint
    assert (quantised.difference(copy), copy.difference(quantised)) == ("", "")


@pytest.mark.weights
def test_the_default_model_is_the_one_we_know():
    files = resolve_model(None)
    if not files.is_gguf:
        pytest.skip("the embedded default model is not installed")
    spec, source = describe(files), open_source(files.path)
    norm = source.load("model.norm.weight", torch.float32)
    assert torch.equal(norm, norm.bfloat16().float()), "norms keep the original's bfloat16 values"
    check_shapes(source, spec)
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49152)
    assert fingerprint(spec, source) == (
        "81e64cf4a353ed77d4076164f51a31a00c9ecfd7d0794abfd22d8ec63498ec49"
    )
    tokenizer = Tokenizer.load(files.path)
    text = "Hi 😀\n\n1. 2026"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1
    assert tokenizer.eos_ids == (2,)
    assert [tokenizer.spelling(end) for end in spec.eos_ids] == (
        ["<|endoftext|>", "<|im_end|>", "<reponame>"]
    )
