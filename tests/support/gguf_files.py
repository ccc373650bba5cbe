"""Small GGUF files, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from ppsd.model.gguf_file import GLOBAL_NAMES, LAYER_NAMES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TO_GGUF = {hf: own for own, hf in LAYER_NAMES.items()}
GLOBAL_TO_GGUF = {hf: own for own, hf in GLOBAL_NAMES.items()}


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one value of metadata under the type that converters give it."""
    kinds: list[tuple[type, Callable[[str, Any], None]]] = [
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ]
    next(add for kind, add in kinds if isinstance(value, kind))(key, value)


def write_tokenizer(
    path: Path,
    tokens: Sequence[str],
    types: Sequence[int] | None = None,
    templates: Mapping[str, str] = MappingProxyType({}),
    **keys: Any,
) -> Path:
    """Write a file that holds a tokenizer only; a key is one of ``tokenizer.ggml``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(list(tokens))
    if types is not None:
        writer.add_token_types(list(types))
    for key, value in keys.items():
        add_value(writer, f"tokenizer.ggml.{key}", value)
    for name, text in templates.items():
        writer.add_string(f"tokenizer.chat_template.{name}", text)
    writer.add_tensor("nothing", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    if name in GLOBAL_TO_GGUF:
        return GLOBAL_TO_GGUF[name]
    _, _, layer, rest = name.split(".", 3)
    stem, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{TO_GGUF[stem]}.{suffix}"


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weights.shape))


def as_stored(name: str, weights: np.ndarray, config: Any) -> np.ndarray:
    """A tensor in the order of rows that its file has."""
    if config.model_type == "llama" and ".q_proj." in name:
        return _permute(weights, config.num_attention_heads)
    if config.model_type == "llama" and ".k_proj." in name:
        return _permute(weights, config.num_key_value_heads)
    return weights


def random_model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def _metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_eos_token_id(5)
    writer.add_eot_token_id(3)
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_array("general.languages", ["en", "de"])


def write_model(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    extend: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Write a model as the converter does; return what each tensor is, as stored and rounded."""
    values = {}
    writer = gguf.GGUFWriter(path, model.config.model_type)
    _metadata(writer, model.config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = as_stored(name, tensor.numpy(), model.config)
        tensor_kind = kind if stored.ndim == 2 else Kind.F32
        data = quantize(stored, tensor_kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=tensor_kind)
        values[name] = dequantize(data, tensor_kind)
    extend(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
