"""The Llama-family decoder layer by PyTorch's operations.

Shapes: n rows of one sequence, C hidden size, H query heads, K key/value heads, D head size, F
intermediate size, T positions so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ppsd.model import kernels
from ppsd.model.kernels import Weight
from ppsd.model.packed import whole
from ppsd.model.spec import ModelSpec

# From this many rows on, CPUs without bfloat16/float16 matrix instructions are faster when the
# weights are widened to float32 for the product: their narrow kernels work row by row.
WIDEN_ROWS = 3
WIDEN_AT_ONCE = 4096  # output rows: an LM head widened as a whole would leave the cache
NATIVE = {
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
    return rows >= WIDEN_ROWS and x.device.type == "cpu" and not NATIVE.get(x.dtype, True)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias``; [n, out]."""
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
    """Return the root-mean-square norm over the last dimension (Zhang 2019).

    It is computed in float32 or wider.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


class Norm:
    """``rms_norm`` with one weight; compiled for few rows where kernels support the weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        self._compiled = kernels.supports(weight, weight.shape[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` [n, …, in] normed over its last dimension."""
        if self._compiled and x.shape[0] <= kernels.MAX_ROWS:
            return kernels.rms_norm(x, self._weight, self._eps)
        return rms_norm(x, self._weight, self._eps)


class Product:
    """``linear`` with one weight, and before it ``rms_norm`` where there is a ``norm`` [in].

    Compiled for few rows where kernels support the weight, which is decided here. No gradient flows
    back through a weight that needs none.
    """

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self._parts = weight, bias, norm, eps
        supported = kernels.supports(weight, weight.shape[1])
        self._compiled = kernels.Product(*self._parts) if supported else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product [n, out] of rows ``x`` [n, in]."""
        if self._compiled is not None and x.shape[0] <= kernels.MAX_ROWS:
            return self._compiled(x)
        weight, bias, norm, eps = self._parts
        return linear(x if norm is None else rms_norm(x, norm, eps), whole(weight), bias)

    def by_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with the bits that each row has alone."""
        together = 1 if self._compiled is None else kernels.MAX_ROWS
        # copies lie as aligned as a row alone, on which a library's bits may rest
        return torch.cat([self(rows.clone()) for rows in torch.split(x, together)])


def causal_mask(position: int, rows: int, device: torch.device) -> torch.Tensor | None:
    """Return which of T = position + rows positions each row may see; None for one row."""
    if rows == 1:
        return None
    total = position + rows
    return torch.ones(rows, total, dtype=torch.bool, device=device).tril(position)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend with ``q`` [n, H, D] to ``k``, ``v`` [K, T, D] under ``mask`` [n, T]; [n, H·D].

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


class DecoderLayer:
    """One decoder layer over the rows of any sequences; gradients flow where weights ask for them.

    What its rows may see, and where their keys and values are kept, is up to ``attention``.
    """

    def __init__(self, weights: LayerWeights, spec: ModelSpec) -> None:
        w, eps = weights, spec.rms_norm_eps
        self._qkv = Product(w.qkv, w.qkv_bias, w.input_norm, eps)
        self._o = Product(w.o, w.o_bias)
        self._gate_up = Product(w.gate_up, w.gate_up_bias, w.post_norm, eps)
        self._down = Product(w.down, w.down_bias)
        self._q_norm = None if w.q_norm is None else Norm(w.q_norm, eps)
        self._k_norm = None if w.k_norm is None else Norm(w.k_norm, eps)
        self._spec = spec

    def __call__(
        self, x: torch.Tensor, rope: Rope, attention: Attention, position: int = 0
    ) -> torch.Tensor:
        """Return rows ``x`` [n, C] after the layer; ``rope`` turns them from ``position`` on."""
        return self.after_mlp(self.after_attention(x, rope, attention, position))

    def after_attention(
        self, x: torch.Tensor, rope: Rope, attention: Attention, position: int = 0
    ) -> torch.Tensor:
        """Return rows ``x`` [n, C] after the layer's first half."""
        return x + self._o(attention(*self._attention_inputs(x, rope, position)))

    def after_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows ``x`` [n, C] after the layer's second half."""
        gate, up = self._gate_up(x).chunk(2, -1)  # gated SiLU (Shazeer 2020)
        return x + self._down(F.silu(gate) * up)

    def _attention_inputs(
        self, x: torch.Tensor, rope: Rope, position: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated q [n, H, D] and k [n, K, D], and v [n, K, D]."""
        heads, groups = self._spec.num_heads, self._spec.num_kv_heads
        qkv = self._qkv(x).view(x.shape[0], -1, self._spec.head_dim)
        rotated, v = torch.split(qkv, [heads + groups, groups], 1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = torch.split(rotated, [heads, groups], 1)
            rotated = torch.cat([self._q_norm(q), self._k_norm(k)], 1)
        q, k = torch.split(rope.rotate(rotated, position), [heads, groups], 1)
        return q, k, v


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
