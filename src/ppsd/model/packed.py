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
TOGETHER = 4  # rows whose groups lie together


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
    """A weight of ``shape`` (out, in) as kernels.c reads it: uint8 [out / 4, groups, 4 · bytes]."""

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
    """A copy of the first ``rows``, a multiple of 4, of a weight."""
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
    fields = [torch.cat(field) for field in zip(*map(_fields, parts), strict=True)]
    data = torch.cat([_together(field) for field in fields], 2)
    bits = 8 if parts[0].offsets is None else 4
    return PackedWeight(data, (len(fields[0]), parts[0].codes.shape[1]), bits)


def _fields(part: Codes) -> list[torch.Tensor]:
    """Codes, scales and any offsets, each uint8 [out, groups, bytes]."""
    rows, size = part.codes.shape
    groups = _groups(size)
    codes = F.pad(part.codes.view(torch.uint8), (0, groups * GROUP - size))
    if part.offsets is None:
        return [codes.view(rows, groups, GROUP), _numbers(part.scales)]
    quarters = codes.view(rows, groups, GROUP // BLOCK, BLOCK)  # of a 16-bit word, lowest first
    pairs = quarters[:, :, ::2] | quarters[:, :, 1::2] << 4
    words = pairs.transpose(2, 3).reshape(rows, groups, 2 * BLOCK)
    return [words, _numbers(part.scales), _numbers(part.offsets)]


def _together(field: torch.Tensor) -> torch.Tensor:
    """[out, groups, bytes] to [out / 4, groups, 4 · bytes]."""
    rows, groups, size = field.shape
    return field.view(-1, TOGETHER, groups, size).transpose(1, 2).reshape(-1, groups, 4 * size)


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """float32 [out, blocks] to uint8 [out, groups, 16]."""
    rows, blocks = values.shape
    padded = F.pad(values, (0, -blocks % (GROUP // BLOCK)))
    return padded.view(rows, -1, GROUP // BLOCK).contiguous().view(torch.uint8)


def _groups(size: int) -> int:
    return -(-size // GROUP)
