"""The Llama-family decoder layer as plain functions over its weights. Used by stages and heads.

Shapes: n rows of one sequence, C hidden size, H query heads, K key/value heads, D head size,
F intermediate size, T positions so far.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ppsd.model import kernels
from ppsd.model.packed import Weight, whole
from ppsd.model.spec import ModelSpec

# From this many rows on, CPUs without bfloat16/float16 matrix instructions are faster when the
# weights are widened to float32 for the product: their narrow kernels work row by row.
WIDEN_ROWS = 3
WIDEN_AT_ONCE = 4096  # output rows: an LM head widened as a whole would leave the cache
_NATIVE = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


# q [n, H, D], k [n, K, D], v [n, K, D] to [n, H·D]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; q, k, v and gate, up are fused along their output dimension."""

    input_norm: torch.Tensor  # [C]
    qkv: Weight  # [(H + 2K)·D, C]
    o: Weight  # [C, H·D]
    post_norm: torch.Tensor  # [C]
    gate_up: Weight  # [2F, C]
    down: Weight  # [C, F]
    qkv_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [D]
    k_norm: torch.Tensor | None = None  # [D]

    @functools.cached_property
    def pointers(self) -> kernels.Pointers:
        """Where the tensors lie, in order, as kernels.c wants them."""
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        return kernels.pointers([getattr(self, field.name) for field in FIELDS], matrices)


FIELDS = fields(LayerWeights)


class Rope:
    """Cosines and signed sines of rotary embeddings, [max_context, 1, D] each."""

    def __init__(
        self, spec: ModelSpec, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(max_context, dtype=torch.float32)
        angles = torch.outer(positions, torch.tensor(spec.inv_freq, dtype=torch.float32))
        sin = angles.sin() * spec.rope_scale
        cos = angles.cos() * spec.rope_scale
        self.cos = torch.cat([cos, cos], -1).to(device, dtype).unsqueeze(1)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype).unsqueeze(1)

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotate ``x`` [n, heads, D], whose first row stands at ``position``."""
        rows = slice(position, position + x.shape[0])
        turned = torch.roll(x, x.shape[-1] // 2, -1)
        return x * self.cos[rows] + turned * self.sin[rows]


class RopeRows(Rope):
    """Rotary rows of arbitrary positions [n], one for each row."""

    def __init__(self, rope: Rope, positions: torch.Tensor) -> None:
        self.cos = rope.cos[positions]
        self.sin = rope.sin[positions]


def _widen(x: torch.Tensor, rows: int) -> bool:
    return rows >= WIDEN_ROWS and x.device.type == "cpu" and not _NATIVE.get(x.dtype, True)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias``; [n, out]."""
    if kernels.fits(x, weight):
        return kernels.Product(weight, bias)(x)
    weight = whole(weight)
    if not _widen(x, x.shape[0]):
        return F.linear(x, weight, bias)
    if weight.shape[0] <= WIDEN_AT_ONCE:
        return _wide_linear(x, weight, bias)
    weights = torch.split(weight, WIDEN_AT_ONCE)
    biases = [None] * len(weights) if bias is None else torch.split(bias, WIDEN_AT_ONCE)
    return torch.cat([_wide_linear(x, *p) for p in zip(weights, biases, strict=True)], 1)


def _wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 or wider (Zhang 2019)."""
    if kernels.fits(x, weight):
        return kernels.rms_norm(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


class Product:
    """``linear`` with one weight, and before it ``rms_norm`` where there is a ``norm`` [in]."""

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self._parts = weight, bias, norm, eps

    @functools.cached_property
    def _compiled(self) -> kernels.Product | None:
        weight = self._parts[0]
        suited = kernels.suits(weight, weight.shape[1])
        return kernels.Product(*self._parts) if suited else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows ``x`` [n, in] to [n, out]."""
        if self._compiled is not None and kernels.takes(x):
            return self._compiled(x)
        weight, bias, norm, eps = self._parts
        return linear(x if norm is None else rms_norm(x, norm, eps), weight, bias)


def causal_mask(position: int, rows: int, device: torch.device) -> torch.Tensor | None:
    """Which of T = position + rows positions each row may see, [rows, T]; None for one row."""
    if rows == 1:
        return None
    total = position + rows
    return torch.ones(rows, total, dtype=torch.bool, device=device).tril(position)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of ``q`` [n, H, D] over ``k``, ``v`` [K, T, D] under ``mask`` [n, T]; [n, H·D].

    The H/K query heads that share a key/value head are taken as extra rows of it: one plain
    product a head group, without repeating keys.
    """
    n, heads, size = q.shape
    groups = k.shape[0]
    shared = heads // groups
    rows = q.view(n, groups, shared, size).permute(1, 2, 0, 3).reshape(1, groups, -1, size)
    if mask is not None:
        mask = mask.repeat(shared, 1)
    if _widen(q, n):
        out = F.scaled_dot_product_attention(rows.float(), k.float()[None], v.float()[None], mask)
        out = out.to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(rows, k[None], v[None], mask)
    return out.view(groups, shared, n, size).permute(2, 0, 1, 3).reshape(n, heads * size)


def project_qkv(
    x: torch.Tensor, weights: LayerWeights, spec: ModelSpec, rope: Rope, position: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normed ``x`` [n, C] to rotated q [n, H, D], rotated k [n, K, D] and v [n, K, D]."""
    n = x.shape[0]
    qkv = linear(x, weights.qkv, weights.qkv_bias).view(n, -1, spec.head_dim)
    rotated, v = torch.split(qkv, [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], 1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = torch.split(rotated, [spec.num_heads, spec.num_kv_heads], 1)
        q = rms_norm(q, weights.q_norm, spec.rms_norm_eps)
        k = rms_norm(k, weights.k_norm, spec.rms_norm_eps)
        rotated = torch.cat([q, k], 1)
    rotated = rope.rotate(rotated, position)
    q, k = torch.split(rotated, [spec.num_heads, spec.num_kv_heads], 1)
    return q, k, v


def mlp(x: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
    """Gated SiLU feed-forward of ``x`` [n, C] (Shazeer 2020)."""
    gate, up = linear(x, weights.gate_up, weights.gate_up_bias).chunk(2, -1)
    return linear(F.silu(gate) * up, weights.down, weights.down_bias)


def decoder_layer(
    x: torch.Tensor,
    weights: LayerWeights,
    spec: ModelSpec,
    rope: Rope,
    attention: Attention,
    position: int = 0,
) -> torch.Tensor:
    """Run one layer over rows ``x`` [n, C] by PyTorch's operations; gradients flow where asked for.

    ``rope`` turns the rows from ``position`` on; ``attention`` knows what they may see, and keeps
    their keys and values.
    """
    normed = rms_norm(x, weights.input_norm, spec.rms_norm_eps)
    attended = attention(*project_qkv(normed, weights, spec, rope, position))
    x = x + linear(attended, weights.o, weights.o_bias)
    return x + mlp(rms_norm(x, weights.post_norm, spec.rms_norm_eps), weights)


def cached_attention(
    keys: torch.Tensor, values: torch.Tensor, position: int, mask: torch.Tensor | None
) -> Attention:
    """Return attention of rows at ``position`` over a cache ``keys``, ``values`` [K, cap, D].

    The rows' own keys and values are written to it first.
    """

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        end = position + q.shape[0]
        keys[:, position:end] = k.transpose(0, 1)
        values[:, position:end] = v.transpose(0, 1)
        return attend(q, keys[:, :end], values[:, :end], mask)

    return attention
