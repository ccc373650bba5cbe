"""A stage: contiguous decoder layers with the embedding or the LM head where it owns them.

Used by worker/ and engine/. A stage knows nothing of other stages or of how rows reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch

from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.layers import (
    FIELDS,
    LayerWeights,
    Rope,
    causal_mask,
    decoder_layer,
    linear,
    rms_norm,
)
from ppsd.model.spec import ModelSpec
from ppsd.model.weights import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    TensorSource,
    expected_shapes,
    layer_prefix,
)

ALIGNMENT = 64  # numbers: a tensor begins with a cache line

Interrupted = Callable[[], bool]
Progress = Callable[[int, int], None]


class StageModel(Protocol):
    """What the pipeline asks of a stage; tests put a hash in its place."""

    @property
    def is_last(self) -> bool:
        """Whether ``logits`` may be called."""

    def forward(
        self, inputs: torch.Tensor, position: int, interrupted: Interrupted
    ) -> torch.Tensor | None:
        """Run token ids [n] (first stage) or hidden rows [n, C] at ``position``; give [n, C].

        ``interrupted`` is asked between layers; once it says yes the result is None and the
        rows count as not written. Raises ProtocolError when rows before ``position`` are missing.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Target logits [n, vocabulary] of the last stage's output rows [n, C]."""


@dataclass(frozen=True)
class StagePlan:
    """Layers [first, last) of a model, and how to hold them."""

    first: int
    last: int
    max_context: int
    dtype: torch.dtype
    device: torch.device


def tensor_names(spec: ModelSpec, first: int, last: int) -> list[str]:
    """Names of the tensors that the stage of layers [first, last) owns, in loading order."""
    names = [name for i in range(first, last) for name in layer_tensor_names(spec, i)]
    if first == 0 or (last == spec.num_layers and spec.tie_embeddings):
        names.insert(0, EMBEDDING)
    if last == spec.num_layers:
        names.append(FINAL_NORM)
        names += [] if spec.tie_embeddings else [LM_HEAD]
    return names


def layer_tensor_names(spec: ModelSpec, layer: int) -> list[str]:
    """Names of one layer's tensors."""
    return [layer_prefix(layer) + name for name in spec.layer_shapes()]


def fuse_layer(tensors: dict[str, torch.Tensor], prefix: str) -> LayerWeights:
    """Take one layer's tensors out of ``tensors`` (names start with ``prefix``) and fuse them."""

    def take(name: str) -> torch.Tensor | None:
        return tensors.pop(prefix + name, None)

    def need(name: str) -> torch.Tensor:
        return tensors.pop(prefix + name)

    def fused(names: tuple[str, ...], kind: str) -> torch.Tensor | None:
        parts = [part for name in names if (part := take(f"{name}.{kind}")) is not None]
        return torch.cat(parts) if parts else None

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    return LayerWeights(
        input_norm=need("input_layernorm.weight"),
        qkv=torch.cat([need(f"{name}.weight") for name in qkv]),
        o=need("self_attn.o_proj.weight"),
        post_norm=need("post_attention_layernorm.weight"),
        gate_up=torch.cat([need(f"{name}.weight") for name in gate_up]),
        down=need("mlp.down_proj.weight"),
        qkv_bias=fused(qkv, "bias"),
        o_bias=take("self_attn.o_proj.bias"),
        gate_up_bias=fused(gate_up, "bias"),
        down_bias=take("mlp.down_proj.bias"),
        q_norm=take("self_attn.q_norm.weight"),
        k_norm=take("self_attn.k_norm.weight"),
    )


class _Memory:
    """One stretch of memory for all weights of a stage, taken and touched before any is read.

    Taken bit by bit, while other stages load theirs, it lies scattered and is read more slowly.
    """

    def __init__(self, sizes: Iterable[int], plan: StagePlan) -> None:
        numbers = sum(map(_aligned, sizes))
        self._rest = torch.empty(numbers, dtype=plan.dtype, device=plan.device).zero_()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in this memory."""
        size = tensor.numel()
        place, self._rest = self._rest[:size], self._rest[_aligned(size) :]
        return place.view(tensor.shape).copy_(tensor)

    def keep_layer(self, weights: LayerWeights) -> LayerWeights:
        """A copy in this memory."""
        held = {field.name: getattr(weights, field.name) for field in FIELDS}
        return replace(weights, **{n: self.keep(t) for n, t in held.items() if t is not None})


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Stage:
    """Layers [first, last) of a model with their key/value cache; see StageModel."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: StagePlan,
        source: TensorSource,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self._names = tensor_names(spec, plan.first, plan.last)
        self._loaded = 0
        self._progress = progress
        self._source = source
        shapes = expected_shapes(spec)
        self._memory = _Memory((prod(shapes[name]) for name in self._names), plan)
        first, last = plan.first == 0, self.is_last
        embedding = self._table(EMBEDDING) if first or self._tied_head else None
        self.embedding = embedding if first else None  # [V, C]
        self.layers = [self._load_layer(i) for i in range(plan.first, plan.last)]
        self.norm = self._load(FINAL_NORM) if last else None  # [C]
        self.lm_head = embedding if self._tied_head else None  # [V, C]
        if last and not self._tied_head:
            self.lm_head = self._table(LM_HEAD)
        del self._source, self._memory
        self.rope = Rope(spec, plan.max_context, plan.dtype, plan.device)
        self.cache = new_cache(spec, len(self.layers), plan)
        kernels.loaded()  # built now, not within the first token

    @property
    def is_last(self) -> bool:
        """Whether this stage ends with the final norm and LM head."""
        return self.plan.last == self.spec.num_layers

    @property
    def _tied_head(self) -> bool:
        return self.is_last and self.spec.tie_embeddings

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._source.load(name, self.plan.dtype).to(self.plan.device)
        self._loaded += 1
        self._progress(self._loaded, len(self._names))
        return tensor

    def _table(self, name: str) -> torch.Tensor:
        return self._memory.keep(self._load(name))

    def _load_layer(self, layer: int) -> LayerWeights:
        names = layer_tensor_names(self.spec, layer)
        fused = fuse_layer({name: self._load(name) for name in names}, layer_prefix(layer))
        return self._memory.keep_layer(fused)

    def forward(
        self, inputs: torch.Tensor, position: int, interrupted: Interrupted = lambda: False
    ) -> torch.Tensor | None:
        """See StageModel."""
        rows = inputs.shape[0]
        self.cache.reserve(position, rows)
        inputs = inputs.to(self.plan.device)
        x = inputs if self.embedding is None else self.embedding.index_select(0, inputs)
        mask = causal_mask(position, rows, x.device)
        for weights, keys, values in zip(
            self.layers, self.cache.keys, self.cache.values, strict=True
        ):
            if interrupted():
                return None
            x = decoder_layer(x, weights, self.spec, self.rope, keys, values, position, mask)
        self.cache.advance(position, rows)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See StageModel."""
        assert self.norm is not None, "only the last stage has logits"
        assert self.lm_head is not None
        return linear(rms_norm(hidden, self.norm, self.spec.rms_norm_eps), self.lm_head)


def new_cache(spec: ModelSpec, layers: int, plan: StagePlan) -> KVCache:
    """A cache of ``layers`` layers for the plan's context, dtype and device."""
    return KVCache(
        layers, spec.num_kv_heads, plan.max_context, spec.head_dim, plan.dtype, plan.device
    )
