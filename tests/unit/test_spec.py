"""ModelSpec against transformers' own configs, rotary modules and parameter counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model.spec import ModelSpec, config_from_dict, spec_from_config, token_ids

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 123456.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.7},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
ROTARY = [
    (LlamaConfig, LlamaRotaryEmbedding),
    (Qwen2Config, Qwen2RotaryEmbedding),
    (Qwen3Config, Qwen3RotaryEmbedding),
]


@pytest.mark.parametrize(("config_class", "rotary"), ROTARY)
@pytest.mark.parametrize("kind", ROPES)
def test_inverse_frequencies_equal_transformers_bit_for_bit(config_class, rotary, kind):
    config = config_class(**TINY, head_dim=64, rope_parameters=ROPES[kind])
    spec = spec_from_config(config, "tiny")
    module = rotary(config)
    assert torch.equal(torch.tensor(spec.inv_freq, dtype=torch.float32), module.inv_freq)
    assert spec.rope_scale == module.attention_scaling
    assert (spec.rope_scale != 1.0) == (kind == "yarn")


def test_rope_types_differ_from_each_other():
    configs = [LlamaConfig(**TINY, head_dim=64, rope_parameters=rope) for rope in ROPES.values()]
    assert len({spec_from_config(config, "tiny").inv_freq for config in configs}) == 5


CONFIGS = [
    LlamaConfig(**TINY),
    LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, head_dim=16),
    MistralConfig(**TINY, sliding_window=None, head_dim=6),
    Qwen2Config(**TINY, tie_word_embeddings=True),
    Qwen3Config(**TINY, head_dim=12),
    Qwen3Config(**TINY, head_dim=12, attention_bias=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_parameter_counts_equal_the_real_model(config):
    spec = spec_from_config(config, "tiny")
    model = AutoModelForCausalLM.from_config(config)
    layer = {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}
    assert spec.layer_shapes() == layer
    assert spec.layer_parameters == sum(p.numel() for p in model.model.layers[1].parameters())
    norm = model.model.norm.weight.numel()
    assert spec.head_parameters == model.get_output_embeddings().weight.numel() + norm


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_json_round_trip_is_exact(config):
    spec = spec_from_config(config, "tiny", more_eos=[7, 9])
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (2, None, (2,)),
        ([5, 3], 3, (3, 5)),
        (None, None, ()),
        (None, [4, 1], (1, 4)),
        (0, 2, (0, 2)),
    ],
)
def test_eos_ids_are_the_union(own, generation, expected):
    config = LlamaConfig(**TINY, eos_token_id=own)
    more = token_ids(generation, "generation_config.json")
    assert spec_from_config(config, "tiny", more).eos_ids == expected


@pytest.mark.parametrize(
    ("config", "limit", "note"),
    [
        (MistralConfig(**TINY, sliding_window=100), 100, "sliding window"),
        (MistralConfig(**TINY, sliding_window=512), 512, ""),
        (MistralConfig(**TINY, sliding_window=None), 512, ""),
        (Qwen2Config(**TINY, sliding_window=64), 512, ""),
        (
            Qwen2Config(**TINY, use_sliding_window=True, sliding_window=64, max_window_layers=1),
            64,
            "sliding window",
        ),
        (
            Qwen3Config(**TINY, use_sliding_window=True, sliding_window=64, max_window_layers=3),
            512,
            "",
        ),
        (LlamaConfig(**TINY, rope_parameters=ROPES["dynamic"]), 512, "dynamic"),
    ],
)
def test_context_stops_where_full_attention_stops_being_exact(config, limit, note):
    spec = spec_from_config(config, "tiny")
    assert spec.max_context == limit
    assert note in " ".join(spec.notices)
    assert bool(note) == bool(spec.notices)


@pytest.mark.parametrize("sizes", [{"sliding_window": 1}, {"max_position_embeddings": 1}])
def test_a_context_without_room_is_refused(sizes):
    with pytest.raises(ModelError, match=r"tiny: a context of 1 token.* leaves no room"):
        spec_from_config(MistralConfig(**TINY | sizes), "tiny")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(), ["gpt2", "Mistral", "Qwen3"]),
        (LlamaConfig(**TINY, hidden_act="gelu"), ["hidden_act 'gelu'", "silu"]),
        (LlamaConfig(**TINY, is_causal=False), ["is_causal False", "supported is true"]),
        (
            LlamaConfig(**TINY | {"num_key_value_heads": 3}),
            ["num_key_value_heads 3", "num_attention_heads"],
        ),
        (
            LlamaConfig(**TINY, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            ["partial_rotary_factor 0.5"],
        ),
        (
            LlamaConfig(
                **TINY,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            ),
            ["rope_type 'longrope'", "llama3"],
        ),
        (LlamaConfig(**TINY, quantization_config={"bits": 4}), ["quantization_config"]),
        (Qwen2Config(**TINY, layer_types=["conv"] * 3), ["layer_types ['conv']"]),
    ],
)
def test_unsupported_features_are_named(config, words):
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_config(config, "some-model")
    assert all(word in str(caught.value) for word in ["some-model", *words])


def test_config_dictionary_becomes_the_builtin_class_and_never_remote_code():
    record = {**TINY, "model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    assert type(config_from_dict(record, "here")) is LlamaConfig
    with pytest.raises(UnsupportedModelError, match="here: architecture 'evil'"):
        config_from_dict({**record, "model_type": "evil"}, "here")
    with pytest.raises(ModelError, match="here: hidden_size must be an integer in"):
        config_from_dict({**record, "hidden_size": "wide"}, "here")
    with pytest.raises(ModelError, match=r"here: not a valid llama configuration.*hidden_act"):
        config_from_dict({**record, "hidden_act": 3}, "here")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in [1, 1024], got 10"),
        ({"head_dim": 10**12}, "head_dim must be an integer in [1, 16384], got 1000000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer in [1, 16384], got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer in [1, 16777216], got True"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings must be an integer in [1, "),
        ({"head_dim": 7}, "not a valid llama configuration: Class validation error"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim 1 is not supported"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be finite, got inf"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "rope setting factor 4.0 is not supported with rope_ty",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "give frequencies out of range"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": -4.0}},
            "give frequencies out of range",
        ),
        ({"rope_scaling": {"rope_type": [1]}}, "rope_type [1] is not supported"),
        ({"rope_theta": 0.0}, "rope settings give frequencies out of range"),
        ({"rope_theta": "big"}, "rope settings cannot be used (TypeError"),
        ({"rope_scaling": [1]}, "rope settings must be an object, got [1]"),
        ({"hidden_act": "x" * 10_000}, "hidden_act 'xxx"),
        ({"is_causal": False}, "is_causal False is not supported; supported is true"),
        ({"is_causal": None}, "is_causal None is not supported; supported is true"),
    ],
    ids=str,
)
def test_sizes_and_rope_settings_out_of_range_are_one_sentence(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError) as caught:
        spec_from_config(config_from_dict({**TINY, "model_type": "llama", **changes}, "x"), "x")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_settings_that_are_not_read_cost_nothing() -> None:
    record = {**TINY, "model_type": "llama", "num_labels": 10**9, "id2label": 5}
    assert spec_from_config(config_from_dict(record, "x"), "x").num_layers == 3
