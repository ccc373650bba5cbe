"""Keep weights as small as in their file: 4- or 8-bit codes, a scale for every 32 of a row.

A number is ``code · scale + offset``, rounded to bfloat16. products.h makes the numbers while it
multiplies, so a product has the same bits as one with the whole weight, for a third or a half of
the memory traffic. For stages and heads that decode, on CPUs with AVX512_BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ppsd.model import kernels
from ppsd.model.kernels import Kind, PackedWeight, Weight

BLOCK = 32  # numbers of a row that share a scale and an offset
TOGETHER = 4  # rows that lie together: a tile
ALIGNMENT = 64  # bytes, of a tile
BLOCK_BYTES = {Kind.CODES_4: 80, Kind.CODES_4_WIDE: 96, Kind.CODES_8: 136}  # of a tile


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] as a file has it.

    ``codes`` [out, in] are uint8 below 16 or, without offsets, int8; ``scales`` and ``offsets``
    [out, in / 32] are float16 or, with offsets only, float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None

    @property
    def kind(self) -> Kind:
        """Return the format by the name that products.h has for it."""
        if self.offsets is None:
            return Kind.CODES_8
        return Kind.CODES_4 if self.scales.dtype == torch.float16 else Kind.CODES_4_WIDE

    def numbers(self) -> list[torch.Tensor]:
        """Return the scales and any offsets."""
        return [self.scales] if self.offsets is None else [self.scales, self.offsets]

    def rows(self, rows: torch.Tensor) -> Codes:
        """Return the codes of some rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Codes(self.codes[rows], self.scales[rows], offsets)


def whole(weight: Weight) -> torch.Tensor:
    """Return a weight as a tensor [out, in]."""
    return weight if isinstance(weight, torch.Tensor) else weight.whole()


def first_rows(weight: Weight, rows: int) -> Weight:
    """Copy the first ``rows``, a multiple of 4, of a weight."""
    if isinstance(weight, torch.Tensor):
        return weight[:rows].clone()
    data = weight.data[: rows // TOGETHER].clone()
    return PackedWeight(data, (rows, weight.shape[1]), weight.kind)


def can_pack(rows: int, size: int) -> bool:
    """Return True if a weight [rows, size] can stay in its file's codes, and is faster so."""
    return rows % TOGETHER == 0 and size % BLOCK == 0 and kernels.packs()


def packed_bytes(rows: int, size: int, kind: Kind) -> int:
    """Return the bytes of a packed weight [rows, size]."""
    return rows // TOGETHER * (size // BLOCK * BLOCK_BYTES[kind] + _padding(size, kind))


def pack(parts: Sequence[Codes]) -> PackedWeight:
    """Join ``parts`` of one kind into one weight of all their rows."""
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
    scales = torch.cat([torch.stack(part.numbers(), 2) for part in parts])  # [out, blocks, 1 or 2]
    kind, (rows, size) = parts[0].kind, codes.shape
    tiles = codes.view(-1, TOGETHER, size // BLOCK, BLOCK).transpose(1, 2)
    if kind != Kind.CODES_8:  # a byte has the codes of two rows, the first of them low
        tiles = torch.stack([tiles[:, :, i] | tiles[:, :, i + 1] << 4 for i in (0, 2)], 3)
    numbers = scales.view(-1, TOGETHER, *scales.shape[1:]).movedim(1, -1).contiguous()
    data = torch.cat([tiles.flatten(1), numbers.flatten(1).view(torch.uint8)], 1)
    return PackedWeight(F.pad(data, (0, _padding(size, kind))), (rows, size), kind)


def _padding(size: int, kind: Kind) -> int:
    """Return how many bytes fill up a tile of ``size`` inputs."""
    return -(size // BLOCK * BLOCK_BYTES[kind]) % ALIGNMENT
