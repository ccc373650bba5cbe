"""GGUF files: tensors under canonical names, and the model they describe.

The gguf package supplies the dequantisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model.gguf_codes import KINDS, codes_of
from ppsd.model.gguf_config import config_record, end_ids
from ppsd.model.gguf_header import read_header, read_parts
from ppsd.model.kernels import Kind
from ppsd.model.names import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from ppsd.model.packed import Codes
from ppsd.model.row_file import RowFile
from ppsd.model.spec import ModelSpec, config_from_dict, spec_from_config

CHUNK = 1 << 20  # elements dequantised at a time: large tensors need no float32 copy
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
TOKENS = "tokenizer.ggml.tokens"


class GGUFSource:
    """The tensors of a GGUF file under canonical names, dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header, self._parts = read_parts(path)
        names = self._header.tensors.keys() - {ROPE_FACTORS}
        self._stored = {canonical_name(name): name for name in names}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return all shapes; a tensor without a canonical name keeps its own."""
        return {name: self._header.tensors[own].shape for name, own in self._stored.items()}

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._stored:
            raise ModelError(f"{self._path}: tensor {stored_name(name)} is missing")
        tensor = self._dequantise(self._stored[name], dtype)
        heads = self._permuted_heads(name)
        return unpermute(tensor, heads) if heads else tensor

    def rows(self, name: str, dtype: torch.dtype) -> RowFile:
        stored = self._stored[name]
        heads = self._permuted_heads(name)
        entry, data = self._header.tensors[stored], self._rows(stored)

        def decode(rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(dequantize(rows, entry.kind)).to(dtype)

        order = unpermute(torch.arange(len(data)), heads) if heads else None
        return RowFile(self._parts[entry.part].path, entry.offset, data.shape[1], decode, order)

    def name_in_file(self, name: str) -> str:
        return self._stored.get(name) or stored_name(name)

    def kind(self, name: str) -> Kind | None:
        return KINDS.get(self._header.tensors[self._stored[name]].kind)

    def codes(self, name: str) -> Codes:
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
        where = str(self._path)
        config = config_from_dict(config_record(self._header, where), where)
        tokens = read_header(self._path, {TOKENS}).metadata.get(TOKENS, [])
        if not isinstance(tokens, list):
            raise ModelError(f"{where}: metadata {TOKENS} must be an array, got a single value")
        spec = spec_from_config(config, name, end_ids(self._header, tokens, where))
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
        """Return a tensor's bytes, row by row."""
        entry = self._header.tensors[stored]
        rows = np.frombuffer(self._parts[entry.part].data, np.uint8, entry.nbytes, entry.offset)
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


def stored_name(canonical: str) -> str:
    """Return the name that GGUF files use for a tensor: the inverse of ``canonical_name``."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", canonical)
    for own, inside in LAYER_NAMES.items():
        if match and match[2] == inside:
            return f"blk.{match[1]}.{own}.{match[3]}"
    return next((own for own, name in GLOBAL_NAMES.items() if name == canonical), canonical)


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of query and key rows, a weight's or a bias's.

    Its converter interleaves the two halves of every head, because it rotates neighbouring
    elements where Hugging Face rotates elements half a head apart.
    """
    halves = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
