"""Static key/value cache of a run of layers, addressed by slot and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ppsd.errors import ProtocolError
from ppsd.model.passes import Place

EVERY = slice(None)


class KVCache:
    """Hold keys and values of ``layers`` layers for ``slots`` sequences side by side.

    Each layer has a tensor [slots, kv_heads, cells, head_dim] of either. Of a slot's cells the
    first ``capacity`` are canonical: cell p is for position p. The ``loose`` ones after them take
    rows of candidate trees at any position, and the ``spare`` ones no row at all. Writing rows at
    position p of a slot makes every row after them invalid, so a rollback is nothing but the next
    write. Memory is reserved at once and touched only as cells are used.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots: int = 1,
        loose: int = 0,
        spare: int = 0,
    ) -> None:
        shape = (layers, slots, kv_heads, capacity + loose + spare, head_dim)
        self.whole = [torch.zeros(shape, dtype=dtype, device=device) for _ in ("keys", "values")]
        self.keys, self.values = (tensor.unbind() for tensor in self.whole)
        self.capacity, self.loose = capacity, loose
        self.lengths = [0] * slots

    def views(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values [kv_heads, cells, head_dim] of a slot, by layer."""
        return [(k[slot], v[slot]) for k, v in zip(self.keys, self.values, strict=True)]

    def reserve(self, position: int, rows: int, slot: int = 0) -> None:
        """Void what stands at ``position`` or later, to write ``rows`` rows there.

        If the pass that writes them is dropped, the rows stay void. Raises ProtocolError when
        they do not fit, or the slot does not exist.
        """
        length = self._length(slot)
        if not 0 <= position <= length or position + rows > self.capacity:
            raise ProtocolError(
                f"{rows} rows at position {position} do not fit a cache that holds {length} "
                f"of {self.capacity} positions"
            )
        self.lengths[slot] = position

    def advance(self, position: int, rows: int, slot: int = 0) -> None:
        """Declare the rows at ``position`` written in every layer."""
        self.lengths[slot] = position + rows

    def check(self, places: Sequence[Place], rows: int) -> None:
        """Raise ProtocolError unless ``rows`` rows can be written, one at each place in turn."""
        if not 0 < rows == len(places):
            raise ProtocolError(f"{rows} rows do not stand at {len(places)} places")
        written: dict[tuple[int, int], int] = {}  # position of the row in a slot's cell
        own = {(place.slot, place.cell) for place in places}
        for place in places:
            slot, position, cell, path = place
            length, base = self._length(slot), position - len(path)
            if not (0 <= base <= length and position < self.capacity):
                raise ProtocolError(
                    f"a row at position {position} with {len(path)} unverified ancestors does not "
                    f"fit a cache that holds {length} of {self.capacity} positions"
                )
            for at, other in enumerate((*path, cell), base):
                if not (other == at or self._is_loose(other)):
                    raise ProtocolError(f"cell {other} is not for a row at position {at}")
                if other != cell and (slot, other) in own and written.get((slot, other)) != at:
                    raise ProtocolError(f"cell {other} is read before its row is written")
            if cell in path or len(set(path)) < len(path) or (slot, cell) in written:
                raise ProtocolError(f"cell {cell} of slot {slot}, or one of {path}, is taken twice")
            if cell < length:
                raise ProtocolError(f"cell {cell} of slot {slot} holds a verified row")
            written[slot, cell] = position

    @contextmanager
    def in_order(self, chain: Sequence[Place], layers: slice = EVERY) -> Iterator[None]:
        """Keep rows' ancestors in their canonical cells while the rows are written to their own.

        Each row of the ``chain`` is the child of the one before it. Afterwards they are where
        their places say, and all other cells are what they were before.
        """
        slot, position, cell, path = chain[-1]
        base = position - len(path)
        moved = [(of, at) for at, of in enumerate((*path, cell), base) if of != at]
        cells, canonical = [of for of, _ in moved], [at for _, at in moved]
        written, to = [place.position for place in chain], [place.cell for place in chain]
        # [layers, kv_heads, cells, head_dim] each
        parts = [tensor[layers, slot] for tensor in self.whole] if moved else []
        saved = [part[:, :, canonical] for part in parts]  # a copy, as all lists of cells give
        for part in parts:
            part[:, :, canonical] = part[:, :, cells]
        try:
            yield
        finally:
            for part, rows in zip(parts, saved, strict=True):
                own = part[:, :, written]
                part[:, :, canonical] = rows
                part[:, :, to] = own

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Declare the first ``length`` rows of a slot verified, after copying cells (from, to).

        Every layer's cells are copied, all read before any is written. Raises ProtocolError for
        a slot, length or cell that does not exist, a cell written twice, and a verified row that
        would be written over.
        """
        kept = min(self._length(slot), length)
        if not 0 <= length <= self.capacity:
            raise ProtocolError(f"{length} rows are not within the cache's {self.capacity}")
        cells, targets = [a for a, _ in moves], [b for _, b in moves]
        outside = [c for c in (*cells, *targets) if not 0 <= c < self.capacity + self.loose]
        if outside or len(set(targets)) < len(targets) or min(targets, default=kept) < kept:
            raise ProtocolError(
                f"cells cannot be copied {list(moves)} beside {kept} verified rows of "
                f"{self.capacity} and {self.loose} loose cells"
            )
        for tensor in self.whole if moves else ():
            tensor[:, slot][:, :, targets] = tensor[:, slot][:, :, cells]
        self.lengths[slot] = length

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first ``length`` rows of slot ``source`` to another; what it held is void.

        Raises ProtocolError for a slot that does not exist, and rows that are not there.
        """
        self._length(slot)
        if not 0 <= length <= self._length(source):
            raise ProtocolError(f"slot {source} has not the {length} rows to share")
        for tensor in self.whole:
            tensor[:, slot, :, :length] = tensor[:, source, :, :length]
        self.lengths[slot] = length

    def _length(self, slot: int) -> int:
        if not 0 <= slot < len(self.lengths):
            raise ProtocolError(f"slot {slot} is not one of the cache's {len(self.lengths)}")
        return self.lengths[slot]

    def _is_loose(self, cell: int) -> bool:
        return self.capacity <= cell < self.capacity + self.loose
