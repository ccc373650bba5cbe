"""Frames: a 64-byte little-endian header, integers, and rows of numbers.

What messages are laid out as; see messages.py. Nothing in a frame is code.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch

from ppsd.errors import ProtocolError
from ppsd.speculation.masks import Mask
from ppsd.transport.base import Part

MAGIC = 0x50505344  # "PPSD"
VERSION = 8
# magic, version, kind, dtype, flags, slot, source, epoch,
# position, parent, rows, judge, width, beside, bytes of body
HEADER = struct.Struct("<IBBBBHHQiiiiIIQ12x")
HEADER_BYTES = HEADER.size
TOKEN_BYTES = 8  # ids travel as int64: no conversion on either side
CONTROL_BYTES = 1 << 16  # room for a control or status body; larger status texts are cut

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def frame_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """Return the largest frame's size: ``rows`` rows of ``width`` numbers, or a control frame."""
    body = rows * (TOKEN_BYTES + width * dtype.itemsize)
    return HEADER_BYTES + max(body, CONTROL_BYTES)


class Landing:
    """Where the rows of one block after another are put, each over the one before.

    Memory for every block anew would cost more than all else that decoding one does.
    """

    def __init__(self) -> None:
        self._kind: tuple[tuple[int, int], torch.dtype] | None = None
        self._rows = torch.empty(0)
        self._address = 0

    def put(self, numbers: memoryview, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return rows of ``shape`` that hold ``numbers``."""
        if (shape, dtype) != self._kind:
            self._kind, self._rows = (shape, dtype), torch.empty(shape, dtype=dtype)
            self._address = self._rows.data_ptr()
        ctypes.memmove(self._address, bytes(numbers), len(numbers))
        return self._rows


def packed_ids(tokens: tuple[int, ...]) -> bytes:
    """Return token ids, or other integers, as they lie in a frame."""
    return ids_layout(len(tokens)).pack(*tokens)


@functools.cache
def ids_layout(count: int) -> struct.Struct:
    """Return the layout of ``count`` token ids."""
    return struct.Struct(f"{count}q")


def split_masks(body: memoryview, rows: int, width: int) -> tuple[tuple[Mask, ...], memoryview]:
    """Return the masks of ``width`` bytes at the front of a body, one a row, and what follows."""
    end = rows * width
    if not 0 <= end <= len(body):
        raise ProtocolError(f"frame states masks of {width} bytes for {rows} rows")
    masks = tuple(bytes(body[i : i + width]) for i in range(0, end, width)) if width else ()
    return masks, body[end:]


def split_rows(
    body: memoryview,
    apart: torch.Tensor | None,
    landing: Landing | None,
    tokens: int,
    shape: tuple[int, int],
    dtype: int,
) -> tuple[tuple[int, ...], torch.Tensor | None]:
    """Cut a body into token ids [tokens] and any numbers of ``shape``; it must hold just these."""
    if not 0 <= dtype < len(DTYPES) or tokens < 0 or min(shape) < 0:
        raise ProtocolError(f"frame states dtype {dtype}, {tokens} tokens, rows of shape {shape}")
    cut, wanted = tokens * TOKEN_BYTES, shape[0] * shape[1]
    kind = DTYPES[dtype]
    size = len(body) - cut if apart is None else apart.numel()
    if size != wanted * kind.itemsize or len(body) < cut:
        raise ProtocolError(f"{max(0, size)} bytes are not rows of shape {shape} in {kind}")
    ids = ids_layout(tokens).unpack_from(body)
    if not size:
        return ids, None
    if apart is not None:
        return ids, apart.view(kind).view(shape)
    return ids, (landing or Landing()).put(body[cut:], shape, kind)


def encode_fields(
    kind: int,
    fields: Sequence[int],
    numbers: torch.Tensor | None,
    *,
    slot: int = 0,
    source: int = 0,
    epoch: int = 0,
    position: int = 0,
    parent: int = 0,
    rows: int | None = None,
    judge: int | None = None,
    beside: int = 0,
    before: bytes = b"",
    flags: int = 0,
) -> list[Part]:
    """Lay out integers and rows of numbers, behind the bytes ``before``.

    The header counts both, unless it is given other ``rows`` or ``judge``.
    """
    body = before + packed_ids(tuple(fields))
    count, width, dtype, size = 0, 0, 0, 0
    if numbers is not None:
        numbers = numbers.contiguous()
        count, width = numbers.shape
        dtype, size = DTYPES.index(numbers.dtype), numbers.nbytes
    rows, judge = count if rows is None else rows, len(fields) if judge is None else judge
    header = HEADER.pack(
        MAGIC, VERSION, kind, dtype, flags, slot, source, epoch,
        position, parent, rows, judge, width, beside, len(body) + size,
    )  # fmt: skip
    return [header + body] if numbers is None or not size else [header + body, numbers]


def decode_fields(
    header: tuple[int, ...],
    body: memoryview,
    apart: torch.Tensor | None,
    landing: Landing | None = None,
) -> tuple[tuple[int, ...], torch.Tensor | None]:
    """Read integers and rows of numbers; raises ProtocolError."""
    dtype, rows, fields, width = header[3], header[10], header[11], header[12]
    return split_rows(body, apart, landing, fields, (rows, width), dtype)


def side_by_side(
    left: torch.Tensor | None, right: torch.Tensor | None
) -> tuple[torch.Tensor | None, int]:
    """Return the rows of two matrices in one, and how many numbers of each are the left one's."""
    both = [part for part in (left, right) if part is not None]
    numbers = torch.cat(both, 1) if len(both) > 1 else both[0] if both else None
    return numbers, 0 if left is None else left.shape[1]


def split_sides(
    numbers: torch.Tensor | None, beside: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the two matrices that ``side_by_side`` put into one."""
    if numbers is None:
        return None, None
    right = numbers[:, beside:] if beside < numbers.shape[1] else None
    return numbers[:, :beside] if beside else None, right
