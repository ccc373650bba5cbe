"""Whether stages that work at once have memory of their own to read from.

Stages on devices do. Two CPU cores do only while each has its own way to memory: on a virtual
machine the host moves them, and two that lie on one core complex for a while share its link. How
fast a pipeline of them is says then how fast that link is. So it is noted with each request, and
summaries can keep to those of one kind: what is noted does not know how fast the request was.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from ppsd.errors import PpsdError
from ppsd.lab.runner import PLAIN, Cell, Measurement, Results

MEMORIES = ("any", "own", "shared")
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
        """Return the rate at which the slowest core reads while all do, over its rate alone."""
        time.sleep(SETTLING_S)
        alone = {core: self._rates([core])[core] for core in self._buffers}
        together = self._rates(list(self._buffers))
        return min(together[core] / alone[core] for core in alone)

    def _rates(self, cores: Sequence[int]) -> dict[int, float]:
        """Measure the bytes per second that each of ``cores`` reads while all of them do."""
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
    """Return a probe of the first core of every stage; None where stages do not stay on cores."""
    firsts = [own[0] for own in cores if own]
    return MemoryProbe(firsts) if len(firsts) == len(cores) else None


def noted(
    measure: Callable[[Cell], Measurement], cores: Sequence[Sequence[int]]
) -> Callable[[Cell], Measurement]:
    """Put ``measure`` between two looks at the memory of ``cores``, those of every stage."""
    probe = probe_of(cores)

    def measured(cell: Cell) -> Measurement:
        before = probe and probe.share()
        found = measure(cell)
        return replace(found, details=found.details | {"memory": [before, probe and probe.share()]})

    return measured


def memory_of(measurement: Measurement) -> str | None:
    """Say if all stages' cores at once read as fast as each alone, before and after a request.

    ``own`` if they did, ``shared`` if they did not both times, ``mixed`` if once; None where it is
    not known.
    """
    shares: list[float | None] = measurement.details.get("memory", [])
    own = [share >= OWN for share in shares if share is not None]
    if not own:
        return None
    return "own" if all(own) else "mixed" if any(own) else "shared"


def with_memory(results: Results, memory: str) -> Results:
    """Return the results without requests whose stages had other memory; ``any`` keeps all.

    Plain ones stay, whatever they had: no two stages work at once. Raises PpsdError when nothing
    else does.
    """
    kept = results.only(lambda m: m.variant == PLAIN or memory in ("any", memory_of(m)))
    if all(cell.variant == PLAIN for cell in kept.measurements):
        raise PpsdError(f"no request but plain ones had {memory} memory, or it is not known of any")
    return kept


def label(results: Results, memory: str) -> str:
    """Return what memory requests had and which of them count; nothing where it is not known."""
    counts = Counter(map(memory_of, results.measurements.values()))
    known = sorted((kind, count) for kind, count in counts.items() if kind)
    kinds = ", ".join(f"{count} {kind}" for kind, count in known)
    return f"memory of requests: {kinds}; {memory} counts" if kinds else ""
