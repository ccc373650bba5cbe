"""Buffers and headers of the frames that travel over gloo."""

from __future__ import annotations

from queue import SimpleQueue

import torch
import torch.distributed as dist

from ppsd.errors import ProtocolError

MAGIC = int.from_bytes(b"ppsd-msg", "little")
HEADER_BYTES = 32  # magic, payload length, bytes that travel apart, 0: int64 each
# Every message is at least this long, or as long as its link allows: one token's hidden state up to
# 8192 wide in bfloat16 needs one message a hop. The padding costs 0.13 ms at 1 Gbit/s.
INLINE_BYTES = 16 * 1024 + 256

FRAME_TAG, REST_TAG, ROWS_TAG, HANG_UP_TAG = range(1, 5)
GOODBYE = -1  # in place of a frame's length: nothing more comes on this link


class GlooLink:
    """The buffers of one direction of one pair of ranks.

    A buffer is the header and the longest payload. On the wire it is one message of fixed size,
    and a second one with the rest when the payload is longer than that.
    """

    def __init__(self, peer: int, limit: int, frames: int) -> None:
        self.peer = peer
        self.frames = frames
        self._limit = limit
        self._first_bytes = HEADER_BYTES + min(limit, INLINE_BYTES)
        self.free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self.sending: SimpleQueue[Departure | None] = SimpleQueue()
        for _ in range(frames):
            self.free.put(torch.zeros(HEADER_BYTES + limit, dtype=torch.uint8))

    def first(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[: self._first_bytes]

    def pieces(self, buffer: torch.Tensor, length: int) -> list[tuple[torch.Tensor, int]]:
        """Return the messages, and their tags, that carry a payload of ``length`` bytes."""
        end = HEADER_BYTES + length
        if end <= self._first_bytes:
            return [(self.first(buffer), FRAME_TAG)]
        return [(self.first(buffer), FRAME_TAG), (buffer[self._first_bytes : end], REST_TAG)]

    def length(self, buffer: torch.Tensor) -> int:
        return int(header(buffer)[1])

    def rows_bytes(self, buffer: torch.Tensor) -> int:
        return int(header(buffer)[2])

    def payload(self, buffer: torch.Tensor) -> memoryview:
        return buffer.numpy().data[HEADER_BYTES : HEADER_BYTES + self.length(buffer)]

    def says_goodbye(self, buffer: torch.Tensor) -> bool:
        return bool(header(buffer)[:2].tolist() == [MAGIC, GOODBYE])

    def check(self, buffer: torch.Tensor) -> None:
        magic, length, rows, _ = header(buffer).tolist()
        if magic != MAGIC or length < 0 or rows < 0 or length + rows > self._limit:
            raise ProtocolError(
                f"rank {self.peer} sent a frame with magic {magic:#x} and {length} + {rows} bytes, "
                f"expected {MAGIC:#x} and at most {self._limit}"
            )


def header(buffer: torch.Tensor) -> torch.Tensor:
    """Return the header of a buffer as int64 [4]; a view."""
    return buffer[:HEADER_BYTES].view(torch.int64)


# The link, its buffer, and what travelled apart; for sends also the works to wait for.
Arrival = tuple[GlooLink, torch.Tensor, torch.Tensor | None]
Departure = tuple[list[dist.Work], torch.Tensor, torch.Tensor]
