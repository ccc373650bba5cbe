"""GGUF files: header, tensors under canonical names, and the model they describe.

The header is read here because the gguf package takes seconds over a vocabulary that only the
tokenizer needs; it does supply the formats and the dequantisation.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model.gguf_codes import KINDS, codes_of
from ppsd.model.kernels import Kind
from ppsd.model.packed import Codes
from ppsd.model.spec import ModelSpec, config_from_dict, spec_from_config
from ppsd.model.weights import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix

CHUNK = 1 << 20  # elements dequantised at a time: large tensors need no float32 copy
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
GLOBAL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
ROPE_SCALING_KEYS = {"type", "factor", "original_context_length", "finetuned"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ggml type, shape in torch's order, absolute offset and bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A GGUF file's scalar and string metadata, without its arrays, and its tensor table."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file, in milliseconds whatever the size of the vocabulary.

    Raises ModelError naming the file when it is missing, truncated or not GGUF.
    """
    return _parse(_map_file(path), path)


class GGUFSource:
    """The tensors of a GGUF file under canonical names, dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = _map_file(path)
        self._header = _parse(self._data, path)
        names = self._header.tensors.keys() - {ROPE_FACTORS}
        self._stored = {canonical_name(name): name for name in names}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See TensorSource; a tensor without a canonical name keeps its own."""
        return {name: self._header.tensors[own].shape for name, own in self._stored.items()}

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See TensorSource."""
        if name not in self._stored:
            raise ModelError(f"{self._path}: tensor {name} is missing")
        tensor = self._dequantise(self._stored[name], dtype)
        heads = self._permuted_heads(name)
        return unpermute(tensor, heads) if heads else tensor

    def kind(self, name: str) -> Kind | None:
        """See TensorSource."""
        return KINDS.get(self._header.tensors[self._stored[name]].kind)

    def codes(self, name: str) -> Codes:
        """See TensorSource."""
        stored = self._stored[name]
        found = codes_of(self._rows(stored), self._header.tensors[stored].kind)
        if not all(bool(numbers.isfinite().all()) for numbers in found.numbers()):
            raise ModelError(
                f"{self._path}: tensor {stored} has scales beyond the range of a float16"
            )
        heads = self._permuted_heads(name)
        if not heads:
            return found
        order = unpermute(torch.arange(len(found.codes)), heads)
        return found.rows(order)

    def rope_factors(self) -> torch.Tensor | None:
        """Return what divides each inverse frequency (Llama 3.1 stores it), in float32, or None."""
        if ROPE_FACTORS not in self._header.tensors:
            return None
        return self._dequantise(ROPE_FACTORS, torch.float32)

    def spec(self, name: str) -> ModelSpec:
        """Describe the model from the file's metadata, under the name ``name``."""
        record = _config_record(self._header, str(self._path))
        meta = self._header.metadata
        ends = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        config = config_from_dict(record, str(self._path))
        spec = spec_from_config(config, name, {end for end in ends if end is not None})
        factors = self.rope_factors()
        if factors is None:
            return spec
        if factors.shape != (len(spec.inv_freq),):
            raise ModelError(
                f"{self._path}: tensor {ROPE_FACTORS} has {factors.numel()} values, "
                f"allowed is {len(spec.inv_freq)}"
            )
        inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32) / factors
        return replace(spec, inv_freq=tuple(inv_freq.tolist()))

    def _permuted_heads(self, name: str) -> int:
        """Return how many heads' rows the converter has permuted, or 0."""
        meta = self._header.metadata
        if meta.get("general.architecture") != "llama":
            return 0
        heads: int = meta["llama.attention.head_count"]
        if ".q_proj." in name:
            return heads
        return meta.get("llama.attention.head_count_kv", heads) if ".k_proj." in name else 0

    def _rows(self, stored: str) -> np.ndarray:
        """A tensor's bytes, row by row."""
        entry = self._header.tensors[stored]
        rows = np.frombuffer(self._data, np.uint8, entry.nbytes, entry.offset)
        return rows.reshape(-1, quant_shape_to_byte_shape(entry.shape, entry.kind)[-1])

    def _dequantise(self, stored: str, dtype: torch.dtype) -> torch.Tensor:
        entry = self._header.tensors[stored]
        rows = self._rows(stored)
        result = torch.empty(entry.shape, dtype=dtype)
        table, step = result.view(len(rows), -1), max(1, CHUNK // entry.shape[-1])
        for start in range(0, len(rows), step):
            try:
                values = dequantize(rows[start : start + step], entry.kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self._path}: tensor {stored} has the unsupported type {entry.kind.name}"
                ) from error
            writable = np.require(values, requirements="W")
            table[start : start + step] = torch.from_numpy(writable)
        return result


def canonical_name(stored: str) -> str:
    """Return the Hugging Face name of a GGUF tensor, or its own name when it has none."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)
    if match and match[2] in LAYER_NAMES:
        return f"{layer_prefix(int(match[1]))}{LAYER_NAMES[match[2]]}.{match[3]}"
    return GLOBAL_NAMES.get(stored, stored)


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of query and key rows, a weight's or a bias's.

    Its converter interleaves the two halves of every head, because it rotates neighbouring
    elements where Hugging Face rotates elements half a head apart.
    """
    halves = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error


def _parse(data: mmap.mmap, path: Path) -> Header:
    try:
        return _Reader(data).header()
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a readable GGUF file ({error})") from error


class _Reader:
    """Reads a header front to back; every length is checked against the file before its use."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; supported are 2 and 3, little-endian")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key, value = self._string(), self._value(self._number("I"))
            if value is not None:
                metadata[key] = value
        table = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = {info[0]: self._entry(*info, start) for info in table}
        if len(tensors) != tensor_count:
            raise ValueError("two tensors have the same name")
        return Header(metadata, tensors)

    def _entry(
        self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int
    ) -> TensorEntry:
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ValueError(f"tensor {name} has the unknown type {kind}") from error
        nbytes = prod(quant_shape_to_byte_shape(shape, ggml_type))
        if not nbytes or start + offset + nbytes > len(self._data):
            raise ValueError(f"tensor {name} of {nbytes} bytes reaches past the end of the file")
        return TensorEntry(ggml_type, shape, start + offset, nbytes)

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, self._number("I"), shape, self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._skip_array()
        if kind not in SCALARS:
            raise ValueError(f"metadata of the unknown type {kind}")
        number = self._number(SCALARS[kind])
        # 1e-5 is stored as the float32 next to it: take the shortest decimal that means the same
        return float(str(np.float32(number))) if SCALARS[kind] == "f" else number

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind in SCALARS:
            self._take(count * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            raise ValueError(f"a metadata array of type {kind}")

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("it ends inside the header")
        self._at += count
        return self._data[self._at - count : self._at]


def _config_record(header: Header, where: str) -> dict[str, Any]:
    """Translate metadata into the contents of a config.json."""
    meta, tensors = header.metadata, header.tensors
    architecture = meta.get("general.architecture")
    get = _lookup(meta, f"{architecture}.", where)
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{where}: tensor token_embd.weight is missing")
    if get("expert_count", 0):
        raise UnsupportedModelError(f"{where}: mixtures of experts are not supported")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    rotary = get("rope.dimension_count", None)
    head_dim = get("attention.key_length", rotary or hidden // heads)
    window = get("attention.sliding_window", None)
    return {
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_record(meta, get, where)
        | ({"partial_rotary_factor": rotary / head_dim} if rotary else {}),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "eos_token_id": None,
    }


def _rope_record(meta: Mapping[str, Any], get: Callable[..., Any], where: str) -> dict[str, Any]:
    base = {"rope_theta": get("rope.freq_base", 10000.0)}
    prefix = f"{meta['general.architecture']}.rope.scaling."
    keys = {key.removeprefix(prefix) for key in meta if key.startswith(prefix)}
    if keys - ROPE_SCALING_KEYS:
        unknown = ", ".join(sorted(keys - ROPE_SCALING_KEYS))
        raise UnsupportedModelError(f"{where}: rope.scaling settings {unknown} are not supported")
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return base | {"rope_type": "default"}
    scaled = base | {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        length = get("rope.scaling.original_context_length")
        scaled["original_max_position_embeddings"] = length
    return scaled


def _lookup(meta: Mapping[str, Any], prefix: str, where: str) -> Callable[..., Any]:
    """Return ``get(key[, default])`` for one architecture's keys; without default it must exist."""

    def get(key: str, *default: Any) -> Any:
        if prefix + key not in meta and not default:
            raise ModelError(f"{where}: metadata {prefix}{key} is missing or not a single value")
        return meta.get(prefix + key, *default)

    return get
