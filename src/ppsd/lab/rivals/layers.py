"""A stage's layers over a cache of their own, run from any layer to any other, in whole or in half.

Layers are counted from the model's first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch

from ppsd.lab.rivals.skips import ATTENTION, Half, together
from ppsd.model.cache import KVCache
from ppsd.model.layers import DecoderLayer, cached_attention
from ppsd.model.passes import Place
from ppsd.model.runners import Runner
from ppsd.model.stage import Stage, new_cache, new_runner


class Layers:
    """Run rows of one sequence through layers of ``stage``; writing a row voids those after it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._first = stage.plan.first
        plan = replace(stage.plan, slots=1, loose=0)
        self._cache = new_cache(stage.spec, len(stage.layers), plan)
        self._views = self._cache.views(0)
        self._runners: dict[tuple[int, int], Runner] = {}
        self._halved: dict[int, DecoderLayer] = {}

    def run(self, rows: torch.Tensor, position: int, first: int, last: int) -> torch.Tensor:
        """Run rows [n, C] at ``position`` through layers [first, last) as plain decoding does."""
        work = self._runner(first, last, position).start(rows, position)
        work.advance()
        return work.hidden

    def run_apart(self, rows: torch.Tensor, position: int, first: int, last: int) -> torch.Tensor:
        """Run the same, each row with the bits that it has in a pass of its own."""
        own = range(position, position + len(rows))
        places = [Place(0, p, p, tuple(range(position, p))) for p in own]
        work = self._runner(first, last, position).start_rows(rows, places)
        work.advance()
        return work.hidden

    def skipping(self, row: torch.Tensor, position: int, halves: Iterable[Half]) -> torch.Tensor:
        """Run a row [1, C] through some halves of layers."""
        for first, last, half in together(halves):
            if half is None:
                row = self.run(row, position, first, last)
            elif half == ATTENTION:
                keys, values = self._views[first - self._first]
                attention = cached_attention(keys, values, position, None)
                layer = self._layer(first)
                row = layer.after_attention(row, self._stage.rope, attention, position)
            else:
                row = self._layer(first).after_mlp(row)
        return row

    def _layer(self, at: int) -> DecoderLayer:
        if at not in self._halved:
            weights = self._stage.layers[at - self._first]
            self._halved[at] = DecoderLayer(weights, self._stage.spec)
        return self._halved[at]

    def _runner(self, first: int, last: int, position: int) -> Runner:
        """Return what runs the layers, where rows before ``position`` are taken to be there."""
        self._cache.lengths[0] = position
        if (first, last) not in self._runners:
            own = slice(first - self._first, last - self._first)
            spec, rope = self._stage.spec, self._stage.rope
            made = new_runner(self._stage.layers[own], spec, rope, _part(self._cache, own))
            self._runners[first, last] = made
        return self._runners[first, last]


def _part(cache: KVCache, layers: slice) -> KVCache:
    """Return the cache of some layers, over the same memory and with the same lengths."""
    part = copy.copy(cache)
    part.whole = [tensor[layers] for tensor in cache.whole]
    part.keys, part.values = (tensor.unbind() for tensor in part.whole)
    return part
