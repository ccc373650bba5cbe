"""Run decoder layers over a key/value cache, by PyTorch's operations or by kernels.c.

A third way, for GPUs, is in steps.py. Which one a stage or head takes is chosen when it is loaded
(stage.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch

from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.kernels import FLOAT, INT, LONG, MAX_ROWS, POINTER
from ppsd.model.layers import (
    FIELDS,
    DecoderLayer,
    LayerWeights,
    Rope,
    cached_attention,
    causal_mask,
)
from ppsd.model.passes import Pass, Place, Watch
from ppsd.model.spec import ModelSpec

UNWATCHED: tuple[int | None, int | None, int] = (None, None, 0)


class Runner(Protocol):
    """Consecutive decoder layers with their key/value cache."""

    cache: KVCache

    def start(self, rows: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Return a pass of ``rows`` [n, C], which stand at ``position`` of a slot.

        Raises ProtocolError when rows before ``position`` are missing.
        """

    def start_rows(self, rows: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Return a pass of ``rows`` [n, C] of candidate trees of any slots.

        Parents stand before their children. A row has the bits that ``start`` would give it alone
        at its position, behind its ancestors. Which rows are verified stays as it is. Raises
        ProtocolError for a slot, cell, position or path that cannot be.
        """


class TorchRunner:
    """Run layers by PyTorch's operations."""

    def __init__(
        self, weights: Sequence[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache
    ) -> None:
        self.layers = [DecoderLayer(layer, spec) for layer in weights]
        self.rope, self.cache = rope, cache
        self.views = [cache.views(slot) for slot in range(len(cache.lengths))]

    def start(self, rows: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Start a pass."""
        self.cache.reserve(position, len(rows), slot)
        return TorchPass(self, rows, position, slot)

    def start_rows(self, rows: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start a pass of rows of trees."""
        return RowsInTurn(self, rows, places)


class TorchPass:
    """A pass through the layers of a TorchRunner."""

    def __init__(self, runner: TorchRunner, rows: torch.Tensor, position: int, slot: int) -> None:
        self.hidden = rows
        self._runner, self._position, self._slot = runner, position, slot
        self._mask = causal_mask(position, len(rows), rows.device)
        self._done = 0

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        runner, position = self._runner, self._position
        count = len(runner.layers)
        while self._done < count:
            keys, values = runner.views[self._slot][self._done]
            attention = cached_attention(keys, values, position, self._mask)
            layer = runner.layers[self._done]
            self.hidden = layer(self.hidden, runner.rope, attention, position)
            self._done += 1
            if watch is not None and self._done < count and (watch.blind or watch.changed()):
                return False
        runner.cache.advance(position, len(self.hidden), self._slot)
        return True


class RowsInTurn:
    """A pass of rows of trees through any runner: each is run as plain decoding would run it.

    Between two calls the cells are as the rows' places say.
    """

    def __init__(self, runner: Runner, rows: torch.Tensor, places: Sequence[Place]) -> None:
        runner.cache.check(places, len(rows))
        self.hidden = torch.empty_like(rows)
        self._runner = runner
        parts = torch.split(rows, 1), places, torch.split(self.hidden, 1)
        self._waiting = list(zip(*parts, strict=True))[::-1]
        self._running: Pass | None = None

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        while self._waiting:
            row, place, result = self._waiting[-1]
            with self._runner.cache.in_order(place):
                if self._running is None:
                    self._running = self._runner.start(row.clone(), place.position, place.slot)
                if not self._running.advance(watch):
                    return False
            result.copy_(self._running.hidden)
            self._running = None
            self._waiting.pop()
            if self._waiting and watch is not None and (watch.blind or watch.changed()):
                return False
        return True


class Shape(ctypes.Structure):
    """The sizes of a pass and its layers: Shape of kernels.c."""

    _fields_ = [
        *((name, LONG) for name in ("rows", "position", "hidden", "heads", "groups", "size")),
        ("inner", LONG),
        ("capacity", LONG),
        ("eps", FLOAT),
        ("threads", INT),
    ]


class CompiledRunner:
    """Run up to MAX_ROWS rows by kernels.c, and longer blocks as TorchRunner does.

    A pass reads more weights than CPU caches hold, so it finds none of Python's own code there:
    what does not change from pass to pass is laid out here.
    """

    def __init__(
        self, weights: Sequence[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache
    ) -> None:
        library = kernels.loaded()
        assert library is not None
        self.run = library.decoder_layers
        self.cache, self.count = cache, len(weights)
        self._blocks = TorchRunner(weights, spec, rope, cache)
        pointers = [_pointers(layer) for layer in weights]
        self._tables = [_layer_table(pointers, cache, slot) for slot in range(len(cache.lengths))]
        self.tables_at = [ctypes.addressof(table) for table in self._tables]
        self._held = weights, rope, pointers  # by address alone below
        self.rope_at = rope.cos.data_ptr(), rope.sin.data_ptr()
        self.turn = spec.head_dim * rope.cos.itemsize  # bytes of a position
        cells = cache.keys[0].shape[2]
        self._end = min(cells, rope.cos.shape[0])
        sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size
        self.shape = Shape(0, 0, spec.hidden_size, *sizes, cells, spec.rms_norm_eps)
        self.shape_at = ctypes.addressof(self.shape)

    def start(self, rows: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Start a pass."""
        count = rows.shape[0]
        if count > MAX_ROWS:
            return self._blocks.start(rows, position, slot)
        assert rows.dtype == torch.bfloat16  # others would be misread
        assert position + count <= self._end
        self.cache.reserve(position, count, slot)
        return CompiledPass(self, rows.contiguous(), position, slot)

    def start_rows(self, rows: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start a pass of rows of trees."""
        return RowsInTurn(self, rows, places)


class CompiledPass:
    """A pass through the layers of a CompiledRunner."""

    def __init__(
        self, runner: CompiledRunner, rows: torch.Tensor, position: int, slot: int
    ) -> None:
        self.hidden = hidden = torch.empty_like(rows)
        self._runner, self._rows, self._position, self._slot = runner, rows, position, slot
        cos, sin = runner.rope_at
        turned = position * runner.turn
        self._places = rows.data_ptr(), hidden.data_ptr(), runner.tables_at[slot]
        self._rope = cos + turned, sin + turned
        self._done = 0

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        runner, rows = self._runner, self._rows.shape[0]
        end, words = runner.count, UNWATCHED
        if watch is not None:
            words = watch.places
            end = self._done + 1 if watch.blind else end
        shape = runner.shape
        shape.rows, shape.position = rows, self._position
        shape.threads = torch.get_num_threads()
        self._done = done = runner.run(
            *self._places, self._done, end, runner.shape_at, *self._rope, *words
        )
        if done < 0:
            raise MemoryError("no memory for the work space of a decoder layer")
        if done < runner.count:
            return False
        runner.cache.advance(self._position, rows, self._slot)
        return True


def _pointers(layer: LayerWeights) -> kernels.Pointers:
    """Return the addresses of a layer's tensors, in the order of kernels.c."""
    matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return kernels.pointers([getattr(layer, field.name) for field in FIELDS], matrices)


def _layer_table(
    pointers: Sequence[kernels.Pointers], cache: KVCache, slot: int
) -> kernels.Pointers:
    """Return the addresses of the layers' weights, keys and values for a slot."""
    flat = []
    for weights, (keys, values) in zip(pointers, cache.views(slot), strict=True):
        flat += [ctypes.addressof(weights), keys.data_ptr(), values.data_ptr()]
    return (POINTER * len(flat))(*flat)
