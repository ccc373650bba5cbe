"""Weights as small as their file has them: codes of 4 or 8 bits, a scale for every 32 of a row.

A number is ``code · scale + offset``, rounded to bfloat16. kernels.c makes the numbers while it
multiplies, so a product has the same bits as one with the whole weight, for a third or a half of
the memory traffic. Used by stages and heads that decode, on CPUs with AVX512_BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ppsd.model import kernels

BLOCK = 32  # numbers of a row that share a scale and an offset
GROUP = 128  # numbers of a row whose codes lie together
GROUP_BYTES = {4: 96, 8: 144}  # with their scales, and offsets for 4 bits
TOGETHER = 2  # rows whose groups take turns


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] as a file has it.

    ``codes`` [out, in] are uint8 below 16 or, without offsets, int8; ``scales`` and ``offsets``
    [out, in / 32] are float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None

    def rows(self, rows: torch.Tensor) -> Codes:
        """Some of the rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Codes(self.codes[rows], self.scales[rows], offsets)


@dataclass(frozen=True)
class PackedWeight:
    """A weight of ``shape`` (out, in) as kernels.c reads it: uint8 [out / 2, groups, 2, bytes]."""

    data: torch.Tensor
    shape: tuple[int, int]
    bits: int
    dtype: torch.dtype = torch.bfloat16

    def whole(self) -> torch.Tensor:
        """The bfloat16 numbers, [out, in]."""
        return kernels.unpack(self.data, self.shape, self.bits)


Weight = torch.Tensor | PackedWeight


def whole(weight: Weight) -> torch.Tensor:
    """A weight as a tensor [out, in]."""
    return weight if isinstance(weight, torch.Tensor) else weight.whole()


def first_rows(weight: Weight, rows: int) -> Weight:
    """A copy of the first ``rows``, an even number, of a weight."""
    if isinstance(weight, torch.Tensor):
        return weight[:rows].clone()
    data = weight.data[: rows // TOGETHER].clone()
    return PackedWeight(data, (rows, weight.shape[1]), weight.bits)


def can_pack(rows: int, size: int) -> bool:
    """Whether a weight [rows, size] that a file has in codes can and should be kept so."""
    return rows % TOGETHER == 0 and size % BLOCK == 0 and size >= GROUP and kernels.packs()


def packed_bytes(rows: int, size: int, bits: int) -> int:
    """Memory of a packed weight [rows, size]."""
    return rows * _groups(size) * GROUP_BYTES[bits]


def pack(parts: Sequence[Codes]) -> PackedWeight:
    """One weight of all rows of ``parts``, which are all of 4 bits or all of 8."""
    together = [_packed_rows(part) for part in parts]
    data = torch.cat(together)
    rows, groups, size = data.shape
    data = data.view(-1, TOGETHER, groups, size).transpose(1, 2).contiguous()
    bits = 8 if parts[0].offsets is None else 4
    return PackedWeight(data, (rows, parts[0].codes.shape[1]), bits)


def _packed_rows(part: Codes) -> torch.Tensor:
    """uint8 [out, groups, bytes of a group]."""
    rows, size = part.codes.shape
    groups = _groups(size)
    codes = F.pad(part.codes.view(torch.uint8), (0, groups * GROUP - size))
    if part.offsets is None:
        return torch.cat([codes.view(rows, groups, GROUP), _numbers(part.scales)], 2)
    quarters = codes.view(rows, groups, GROUP // BLOCK, BLOCK)  # of a 16-bit word, lowest first
    pairs = quarters[:, :, ::2] | quarters[:, :, 1::2] << 4
    words = pairs.transpose(2, 3).reshape(rows, groups, 2 * BLOCK)
    return torch.cat([words, _numbers(part.scales), _numbers(part.offsets)], 2)


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """float32 [out, blocks] to uint8 [out, groups, 16]."""
    rows, blocks = values.shape
    padded = F.pad(values, (0, -blocks % (GROUP // BLOCK)))
    return padded.view(rows, -1, GROUP // BLOCK).contiguous().view(torch.uint8)


def _groups(size: int) -> int:
    return -(-size // GROUP)
