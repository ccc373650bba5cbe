"""The codes, scales and offsets of GGUF's block formats, as they lie in a file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Quant
from gguf.quants import Q4_K

from ppsd.model.kernels import Kind
from ppsd.model.packed import BLOCK, Codes

Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, offsets of all blocks
HALF = 2  # bytes of a float16


def codes_of(rows: np.ndarray, quant: Quant) -> Codes:
    """Return the weight [out, in] of blocks ``rows``, uint8 [out, bytes]; ``quant`` is in KINDS."""
    out = len(rows)
    codes, scales, offsets = _READERS[quant](rows.reshape(-1, GGML_QUANT_SIZES[quant][1]))

    def numbers(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).reshape(out, -1))

    whole = torch.from_numpy(np.ascontiguousarray(codes).reshape(out, -1))
    return Codes(whole, numbers(scales), None if offsets is None else numbers(offsets))


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at byte ``at`` of every block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + HALF]).view(np.float16)


def _floats(blocks: np.ndarray, at: int) -> np.ndarray:
    return _halves(blocks, at).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Return all low nibbles of each row [n, k], then all high ones, [n, 2k]."""
    return np.concatenate([packed & 0xF, packed >> 4], 1)


def _q4_0(blocks: np.ndarray) -> Parts:
    scale = _halves(blocks, 0)
    with np.errstate(over="ignore"):  # infinite then, which GGUFSource refuses
        return _nibbles(blocks[:, HALF:]), scale, -8 * scale


def _q4_1(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[:, 2 * HALF :]), _halves(blocks, 0), _halves(blocks, HALF)


def _q4_k(blocks: np.ndarray) -> Parts:
    at = 2 * HALF + Q4_K.K_SCALE_SIZE
    scales, least = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 2 * HALF : at]))
    codes = _nibbles(np.ascontiguousarray(blocks[:, at:]).reshape(-1, BLOCK))
    return codes, _floats(blocks, 0) * scales, -_floats(blocks, HALF) * least


def _q8_0(blocks: np.ndarray) -> Parts:
    return np.ascontiguousarray(blocks[:, HALF:]).view(np.int8), _halves(blocks, 0), None


_READERS: dict[Quant, Callable[[np.ndarray], Parts]] = {
    Quant.Q4_0: _q4_0,
    Quant.Q4_1: _q4_1,
    Quant.Q4_K: _q4_k,
    Quant.Q8_0: _q8_0,
}
KINDS = {
    Quant.Q4_0: Kind.CODES_4,
    Quant.Q4_1: Kind.CODES_4,
    Quant.Q4_K: Kind.CODES_4_WIDE,
    Quant.Q8_0: Kind.CODES_8,
}
