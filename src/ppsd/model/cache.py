"""Static, position-addressed key/value cache of a run of layers. Used by stages and exit heads."""

from __future__ import annotations

import torch

from ppsd.errors import ProtocolError


class KVCache:
    """Keys and values of ``layers`` layers, each [kv_heads, capacity, head_dim].

    Writing rows at position p makes every row after them invalid, so a rollback is nothing but
    the next write. Memory is reserved at once and touched only as positions are used.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.values = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.capacity = capacity
        self.length = 0

    def reserve(self, position: int, rows: int) -> None:
        """Void what stands at ``position`` or later, to write ``rows`` rows there.

        If that is interrupted the rows stay void. Raises ProtocolError when they do not fit.
        """
        if not 0 <= position <= self.length or position + rows > self.capacity:
            raise ProtocolError(
                f"{rows} rows at position {position} do not fit a cache that holds {self.length} "
                f"of {self.capacity} positions"
            )
        self.length = position

    def advance(self, position: int, rows: int) -> None:
        """Declare the rows at ``position`` written in every layer."""
        self.length = position + rows
