"""What every transport offers: frames of bytes between ranks, and an epoch word for each slot.

Knows nothing of models, tokens or policies. The links are those of the pipeline and no others: rank
k → k+1 (work) and every rank k ≥ 1 → 0 (verdicts, status).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ppsd.errors import ProtocolError


@dataclass(frozen=True)
class Geometry:
    """Sizes agreed by all ranks before the first frame.

    ``forward_bytes`` and ``return_bytes`` bound one frame on the work links (k → k+1) and on the
    return links (k → 0); ``frames`` is how many frames a link at least holds before ``send`` has
    to wait; ``slots`` is how many requests can be under way, each with an epoch of its own.
    """

    size: int
    forward_bytes: int
    return_bytes: int
    frames: int
    slots: int = 1

    def links(self) -> dict[tuple[int, int], int]:
        """Return every link (from, to) with the bytes its largest frame may have."""
        work = {(rank, rank + 1): self.forward_bytes for rank in range(self.size - 1)}
        return work | {(rank, 0): self.return_bytes for rank in range(1, self.size)}

    def outgoing(self, rank: int) -> dict[int, int]:
        """Return the ranks that ``rank`` may send to, with the bytes of the largest frame."""
        return {to: limit for (source, to), limit in self.links().items() if source == rank}

    def incoming(self, rank: int) -> dict[int, int]:
        """Return the ranks that may send to ``rank``, with the bytes of the largest frame."""
        return {source: limit for (source, to), limit in self.links().items() if to == rank}


Part = bytes | torch.Tensor  # tensors are contiguous, of any type, on any device


def part_bytes(part: Part) -> int:
    """Return the length of a part."""
    return len(part) if isinstance(part, bytes) else part.nbytes


def frame_bytes(outgoing: Mapping[int, int], to: int, parts: Sequence[Part]) -> int:
    """Return the length of a frame made of ``parts``; ProtocolError when ``to`` cannot take it."""
    limit = outgoing.get(to)
    if limit is None:
        raise ProtocolError(f"no link to rank {to}: this rank sends to {sorted(outgoing)} only")
    length = sum(map(part_bytes, parts))
    if length > limit:
        raise ProtocolError(f"a frame to rank {to} may have {limit} bytes, got {length}")
    return length


def gather(parts: Sequence[Part], address: int) -> None:
    """Copy ``parts`` end to end to where ``frame_bytes`` of them have room.

    Not by PyTorch: between two messages a stage reads all its weights, so whatever code is not
    short has left the caches by then.
    """
    for part in parts:
        if isinstance(part, bytes):
            ctypes.memmove(address, part, len(part))
        else:
            host = part if part.device.type == "cpu" else part.cpu()
            ctypes.memmove(address, host.data_ptr(), host.nbytes)
        address += part_bytes(part)


class Endpoint(Protocol):
    """One rank's end of the transport.

    Frames on one link arrive whole, once and in the order sent. ``rows`` is the last part of the
    frame last received when it travelled apart, GPU to GPU; None when the frame is all there is.
    ``ended`` says on a worker that rank 0 has said goodbye, which is no error: what breaks from
    then on breaks because it leaves.
    """

    rank: int
    size: int
    ended: bool

    @property
    def rows(self) -> torch.Tensor | None:
        """Return the rows that travelled apart, if any."""

    def words(self, slot: int) -> tuple[int, ...]:
        """Return the addresses of the 64-bit words that others change to stop work on ``slot``.

        On rank 0 a new frame, whatever it is about, elsewhere a new epoch of the slot changes one
        of them. Without any,
        a pass has to stop after every layer for its caller to ask.
        """

    def send(self, to: int, parts: Sequence[Part], timeout: float) -> None:
        """Send one frame made of ``parts`` laid end to end: first bytes, then tensors.

        A part on a GPU passes through host memory unless the transport can do better. Returns when
        the parts may be reused. Raises PipelineTimeoutError when the link stays full for
        ``timeout`` seconds, StageLostError when the peer is gone, ProtocolError when the frame is
        larger than the geometry allows or there is no such link.
        """

    def receive(self, timeout: float) -> tuple[int, memoryview] | None:
        """Return (source rank, bytes of the frame), or None when ``timeout`` seconds pass.

        The bytes are the caller's until the next ``receive``; copy what must live longer.
        ``timeout`` 0 only looks. Raises StageLostError when a peer is known to be gone.
        """

    def publish(self, slot: int, epoch: int) -> None:
        """Make ``epoch`` the slot's newest, on rank 0; it overtakes all frames. Never blocks."""

    def epoch(self, slot: int) -> int:
        """Return the slot's newest epoch this rank knows of; cheap enough to ask between layers."""

    def close(self) -> None:
        """Release this end; may be called twice."""
