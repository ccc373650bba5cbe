"""Shared memory: attaching, damage, lifetime of the segment, fairness."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ppsd.errors import InsufficientMemoryError, PipelineTimeoutError, ProtocolError
from ppsd.transport import shared_memory
from ppsd.transport.base import Geometry, Part
from ppsd.transport.shared_memory import LINE, WORD, SharedMemoryEndpoint, create_segment

GEOMETRY = Geometry(size=3, forward_bytes=1000, return_bytes=100, frames=2)
RING_0_TO_1 = 2 * LINE
FIRST_LENGTH = RING_0_TO_1 + 2 * LINE


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_segment(GEOMETRY)
    yield fd
    os.close(fd)


def attach(fd: int, rank: int, *, spin: bool = False) -> SharedMemoryEndpoint:
    return SharedMemoryEndpoint(fd, GEOMETRY, rank, spin)


def frame(*values: int) -> list[Part]:
    return [bytes(values)]


def write_word(fd: int, offset: int, value: int) -> None:
    os.pwrite(fd, value.to_bytes(WORD, sys.byteorder), offset)


@pytest.mark.parametrize("field", ["size", "forward_bytes", "return_bytes", "frames"])
def test_another_geometry_is_refused(fd: int, field: str) -> None:
    other = replace(GEOMETRY, **{field: getattr(GEOMETRY, field) + 1})
    with pytest.raises(ProtocolError, match=f"{field}={getattr(other, field)}|begins with"):
        SharedMemoryEndpoint(fd, other, 0, spin=False)


def test_garbage_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        with pytest.raises(ProtocolError, match="this one has 0"):
            attach(file.fileno(), 0)
        fd = create_segment(GEOMETRY)
        file.write(bytes([0xAA]) * os.fstat(fd).st_size)
        file.flush()
        os.close(fd)
        with pytest.raises(ProtocolError, match="begins with"):
            attach(file.fileno(), 0)


def test_another_layout_version_is_refused(fd: int) -> None:
    write_word(fd, WORD, shared_memory.LAYOUT_VERSION + 1)
    with pytest.raises(ProtocolError, match="begins with"):
        attach(fd, 0)


@pytest.mark.parametrize("length", [2**40, -1 % 2**64, GEOMETRY.forward_bytes + 1])
def test_an_absurd_frame_length_is_refused(fd: int, length: int) -> None:
    sender, receiver = attach(fd, 0), attach(fd, 1)
    sender.send(1, frame(1, 2, 3), 0)
    write_word(fd, FIRST_LENGTH, length)
    with pytest.raises(ProtocolError, match="a ring is damaged"):
        receiver.receive(0)


@pytest.mark.parametrize("tail", [2**40, -1 % 2**64])
def test_an_absurd_counter_is_refused(fd: int, tail: int) -> None:
    receiver = attach(fd, 1)
    write_word(fd, RING_0_TO_1 + LINE, tail)
    with pytest.raises(ProtocolError, match="a ring is damaged"):
        receiver.receive(0)


def test_a_frame_keeps_its_slot_until_the_next_receive(fd: int) -> None:
    sender, receiver = attach(fd, 0), attach(fd, 1)
    sender.send(1, frame(1, 2, 3), 0)
    received = receiver.receive(0)
    assert received is not None
    for value in range(GEOMETRY.frames):
        sender.send(1, frame(value), 0)
    with pytest.raises(PipelineTimeoutError):
        sender.send(1, frame(9), 0)
    assert received[1].tolist() == [1, 2, 3]
    receiver.receive(0)
    sender.send(1, frame(9), 0)


def test_a_received_frame_outlives_close(fd: int) -> None:
    sender, receiver = attach(fd, 0), attach(fd, 1)
    sender.send(1, frame(4, 5, 6), 0)
    received = receiver.receive(0)
    assert received is not None
    receiver.close()
    sender.close()
    gc.collect()
    assert received[1].tolist() == [4, 5, 6]


def test_rank_0_serves_its_links_in_turn(fd: int) -> None:
    ends = [attach(fd, rank) for rank in range(3)]
    for rank in (1, 2):
        for _ in range(2):
            ends[rank].send(0, frame(rank), 0)
    order = [received[0] for _ in range(4) if (received := ends[0].receive(0))]
    assert order in ([1, 2, 1, 2], [2, 1, 2, 1])


def test_words_tell_of_frames_at_rank_0_and_of_epochs_elsewhere(fd: int) -> None:
    ends = [attach(fd, rank) for rank in range(GEOMETRY.size)]

    def words(rank: int) -> list[int]:
        return [ctypes.c_int64.from_address(word).value for word in ends[rank].words(0)]

    before = [words(rank) for rank in range(GEOMETRY.size)]
    ends[0].publish(0, 9)
    assert words(0) == before[0]
    assert all(words(rank) == [9] for rank in range(1, GEOMETRY.size))
    ends[0].send(1, frame(1), 0)
    for rank in range(1, GEOMETRY.size):
        seen = words(0)
        ends[rank].send(0, frame(rank), 0)
        assert words(0) != seen
        assert words(rank) == [9]
        assert ends[0].receive(0) is not None


def test_counters_survive_many_rounds_of_the_ring(fd: int) -> None:
    sender, receiver = attach(fd, 1), attach(fd, 2)
    for value in range(100):
        sender.send(2, frame(value, value + 1), 0)
        received = receiver.receive(0)
        assert received is not None
        assert (received[0], received[1].tolist()) == (1, [value, value + 1])


def test_no_room_names_the_needed_size() -> None:
    huge = replace(GEOMETRY, forward_bytes=2**60)
    with pytest.raises(InsufficientMemoryError, match=r"needs \d{19} bytes of shared memory"):
        create_segment(huge)


def test_a_file_size_limit_is_a_clear_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InsufficientMemoryError, match=r"needs \d+ bytes of shared memory"):
            create_segment(GEOMETRY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_files() == before


def test_without_memfd_an_unlinked_file_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fd = create_segment(GEOMETRY)
    sender, receiver = attach(fd, 0), attach(fd, 1)
    os.close(fd)
    sender.send(1, frame(7), 0)
    received = receiver.receive(0)
    assert received is not None
    assert received[1].tolist() == [7]
    assert list(tmp_path.iterdir()) == []


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:ppsd")


def test_fifty_cycles_leak_nothing() -> None:
    before = open_files(), mapped_segments()
    for _ in range(50):
        fd = create_segment(GEOMETRY)
        ends = [attach(fd, rank) for rank in range(3)]
        os.close(fd)
        ends[0].send(1, frame(1), 0)
        ends[1].receive(0)
        assert mapped_segments() > before[1]
        for end in ends:
            end.close()
    assert (open_files(), mapped_segments()) == before


CHILD_PROGRAM = """
import sys, time
from ppsd.transport.base import Geometry
from ppsd.transport.shared_memory import SharedMemoryEndpoint
end = SharedMemoryEndpoint(int(sys.argv[1]), Geometry(3, 1000, 100, 2), 1, spin=True)
source, frame = end.receive(60)
end.send(0, [bytes(value + 1 for value in frame)], 60)
time.sleep(60)
"""


def test_a_killed_child_leaves_its_frames_in_a_nameless_segment(fd: int) -> None:
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:ppsd (deleted)"
    end = attach(fd, 0)
    environment = os.environ | {"PYTHONPATH": str(Path(shared_memory.__file__).parents[2])}
    command = [sys.executable, "-c", CHILD_PROGRAM, str(fd)]
    child = subprocess.Popen(command, pass_fds=(fd,), env=environment)
    end.send(1, frame(1, 2), 0)
    received = end.receive(60)
    child.kill()
    child.wait()
    assert received is not None
    assert (received[0], received[1].tolist()) == (1, [2, 3])


@pytest.mark.parametrize("spin", [True, False])
def test_waiting_never_sleeps_less_the_longer_it_lasts(spin: bool) -> None:
    pause = shared_memory._pause_of_own_core if spin else shared_memory._pause_of_shared_core
    waits = [0.0, 1e-4, 1e-3, 0.01, 0.019, 0.03, 0.1, 1.0, 10.0, 1000.0]
    pauses = [pause(waited) for waited in waits]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.0 if spin else 20e-6, 5e-3)


@pytest.mark.parametrize("spin", [True, False])
def test_waits_in_vain_are_one_long_wait(fd: int, spin: bool, monkeypatch) -> None:
    """An idle worker asks again every second; were each wait a new one, it would poll for ever."""
    end, peer = attach(fd, 0, spin=spin), attach(fd, 1, spin=spin)
    clock = Clock()
    monkeypatch.setattr(shared_memory, "time", clock)
    for _ in range(7):
        clock.slept.clear()
        assert end.receive(1.0) is None
    assert len(clock.slept) <= 210, "5 ms each, and what is left"

    peer.send(0, frame(1), 0)
    assert end.receive(0) is not None
    assert longest_sleep(end, clock) < 1e-3, "work is due again"
    for _ in range(7):
        end.receive(1.0)
    end.send(1, frame(2), 0)
    assert longest_sleep(end, clock) < 1e-3, "an answer is due"
    clock.now += 60.0
    assert end.receive(0) is None
    end.send(1, frame(3), 0)
    clock.now += 60.0
    assert longest_sleep(end, clock) < 1e-3, "its own work is no waiting"


def longest_sleep(end: SharedMemoryEndpoint, clock: Clock) -> float:
    clock.slept.clear()
    assert end.receive(0.03) is None
    return max(clock.slept)


class Clock:
    """Stands in for the module ``time``; every look at it takes a microsecond."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
