"""Run decoder layers over a key/value cache, by PyTorch's operations or by kernels.c.

A third way, for GPUs, is in steps.py. Which one a stage or head takes is chosen when it is loaded
(stage.py).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.kernels import FLOAT, INT, LONG, MAX_ROWS, POINTER
from ppsd.model.layers import (
    FIELDS,
    NATIVE,
    DecoderLayer,
    LayerWeights,
    Rope,
    cached_attention,
    causal_mask,
)
from ppsd.model.passes import EACH_LAYER, Pass, Place, Watch
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
        self.cache.check(places, len(rows))
        return TorchTreePass(self, rows, places)


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


class TorchTreePass:
    """A pass of rows of trees through the layers of a TorchRunner, each row by itself."""

    def __init__(self, runner: TorchRunner, rows: torch.Tensor, places: Sequence[Place]) -> None:
        self.hidden = rows.clone()
        self._runner, self._places = runner, places
        self._done = 0

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        runner = self._runner
        count = len(runner.layers)
        while self._done < count:
            at, layer = self._done, runner.layers[self._done]
            for row, place in zip(torch.split(self.hidden, 1), self._places, strict=True):
                position = place.position
                keys, values = runner.views[place.slot][at]
                with runner.cache.in_order([place], slice(at, at + 1)):
                    attention = cached_attention(keys, values, position, None)
                    # a copy lies as aligned as a row alone, on which a library's bits may rest
                    row.copy_(layer(row.clone(), runner.rope, attention, position))
            self._done += 1
            if watch is not None and self._done < count and (watch.blind or watch.changed()):
                return False
        return True


class Shape(ctypes.Structure):
    """The sizes of a pass and its layers: Shape of kernels.c."""

    _fields_ = [
        *((name, LONG) for name in ("rows", "position", "hidden", "heads", "groups", "size")),
        ("inner", LONG),
        ("cells", LONG),
        ("gathered", LONG),
        ("eps", FLOAT),
        ("threads", INT),
    ]


class CompiledRunner:
    """Run up to MAX_ROWS rows at once by kernels.c.

    Longer blocks run piece by piece, but as TorchRunner does where the CPU multiplies bfloat16.

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
        cells = cache.keys[0].shape[2]
        self._end = min(cells, rope.cos.shape[0])
        sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size
        self.shape = Shape(0, 0, spec.hidden_size, *sizes, cells, 0, spec.rms_norm_eps)
        self.shape_at = ctypes.addressof(self.shape)

    def start(self, rows: torch.Tensor, position: int, slot: int = 0) -> Pass:
        """Start a pass."""
        count = rows.shape[0]
        if count > MAX_ROWS and NATIVE[torch.bfloat16]:
            return self._blocks.start(rows, position, slot)
        assert rows.dtype == torch.bfloat16  # others would be misread
        self.cache.reserve(position, count, slot)
        assert position + count <= self._end
        starts = range(0, count, MAX_ROWS)
        parts = [(rows[i : i + MAX_ROWS].contiguous(), position + i) for i in starts]
        return together([CompiledPass(self, part, at, slot) for part, at in parts])

    def start_rows(self, rows: torch.Tensor, places: Sequence[Place]) -> Pass:
        """Start a pass of rows of trees."""
        self.cache.check(places, len(rows))
        assert rows.dtype == torch.bfloat16  # others would be misread
        assert max(place.position for place in places) < self._end
        starts = range(0, len(rows), MAX_ROWS)
        parts = [(rows[i : i + MAX_ROWS].contiguous(), places[i : i + MAX_ROWS]) for i in starts]
        return together([CompiledPass(self, part, tree=places) for part, places in parts])


class CompiledPass:
    """A pass of consecutive rows, or of rows of a ``tree``, through a CompiledRunner's layers."""

    def __init__(
        self,
        runner: CompiledRunner,
        rows: torch.Tensor,
        position: int = 0,
        slot: int = 0,
        tree: Sequence[Place] = (),
    ) -> None:
        self.hidden = hidden = torch.empty_like(rows)
        self._runner, self._rows, self._position, self._slot = runner, rows, position, slot
        self._tensors = rows.data_ptr(), hidden.data_ptr(), runner.tables_at[slot]
        self._places_at: int | None = None
        self._gathered = 0
        if tree:
            self._tables = _place_tables(tree)
            self._places_at = self._tables[0].buffer_info()[0]
            self._gathered = 1 + max(len(place.path) for place in tree)
            self._position = max(place.position for place in tree)
        self._done = 0

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        runner, rows, places = self._runner, self._rows.shape[0], self._places_at
        end, words = runner.count, UNWATCHED
        if watch is not None:
            words = watch.places
            end = self._done + 1 if watch.blind else end
        shape = runner.shape
        shape.rows, shape.position, shape.gathered = rows, self._position, self._gathered
        shape.threads = torch.get_num_threads()
        self._done = done = runner.run(
            *self._tensors, self._done, end, runner.shape_at, places, *runner.rope_at, *words
        )
        if done < 0:
            raise MemoryError("no memory for the work space of a decoder layer")
        if done < runner.count:
            return False
        if places is None:
            runner.cache.advance(self._position, rows, self._slot)
        return True


def together(passes: Sequence[Pass]) -> Pass:
    """Return passes through the same layers as one."""
    return passes[0] if len(passes) == 1 else PassesTogether(passes)


class PassesTogether:
    """Passes through the same layers as one: each layer runs them in turn.

    A later one may stand on rows of an earlier one of the same kind, whose keys every layer has
    first.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = self._left = passes

    @property
    def hidden(self) -> torch.Tensor:
        return torch.cat([part.hidden for part in self._passes])

    def advance(self, watch: Watch | None = None) -> bool:
        """Run on."""
        while True:
            # a step of a GPU is at its end at once, and must not run again
            self._left = [part for part in self._left if not part.advance(EACH_LAYER)]
            if not self._left:
                return True
            if watch is not None and (watch.blind or watch.changed()):
                return False


def _place_tables(places: Sequence[Place]) -> tuple[array[int], array[int]]:
    """Return the places as kernels.c has them, and the paths that they point to."""
    paths = array("l", [cell for place in places for cell in place.path])
    at = paths.buffer_info()[0]
    table = array("l")
    for slot, position, cell, path in places:
        table.extend((slot, position, cell, position - len(path), at))
        at += paths.itemsize * len(path)
    return table, paths


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
