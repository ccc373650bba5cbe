"""Static key/value cache of a run of layers, addressed by slot and position.

Used by stages and exit heads.
"""

from __future__ import annotations

import torch

from ppsd.errors import ProtocolError


class KVCache:
    """Hold keys and values of ``layers`` layers for ``slots`` sequences side by side.

    Each layer has a tensor [slots, kv_heads, capacity + spare, head_dim] of either; the ``spare``
    cells hold no position. Writing rows at position p of a slot makes every row after them
    invalid, so a rollback is nothing but the next write. Memory is reserved at once and touched
    only as positions are used.
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
        spare: int = 0,
    ) -> None:
        shape = (layers, slots, kv_heads, capacity + spare, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.values = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.capacity = capacity
        self.lengths = [0] * slots

    def views(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values [kv_heads, capacity + spare, head_dim] of a slot, by layer."""
        return [(k[slot], v[slot]) for k, v in zip(self.keys, self.values, strict=True)]

    def reserve(self, position: int, rows: int, slot: int = 0) -> None:
        """Void what stands at ``position`` or later, to write ``rows`` rows there.

        If the pass that writes them is dropped, the rows stay void. Raises ProtocolError when
        they do not fit, or the slot does not exist.
        """
        if not 0 <= slot < len(self.lengths):
            raise ProtocolError(f"slot {slot} is not one of the cache's {len(self.lengths)}")
        length = self.lengths[slot]
        if not 0 <= position <= length or position + rows > self.capacity:
            raise ProtocolError(
                f"{rows} rows at position {position} do not fit a cache that holds {length} "
                f"of {self.capacity} positions"
            )
        self.lengths[slot] = position

    def advance(self, position: int, rows: int, slot: int = 0) -> None:
        """Declare the rows at ``position`` written in every layer."""
        self.lengths[slot] = position + rows
