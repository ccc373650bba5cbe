"""Transport between the processes of one host: rings in one nameless shared memory segment.

The engine creates the segment; workers attach to the inherited descriptor.

Layout, in 64-byte lines (a line is never shared by two writers); all words are native int64:

    line 0   magic, layout version, size, forward_bytes, return_bytes, frames, slots
    then one epoch word a slot, in whole lines, written by rank 0 only
    then for each link of ``Geometry.links()``, in that order, a ring with one writer and one
    reader:
        head line   frames taken so far, written by the reader
        tail line   frames put so far, written by the writer
        frames + 1 × a line with the frame's length, then its bytes, rounded up to whole lines

One frame more than the geometry asks for, as the reader holds one while it works on a frame.

The segment has no name: children inherit its descriptor (``pass_fds``), the kernel frees it with
its last user however that one ends, and the size of /dev/shm does not matter.

Memory order: frame bytes must be visible before the tail that announces them, and must have been
read before the head that frees them. x86 keeps stores, and loads, in order; other CPUs do not, and
Python offers no fence, so ``_fence`` stands between bytes and counter on both sides.

A peer's death cannot be seen in memory. Whoever started the processes has to watch them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import torch

from ppsd.errors import InsufficientMemoryError, PipelineTimeoutError, ProtocolError, cause_of
from ppsd.transport.base import Geometry, Part, frame_bytes, gather

LINE = 64
WORD = 8
MAGIC = int.from_bytes(b"ppsd-shm", "little")
LAYOUT_VERSION = 2
EPOCH_WORD = LINE // WORD

BUSY_SECONDS = 0.02  # longer than most ticks: a pipeline at work hardly ever sleeps


def create_segment(geometry: Geometry) -> int:
    """Return the descriptor of a new segment for all links of ``geometry``.

    The caller closes it once every rank has attached. InsufficientMemoryError when the operating
    system has no room for it.
    """
    size = _segment_bytes(geometry)
    fd = _anonymous_file()
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as segment, memoryview(segment).cast("q") as words:
            for index, value in enumerate(_header(geometry)):
                words[index] = value
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise InsufficientMemoryError(
            f"the transport needs {size} bytes of shared memory for {geometry}: {cause_of(error)}"
        ) from error
    return fd


class SharedMemoryEndpoint:
    """One rank's end of a segment.

    ``spin``: this process has a core of its own, so poll without sleeping while work is due.
    The descriptor stays the caller's. A received frame lies in the segment itself.
    """

    rows = None
    ended = False  # a worker here leaves by its standard input

    def __init__(self, fd: int, geometry: Geometry, rank: int, spin: bool) -> None:
        self.rank = rank
        self.size = geometry.size
        self._outgoing = geometry.outgoing(rank)
        self._pause = _pause_of_own_core if spin else _pause_of_shared_core
        segment = _attach(fd, geometry)
        # Unmapped with its last reference: frames that live longer than this endpoint hold one.
        self._words: memoryview = memoryview(segment).cast("q")
        rings = {link: _Ring(segment, self._words, *place) for link, place in _places(geometry)}
        self._senders = {to: ring for (source, to), ring in rings.items() if source == rank}
        self._sources = [(source, ring) for (source, to), ring in rings.items() if to == rank]
        tails = tuple(ring.tail_address for _, ring in self._sources)
        epochs = _address(segment) + EPOCH_WORD * WORD
        self._watched = [
            tails if rank == 0 else (epochs + slot * WORD,) for slot in range(geometry.slots)
        ]
        self._lent: _Ring | None = None
        self._waiting_since: float | None = None  # the first of the waits in vain in a row

    def send(self, to: int, parts: Sequence[Part], timeout: float) -> None:
        """Copy the frame into the ring; see ``Endpoint.send``."""
        length = frame_bytes(self._outgoing, to, parts)
        ring = self._senders[to]
        if not ring.has_room() and not self._wait(ring.has_room, timeout):
            raise PipelineTimeoutError(
                f"the link from rank {self.rank} to rank {to} stayed full for {timeout} s"
            )
        ring.put(parts, length)
        self._waiting_since = None

    def receive(self, timeout: float) -> tuple[int, memoryview] | None:
        """Return the next frame where it lies; its slot is freed at the next call."""
        self._give_back()
        found = self._next_in_turn()
        if found is None:
            if not self._wait_for_frame(timeout):
                return None
            found = self._next_in_turn()
            assert found is not None
        self._waiting_since = None
        source, ring = found
        frame = ring.look()
        self._lent = ring
        return source, frame

    def words(self, slot: int) -> tuple[int, ...]:
        """Return the addresses to watch; see ``Endpoint.words``."""
        return self._watched[slot]

    def publish(self, slot: int, epoch: int) -> None:
        """Store ``epoch``: one aligned word, so readers see the old or the new value."""
        self._words[EPOCH_WORD + slot] = epoch

    def epoch(self, slot: int) -> int:
        """Return the slot's epoch word."""
        return self._words[EPOCH_WORD + slot]

    def close(self) -> None:
        """Let go of the segment; it is unmapped when the last received frame is gone too."""
        self._give_back()
        self._senders.clear()
        self._sources.clear()
        self._words.release()

    def _give_back(self) -> None:
        if self._lent is not None:
            self._lent.take()
            self._lent = None

    def _any_frame(self) -> bool:
        return any(ring.has_frame() for _, ring in self._sources)

    def _next_in_turn(self) -> tuple[int, _Ring] | None:
        """Return the first link with a frame, and put it last for the next time."""
        for turn, chosen in enumerate(self._sources):
            if chosen[1].has_frame():
                del self._sources[turn]
                self._sources.append(chosen)
                return chosen
        return None

    def _wait_for_frame(self, timeout: float) -> bool:
        """Wait for a frame; waits in vain without a frame sent in between are one long wait."""
        if timeout <= 0.0:
            return False
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        return self._wait(self._any_frame, timeout, now - self._waiting_since)

    def _wait(self, done: Callable[[], bool], timeout: float, before: float = 0.0) -> bool:
        """Wait until ``done``; ``before``: seconds of waiting that this wait goes on with."""
        start = time.monotonic()
        waited = 0.0
        while waited < timeout:
            pause = self._pause(before + waited)
            time.sleep(min(pause, timeout - waited))  # if 0, other threads of Python get a turn
            if done():
                return True
            waited = time.monotonic() - start
        return False


class _Ring:
    """One link: ``frames`` frames between a single writer and a single reader.

    Each side reads the other's counter from memory and remembers its own.
    """

    def __init__(
        self, segment: mmap.mmap, words: memoryview, start: int, limit: int, frames: int
    ) -> None:
        self._words = words
        self._head = start // WORD
        self._tail = self._head + LINE // WORD
        self._limit = limit
        self._frames = frames + 1
        self._taken: int = words[self._head]
        self._put: int = words[self._tail]
        offsets = [start + 2 * LINE + i * _frame_bytes(limit) for i in range(frames + 1)]
        self._lengths = [offset // WORD for offset in offsets]
        whole = memoryview(segment)
        self._payloads = [whole[at + LINE : at + LINE + limit] for at in offsets]
        base = _address(segment)
        self._addresses = [base + at + LINE for at in offsets]
        self.tail_address = base + start + LINE

    def has_room(self) -> bool:
        return self._put - self._words[self._head] < self._frames

    def has_frame(self) -> bool:
        return self._words[self._tail] != self._taken

    def put(self, parts: Sequence[Part], length: int) -> None:
        slot = self._put % self._frames
        gather(parts, self._addresses[slot])
        self._words[self._lengths[slot]] = length
        self._put += 1
        _fence()
        self._words[self._tail] = self._put

    def look(self) -> memoryview:
        _fence()
        slot = self._taken % self._frames
        length: int = self._words[self._lengths[slot]]
        waiting: int = self._words[self._tail] - self._taken
        if not (0 <= length <= self._limit and 0 < waiting <= self._frames):
            raise ProtocolError(
                f"a ring is damaged: {waiting} frames of at most {self._frames} wait, "
                f"the first has {length} bytes of at most {self._limit}"
            )
        return self._payloads[slot][:length]

    def take(self) -> None:
        self._taken += 1
        _fence()
        self._words[self._head] = self._taken


def _address(segment: mmap.mmap) -> int:
    return torch.frombuffer(segment, dtype=torch.uint8).data_ptr()


_fence_lock = threading.Lock()


def _fence() -> None:
    """Order all memory accesses before the call before all that follow it.

    A lock's release may not be passed by what precedes it, nor its acquisition by what follows,
    and the acquisition comes after the release of the same lock. Entered unlocked, the lock is
    taken, released and taken again, so the pair in the middle is that barrier.
    """
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def _pause_of_own_core(waited: float) -> float:
    """Return seconds to sleep: none at first, then 50 µs, growing to 5 ms after 5 seconds."""
    return 0.0 if waited < BUSY_SECONDS else max(50e-6, _pause_of_long_wait(waited))


def _pause_of_shared_core(waited: float) -> float:
    """Return seconds to sleep: an eighth of the wait so far, from 20 µs to 500 µs; 5 ms later."""
    return max(20e-6, min(waited / 8, 500e-6), _pause_of_long_wait(waited))


def _pause_of_long_wait(waited: float) -> float:
    """Return seconds to sleep: a thousandth of the wait so far; 5 ms take under 1 % of a core."""
    return min(waited / 1000, 5e-3)


def _anonymous_file() -> int:
    """Return a descriptor above 2: a worker's own standard files would replace a lower one."""
    with _nameless() as file:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def _nameless() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("ppsd"), "r+b", buffering=0)
    return tempfile.TemporaryFile()


def _attach(fd: int, geometry: Geometry) -> mmap.mmap:
    expected = _segment_bytes(geometry)
    if (actual := os.fstat(fd).st_size) != expected:
        raise ProtocolError(
            f"a shared memory segment for {geometry} has {expected} bytes, this one has {actual}"
        )
    segment = mmap.mmap(fd, expected)
    header = _header(geometry)
    with memoryview(segment).cast("q") as words:
        found = words[: len(header)].tolist()
    if found != header:
        raise ProtocolError(f"a shared memory segment begins with {found}, expected {header}")
    return segment


def _header(geometry: Geometry) -> list[int]:
    sizes = [geometry.size, geometry.forward_bytes, geometry.return_bytes, geometry.frames]
    return [MAGIC, LAYOUT_VERSION, *sizes, geometry.slots]


def _places(geometry: Geometry) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
    """Yield each link with its ring's first byte, largest frame and frames."""
    start = _rings_start(geometry)
    for link, limit in geometry.links().items():
        yield link, (start, limit, geometry.frames)
        start += _ring_bytes(limit, geometry.frames)


def _segment_bytes(geometry: Geometry) -> int:
    rings = (_ring_bytes(limit, geometry.frames) for limit in geometry.links().values())
    return _rings_start(geometry) + sum(rings)


def _rings_start(geometry: Geometry) -> int:
    return LINE + _round_up(geometry.slots * WORD)


def _ring_bytes(limit: int, frames: int) -> int:
    return 2 * LINE + (frames + 1) * _frame_bytes(limit)


def _frame_bytes(limit: int) -> int:
    return LINE + _round_up(limit)


def _round_up(size: int) -> int:
    return -(-size // LINE) * LINE
