"""Whether stages that work at once have memory of their own to read from.

Stages on devices do. Two CPU cores do only while each has its own way to memory: on a virtual
machine the host moves them, and two that lie on one core complex for a while share its link. How
fast a pipeline of them is says then how fast that link is. Used by oracle.py.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence

SIZE = 64 << 20  # bytes a core reads over and over: more than caches hold
CHUNK = 4 << 20
READING_S = 0.005
SETTLING_S = 0.03  # until idle stages no longer poll without pauses
STARTING_S = 10.0  # for threads to begin together
OWN = 0.9  # cores that reach this share of what each reads alone have memory of their own


class MemoryProbe:
    """Compares what ``cores`` read at once with what each reads alone."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._buffers = {core: ctypes.create_string_buffer(SIZE) for core in cores}
        for buffer in self._buffers.values():
            ctypes.memset(buffer, 1, SIZE)
        self._find = ctypes.CDLL(None).memchr  # as fast a reader as there is, and lets others run
        self._find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def share(self) -> float:
        """The rate at which the slowest core reads while all do, over its rate alone."""
        time.sleep(SETTLING_S)
        alone = {core: self._rates([core])[core] for core in self._buffers}
        together = self._rates(list(self._buffers))
        return min(together[core] / alone[core] for core in alone)

    def _rates(self, cores: Sequence[int]) -> dict[int, float]:
        """Bytes per second that each of ``cores`` reads while all of them do."""
        rates: dict[int, float] = {}
        start = threading.Barrier(len(cores), timeout=STARTING_S)

        def read(core: int) -> None:
            os.sched_setaffinity(0, {core})  # of this thread
            address, done = ctypes.addressof(self._buffers[core]), 0
            start.wait()
            begin = time.perf_counter()
            while (passed := time.perf_counter() - begin) < READING_S:
                self._find(address + done % SIZE, 0, CHUNK)
                done += CHUNK
            rates[core] = done / passed

        threads = [threading.Thread(target=read, args=(core,)) for core in cores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return rates


def probe_of(cores: Sequence[Sequence[int]]) -> MemoryProbe | None:
    """A probe of the first core of every stage; None where stages do not stay on cores."""
    firsts = [own[0] for own in cores if own]
    return MemoryProbe(firsts) if len(firsts) == len(cores) else None
