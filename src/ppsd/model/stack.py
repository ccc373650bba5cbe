"""Consecutive decoder layers with their key/value cache: what stages and exit heads consist of."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.layers import LayerWeights, Rope, cached_attention, causal_mask, decoder_layer
from ppsd.model.passes import Interrupted, Layers
from ppsd.model.spec import ModelSpec


class LayerStack:
    """Layers that rows pass one after another; a few bfloat16 rows on a CPU through kernels.c."""

    def __init__(
        self, weights: Sequence[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache
    ) -> None:
        self._weights = weights
        self._spec = spec
        self._rope = rope
        self._cache = cache

    def forward(
        self, x: torch.Tensor, position: int, interrupted: Interrupted = lambda: False
    ) -> torch.Tensor | None:
        """Rows ``x`` [n, C] at ``position`` after the last layer; see StageModel.forward."""
        self._cache.reserve(position, len(x))
        if self._compiled is not None and kernels.takes(x):
            y = self._compiled.run(x, position, interrupted)
        else:
            y = self._by_operations(x, position, interrupted)
        if y is not None:
            self._cache.advance(position, len(x))
        return y

    @functools.cached_property
    def _compiled(self) -> Layers | None:
        spec = self._spec
        sizes = spec.hidden_size, spec.head_dim, spec.num_heads * spec.head_dim
        if not self._weights or not kernels.suits(
            self._weights[0].qkv, *sizes, spec.intermediate_size
        ):
            return None
        pointers = [weights.pointers for weights in self._weights]
        tables, cache = (self._rope.cos, self._rope.sin), self._cache
        return Layers(pointers, self._spec, tables, cache.keys, cache.values)

    def _by_operations(
        self, x: torch.Tensor, position: int, interrupted: Interrupted
    ) -> torch.Tensor | None:
        mask = causal_mask(position, len(x), x.device)
        caches = zip(self._cache.keys, self._cache.values, strict=True)
        for weights, (keys, values) in zip(self._weights, caches, strict=True):
            if interrupted():
                return None
            attention = cached_attention(keys, values, position, mask)
            x = decoder_layer(x, weights, self._spec, self._rope, attention, position)
        return x
