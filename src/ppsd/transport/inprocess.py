"""The in-process twin of the real transports: deques in one thread, workers stepped when idle.

For tests and for runs of the whole pipeline in one process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ppsd.errors import PipelineTimeoutError
from ppsd.transport.base import Geometry, Part, frame_bytes, gather


class InProcessHub:
    """All links of a pipeline, and the epoch words, as plain objects.

    ``on_idle`` steps the in-process workers once and returns False when none could do anything.
    Rank 0 calls it while it waits; the other ranks never wait, as nothing could change meanwhile.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.links: dict[tuple[int, int], deque[memoryview]] = {
            link: deque() for link in geometry.links()
        }
        self.epochs = [0] * geometry.slots
        self.on_idle: Callable[[], bool] | None = None

    def endpoint(self, rank: int) -> InProcessEndpoint:
        """Return the end of ``rank``; see ``ppsd.transport.base.Endpoint``."""
        return InProcessEndpoint(self, rank)


class InProcessEndpoint:
    """One rank's end of an InProcessHub."""

    rows = None
    ended = False

    def __init__(self, hub: InProcessHub, rank: int) -> None:
        self.rank = rank
        self.size = hub.geometry.size
        self._hub = hub
        self._outgoing = hub.geometry.outgoing(rank)
        # Rotated at every receive, so that no busy link starves the others.
        self._sources = deque(hub.geometry.incoming(rank))

    def send(self, to: int, parts: Sequence[Part], timeout: float) -> None:
        """Queue a copy of the frame; see ``Endpoint.send``."""
        length = frame_bytes(self._outgoing, to, parts)
        link = self._hub.links[self.rank, to]
        frames = self._hub.geometry.frames
        if not self._wait(lambda: len(link) < frames, timeout):
            raise PipelineTimeoutError(
                f"the link from rank {self.rank} to rank {to} stayed full ({frames} frames)"
            )
        frame = torch.empty(length, dtype=torch.uint8)
        gather(parts, frame.data_ptr())
        link.append(frame.numpy().data)

    def receive(self, timeout: float) -> tuple[int, memoryview] | None:
        """Return the next frame, or None when the workers have nothing more to do."""
        self._wait(self._ready, timeout)
        for source in tuple(self._sources):
            self._sources.rotate(-1)
            if link := self._hub.links[source, self.rank]:
                return source, link.popleft()
        return None

    def words(self, slot: int) -> tuple[int, ...]:
        """Return nothing: the same thread steps all ranks, between the layers of any of them."""
        return ()

    def publish(self, slot: int, epoch: int) -> None:
        """Make ``epoch`` the slot's newest."""
        self._hub.epochs[slot] = epoch

    def epoch(self, slot: int) -> int:
        """Return the slot's newest epoch."""
        return self._hub.epochs[slot]

    def close(self) -> None:
        """Do nothing: the hub goes with its last user."""

    def _ready(self) -> bool:
        return any(self._hub.links[source, self.rank] for source in self._sources)

    def _wait(self, done: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not done():
            step = self._hub.on_idle if self.rank == 0 else None
            if step is None or time.monotonic() >= deadline or not step():
                return done()
        return True
