"""Stages: contiguous decoder layers, with the embedding or the LM head where they own it.

A stage knows nothing of other stages or of how rows reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch

from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.kernels import Kind, Weight
from ppsd.model.layers import FIELDS, LayerWeights, Norm, Product, Rope
from ppsd.model.names import (
    EMBEDDING,
    FINAL_NORM,
    FUSED,
    NORMS,
    expected_shapes,
    layer_prefix,
    layer_tensor_names,
    lm_head_name,
    tensor_names,
)
from ppsd.model.packed import Codes, can_pack, pack, packed_bytes
from ppsd.model.passes import Pass, Piece, Place
from ppsd.model.runners import CompiledRunner, Runner, TorchRunner, together
from ppsd.model.spec import ModelSpec
from ppsd.model.steps import CudaGraphs, CudaRunner
from ppsd.model.weights import TensorSource

ALIGNMENT = 128  # bytes: a tensor begins with a cache line

Progress = Callable[[int, int], None]
Names = Sequence[str]


class StageModel(Protocol):
    """The pipeline's view of a stage; tests put a hash in its place."""

    @property
    def is_last(self) -> bool:
        """Return True if ``logits`` may be called."""

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Start a pass of token ids [n] (first stage) or hidden rows [n, C] of a slot.

        The first of them stands at ``position``. Raises ProtocolError when rows before it are
        missing.
        """

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start a pass of token ids [n] or hidden rows [n, C] of candidate trees; see Runner."""

    def start_joined(self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start one pass of a piece of a prompt and of rows of other slots; its rows come first.

        Every row has the bits that ``start`` and ``start_rows`` would give it.
        """

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Declare the first ``length`` rows of a slot verified; see KVCache."""

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` rows of a slot to another; see KVCache."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return target logits [n, vocabulary] of the last stage's output rows [n, C]."""

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the same, each row with the bits that it has alone."""


@dataclass(frozen=True)
class StagePlan:
    """Layers [first, last) of a model, and how to hold them.

    ``packed``: keep weights in the codes of their file where products are faster for it.
    ``slots``: sequences whose rows the cache holds side by side. ``loose``: cells a slot has for
    rows of candidate trees.
    """

    first: int
    last: int
    max_context: int
    dtype: torch.dtype
    device: torch.device
    packed: bool = False
    slots: int = 1
    loose: int = 0


def packable(
    source: TensorSource, plan: StagePlan, shapes: Mapping[str, tuple[int, ...]], names: Names
) -> bool:
    """Return True if weights, held as one, can be kept in the codes of their file."""
    if not plan.packed or plan.dtype != torch.bfloat16 or plan.device.type != "cpu":
        return False
    kinds = {source.kind(name) for name in names}
    rows = sum(shapes[name][0] for name in names)
    return len(kinds) == 1 and None not in kinds and can_pack(rows, shapes[names[0]][1])


def packed_groups(spec: ModelSpec, plan: StagePlan, source: TensorSource) -> list[Names]:
    """Return the names of a stage's weights that stay in the codes of their file, by product."""
    shapes = expected_shapes(spec)
    groups: list[Names] = [
        [f"{layer_prefix(i)}{name}.weight" for name in names]
        for i in range(plan.first, plan.last)
        for names in FUSED.values()
    ]
    groups += [[lm_head_name(spec)]] if plan.last == spec.num_layers else []
    return [names for names in groups if packable(source, plan, shapes, names)]


def weight_bytes(spec: ModelSpec, plan: StagePlan, source: TensorSource) -> int:
    """Return the bytes of a stage's weights, without reading any of them."""
    shapes, groups = expected_shapes(spec), packed_groups(spec, plan, source)
    packed = {name for names in groups for name in names}
    size = 0
    for names in groups:
        rows, inputs = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        size += _aligned(packed_bytes(rows, inputs, source.kind(names[0]) or Kind.NUMBERS))
    for name in tensor_names(spec, plan.first, plan.last):
        if name not in packed or (name == EMBEDDING and plan.first == 0):
            size += _aligned(prod(shapes[name]) * plan.dtype.itemsize)
    return size


def fuse_layer(tensors: Mapping[str, Any], prefix: str) -> LayerWeights:
    """Fuse one layer's tensors or Codes, whose names start with ``prefix``."""
    held: dict[str, Any] = {
        field: tensors.get(f"{prefix}{name}.weight") for field, name in NORMS.items()
    }
    for field, names in FUSED.items():
        held[field] = _joined([tensors[f"{prefix}{name}.weight"] for name in names])
        biases = [tensors.get(f"{prefix}{name}.bias") for name in names]
        held[f"{field}_bias"] = _joined([bias for bias in biases if bias is not None])
    return LayerWeights(**held)


def _joined(parts: list[Any]) -> Weight | None:
    """Join parts of a weight, all tensors or all Codes, one below the other."""
    if not parts:
        return None
    return pack(parts) if isinstance(parts[0], Codes) else torch.cat(parts)


class _Memory:
    """One stretch of memory for all weights of a stage, taken and touched before any is read.

    ``keep``, ``keep_weight`` and ``keep_layer`` return copies in it.

    Taken bit by bit, while other stages load theirs, it lies scattered and is read more slowly.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._rest = torch.empty(size, dtype=torch.uint8, device=device).zero_()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.nbytes
        place, self._rest = self._rest[:size], self._rest[_aligned(size) :]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def keep_weight(self, weight: Weight) -> Weight:
        if isinstance(weight, torch.Tensor):
            return self.keep(weight)
        return replace(weight, data=self.keep(weight.data))

    def keep_layer(self, weights: LayerWeights) -> LayerWeights:
        held = {field.name: getattr(weights, field.name) for field in FIELDS}
        kept: dict[str, Any] = {n: self.keep_weight(w) for n, w in held.items() if w is not None}
        return replace(weights, **kept)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Stage:
    """Layers [first, last) of a model with their key/value cache."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: StagePlan,
        source: TensorSource,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        kernels.name(str(plan.dtype).removeprefix("torch."), str(plan.device))  # decided now
        self._names = tensor_names(spec, plan.first, plan.last)
        self._loaded: set[str] = set()
        self._progress = progress
        self._source = source
        groups = packed_groups(spec, plan, source)
        self._packed = {name for names in groups for name in names}
        self._memory = _Memory(weight_bytes(spec, plan, source), plan.device)
        table = self._load_embedding()
        self.embedding = table if plan.first == 0 else None  # [V, C]
        self.layers = [self._load_layer(i) for i in range(plan.first, plan.last)]
        self.norm = self._load(FINAL_NORM) if self.is_last else None  # [C]
        self.lm_head = self._load_lm_head(table) if self.is_last else None  # [V, C]
        del self._source, self._memory
        self.rope = Rope(spec, plan.max_context, plan.dtype, plan.device)
        self.cache = new_cache(spec, len(self.layers), plan)
        self._runner = new_runner(self.layers, spec, self.rope, self.cache)
        self._score = (
            None
            if self.lm_head is None
            else Product(self.lm_head, None, self.norm, spec.rms_norm_eps)
        )

    @property
    def is_last(self) -> bool:
        return self.plan.last == self.spec.num_layers

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._source.load(name, self.plan.dtype).to(self.plan.device)
        self._note(name)
        return tensor

    def _load_codes(self, name: str) -> Codes:
        codes = self._source.codes(name)
        self._note(name)
        return codes

    def _note(self, name: str) -> None:
        self._loaded.add(name)
        self._progress(len(self._loaded), len(self._names))

    def _load_embedding(self) -> torch.Tensor | None:
        """Load the embedding if this stage has it, or a tied LM head of the same numbers."""
        tied_head = self.is_last and self.spec.tie_embeddings and EMBEDDING not in self._packed
        if self.plan.first > 0 and not tied_head:
            return None
        return self._memory.keep(self._load(EMBEDDING))

    def _load_layer(self, layer: int) -> LayerWeights:
        names = layer_tensor_names(self.spec, layer)
        tensors = {n: self._load_codes(n) if n in self._packed else self._load(n) for n in names}
        return self._memory.keep_layer(fuse_layer(tensors, layer_prefix(layer)))

    def _load_lm_head(self, embedding: torch.Tensor | None) -> Weight:
        name = lm_head_name(self.spec)
        if name in self._packed:
            return self._memory.keep_weight(pack([self._load_codes(name)]))
        if self.spec.tie_embeddings and embedding is not None:
            return embedding
        return self._memory.keep(self._load(name))

    def _entered(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device != self.plan.device:
            inputs = inputs.to(self.plan.device)
        return inputs if self.embedding is None else self.embedding.index_select(0, inputs)

    def start(self, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        return self._runner.start(self._entered(inputs), position, slot)

    def start_rows(self, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return self._runner.start_rows(self._entered(inputs), places)

    def start_joined(self, piece: Piece, inputs: torch.Tensor, places: Sequence[Place]) -> Pass:
        return together([self.start(*piece), self.start_rows(inputs, places)])

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        self.cache.commit(slot, length, moves)

    def share(self, source: int, slot: int, length: int) -> None:
        self.cache.share(source, slot, length)

    def forward(self, inputs: torch.Tensor, position: int) -> torch.Tensor:
        """Run a pass of slot 0 to its end and return its rows [n, C]; see StageModel.start."""
        started = self.start(inputs, position)
        started.advance()
        return started.hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return target logits [n, vocabulary] of the last stage's output rows [n, C]."""
        assert self._score is not None, "only the last stage has logits"
        return self._without_unused(self._score(hidden))

    def row_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the same, each row with the bits that it has alone."""
        assert self._score is not None, "only the last stage has logits"
        return self._without_unused(self._score.by_rows(hidden))

    def _without_unused(self, logits: torch.Tensor) -> torch.Tensor:
        if self.spec.unused_ids:
            logits[:, list(self.spec.unused_ids)] = float("-inf")
        return logits

    def final_norm(self) -> Norm:
        """Return the norm before the LM head."""
        assert self.norm is not None, "only the last stage has a final norm"
        return Norm(self.norm, self.spec.rms_norm_eps)


def new_cache(spec: ModelSpec, layers: int, plan: StagePlan) -> KVCache:
    """Return a cache of ``layers`` layers for the plan's sizes, dtype and device."""
    return KVCache(
        layers,
        spec.num_kv_heads,
        plan.max_context,
        spec.head_dim,
        plan.dtype,
        plan.device,
        slots=plan.slots,
        loose=plan.loose,
        spare=int(plan.device.type == "cuda"),
    )


def new_runner(
    weights: Sequence[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache
) -> Runner:
    """Choose what runs these layers, once and for all, by their device, dtype and sizes."""
    if not weights:
        return TorchRunner(weights, spec, rope, cache)
    if weights[0].input_norm.is_cuda:
        return CudaRunner(weights, spec, rope, cache, CudaGraphs())
    sizes = spec.hidden_size, spec.head_dim, spec.num_heads * spec.head_dim
    if kernels.supports(weights[0].qkv, *sizes, spec.intermediate_size):
        return CompiledRunner(weights, spec, rope, cache)
    return TorchRunner(weights, spec, rope, cache)
