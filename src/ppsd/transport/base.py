"""What every transport offers: frames of bytes between ranks, and one epoch word.

Imported by worker/ and engine/; knows nothing of models, tokens or policies. The links are those
of the pipeline and no others: rank k → k+1 (work) and every rank k ≥ 1 → 0 (verdicts, status).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Geometry:
    """Sizes agreed by all ranks before the first frame.

    ``forward_bytes`` and ``return_bytes`` bound one frame on the work links (k → k+1) and on the
    return links (k → 0); ``slots`` is how many frames a link holds before ``send`` has to wait.
    """

    size: int
    forward_bytes: int
    return_bytes: int
    slots: int


class Endpoint(Protocol):
    """One rank's end of the transport.

    Frames on one link arrive whole, once and in the order sent.
    """

    rank: int
    size: int

    def send(self, to: int, parts: Sequence[torch.Tensor], timeout: float) -> None:
        """Send one frame made of contiguous one-dimensional uint8 CPU tensors, laid end to end.

        Returns when the parts may be reused. Raises PipelineTimeoutError when the link stays full
        for ``timeout`` seconds, StageLostError when the peer is gone, ProtocolError when the frame
        is larger than the geometry allows or there is no such link.
        """

    def receive(self, timeout: float) -> tuple[int, torch.Tensor] | None:
        """Return (source rank, frame as uint8 tensor), or None when ``timeout`` seconds pass.

        The tensor is the caller's until the next ``receive``; copy what must live longer.
        ``timeout`` 0 only looks. Raises StageLostError when a peer is known to be gone.
        """

    def publish(self, epoch: int) -> None:
        """Rank 0: make ``epoch`` the newest valid one; it overtakes all frames. Never blocks."""

    def epoch(self) -> int:
        """Return the newest valid epoch this rank knows of; cheap enough to ask between layers."""

    def close(self) -> None:
        """Release this end; may be called twice."""
