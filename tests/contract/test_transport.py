"""The contract of ppsd.transport.base.Endpoint, for every transport and across real processes."""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd.errors import PipelineTimeoutError, ProtocolError
from ppsd.transport.base import Endpoint, Geometry
from ppsd.transport.inprocess import InProcessHub
from ppsd.transport.shared_memory import SharedMemoryEndpoint, create_segment
from tests.contract.transport_player import (
    LocalRank,
    Parts,
    RemoteRank,
    content,
    described,
    gloo_ranks,
    tensor,
)

# Forward frames are longer than what gloo sends as one message, return frames are shorter.
FORWARD, RETURN, SLOTS = 40_000, 5_000, 3


def geometry(size: int) -> Geometry:
    return Geometry(size, FORWARD, RETURN, SLOTS)


def in_process(size: int) -> list[Endpoint]:
    hub = InProcessHub(geometry(size))
    return [hub.endpoint(rank) for rank in range(size)]


def in_shared_memory(size: int) -> list[Endpoint]:
    fd = create_segment(geometry(size))
    ends = [SharedMemoryEndpoint(fd, geometry(size), rank, spin=False) for rank in range(size)]
    os.close(fd)
    return list(ends)


def shared_memory_processes(size: int) -> list[LocalRank]:
    fd = create_segment(geometry(size))
    first = LocalRank(SharedMemoryEndpoint(fd, geometry(size), 0, spin=False))
    setups = [{"rank": k, "geometry": vars(geometry(size))} for k in range(1, size)]
    others = [RemoteRank(setup, fd) for setup in setups]
    os.close(fd)
    return [first, *others]


TRANSPORTS: dict[str, Callable[[], list[LocalRank]]] = {
    "in-process-3": lambda: [LocalRank(end) for end in in_process(3)],
    "shared-memory-threads-3": lambda: [LocalRank(end) for end in in_shared_memory(3)],
    "shared-memory-processes-3": lambda: shared_memory_processes(3),
    "gloo-processes-2": lambda: list(gloo_ranks(geometry(2), timeout=60)),
    "gloo-processes-3": lambda: list(gloo_ranks(geometry(3), timeout=60)),
    "gloo-processes-3-rows-apart": lambda: list(gloo_ranks(geometry(3), timeout=60, apart=True)),
}


@pytest.fixture(scope="module", params=TRANSPORTS)
def ranks(request: pytest.FixtureRequest) -> Iterator[list[LocalRank]]:
    ranks = TRANSPORTS[request.param]()
    yield ranks
    closing = [rank.start("close") for rank in ranks]
    for done in closing:
        done.result(60)
    for rank in ranks:
        rank.shut()


@pytest.fixture
def concurrent_ranks(ranks: list[LocalRank], request: pytest.FixtureRequest) -> list[LocalRank]:
    if "in-process" in request.node.name:
        pytest.skip("nothing is concurrent in one thread")
    return ranks


def random_frames(count: int, limit: int, seed: int) -> list[Parts]:
    """Frames of one to four parts whose lengths add up to anything from 0 to ``limit``."""
    source = random.Random(seed)
    frames: list[Parts] = [[(seed, 0)], [(seed, limit)]]
    while len(frames) < count:
        cuts = sorted(source.randint(0, limit) for _ in range(source.randint(1, 4)))
        lengths = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
        frames.append([(source.randrange(10**6), length) for length in lengths])
    return frames


def links(ranks: list[LocalRank]) -> dict[tuple[int, int], int]:
    return geometry(len(ranks)).links()


def test_frames_arrive_whole_once_and_in_order(ranks: list[LocalRank]) -> None:
    for (source, to), limit in links(ranks).items():
        for parts in random_frames(8, limit, seed=source):
            ranks[source].call("send", to, parts)
            assert ranks[to].call("receive") == described(source, parts)
        assert ranks[to].call("receive", 0) is None


def test_long_streams_on_all_links_at_once(concurrent_ranks: list[LocalRank]) -> None:
    """Around the pipeline: 0 → 1 → … → last → 0, every rank receiving while the next one sends."""
    size = len(concurrent_ranks)
    frames = {k: random_frames(40, FORWARD if k < size - 1 else RETURN, k) for k in range(size)}
    for source in range(size):
        to = (source + 1) % size
        receiving = concurrent_ranks[to].start("receive_all", 40)
        concurrent_ranks[source].call("send_all", to, frames[source])
        assert receiving.result(60) == [described(source, parts) for parts in frames[source]]


def test_frames_sent_before_the_receiver_looks_wait_for_it(ranks: list[LocalRank]) -> None:
    frames = random_frames(SLOTS, FORWARD, seed=7)
    ranks[0].call("send_all", 1, frames)
    assert ranks[1].call("receive_all", SLOTS) == [described(0, parts) for parts in frames]


def test_a_frame_too_large_is_refused_and_harms_nothing(ranks: list[LocalRank]) -> None:
    for (source, to), limit in links(ranks).items():
        with pytest.raises(
            ProtocolError, match=f"rank {to} may have {limit} bytes, got {limit + 1}"
        ):
            ranks[source].call("send", to, [(1, limit), (2, 1)])
        ranks[source].call("send", to, [(3, limit)])
        assert ranks[to].call("receive") == described(source, [(3, limit)])


def test_only_the_links_of_the_pipeline_exist(ranks: list[LocalRank]) -> None:
    size = len(ranks)
    pairs = [(source, to) for source in range(size) for to in range(size + 1)]
    for source, to in pairs:
        if (source, to) not in links(ranks):
            with pytest.raises(ProtocolError, match=f"no link to rank {to}"):
                ranks[source].call("send", to, [(1, 1)])


def test_a_full_link_times_out_and_then_drains(ranks: list[LocalRank]) -> None:
    for (source, to), limit in links(ranks).items():
        taken = ranks[source].call("fill", to, limit)
        assert SLOTS <= taken <= 3 * SLOTS
        expected = [described(source, [(seed, limit)]) for seed in range(taken)]
        assert ranks[to].call("receive_all", taken) == expected
        assert ranks[to].call("receive", 0.05) is None


def test_nothing_to_receive_is_none(ranks: list[LocalRank]) -> None:
    for rank in ranks:
        assert rank.call("receive", 0) is None
        assert rank.call("receive", 0.01) is None


def test_the_epoch_overtakes_frames(ranks: list[LocalRank]) -> None:
    ranks[0].call("publish", 1)
    taken = ranks[0].call("fill", 1, FORWARD)
    for epoch in (2, 3, 2**40):
        ranks[0].call("publish", epoch)
        assert [rank.call("await_epoch", epoch) for rank in ranks] == [epoch] * len(ranks)
    expected = [described(0, [(seed, FORWARD)]) for seed in range(taken)]
    assert ranks[1].call("receive_all", taken) == expected


def test_rank_0_hears_from_all_ranks(ranks: list[LocalRank]) -> None:
    sent = defaultdict(list)
    for source in range(1, len(ranks)):
        for parts in random_frames(SLOTS, RETURN, seed=source):
            ranks[source].call("send", 0, parts)
            sent[source].append(described(source, parts))
    heard = defaultdict(list)
    for frame in ranks[0].call("receive_all", SLOTS * (len(ranks) - 1)):
        heard[frame[0]].append(frame)
    assert heard == sent


def test_a_buffer_may_be_reused_after_send(ranks: list[LocalRank]) -> None:
    seeds = list(range(SLOTS))
    ranks[0].call("send_from_one_buffer", 1, seeds, FORWARD)
    expected = [described(0, [(seed, FORWARD)]) for seed in seeds]
    assert ranks[1].call("receive_all", SLOTS) == expected


@contextmanager
def closing(ends: list[Endpoint]) -> Iterator[list[Endpoint]]:
    yield ends
    for end in ends:
        end.close()


LINKS = sorted(geometry(3).links())
SENDS = st.tuples(st.sampled_from(LINKS), st.integers(0, 2**32), st.integers(0, RETURN))
STEPS = st.lists(SENDS | st.integers(0, 2) | st.integers(10, 99), max_size=60)


@pytest.mark.parametrize("make", [in_process, in_shared_memory])
@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_interleaving_equals_queues(
    make: Callable[[int], list[Endpoint]], steps: list[tuple[tuple[int, int], int, int] | int]
) -> None:
    """A tuple sends, a number below 3 is a rank that receives, a larger one is a new epoch.

    A received frame stays intact until its receiver's next call.
    """
    queues: dict[tuple[int, int], deque[bytes]] = {link: deque() for link in LINKS}
    lent: dict[int, tuple[int, memoryview, bytes]] = {}
    epoch = 0
    with closing(make(3)) as ends:
        for step in steps:
            if isinstance(step, tuple):
                (source, to), seed, length = step
                data = content(seed, length)
                try:
                    ends[source].send(to, [tensor(data)], 0)
                    queues[source, to].append(data)
                except PipelineTimeoutError:
                    assert len(queues[source, to]) >= SLOTS
                assert len(queues[source, to]) <= SLOTS + 1
            elif step < 3:
                lent.pop(step, None)
                waiting = [k for k in range(3) if queues.get((k, step))]
                received = ends[step].receive(0)
                assert (received is not None) == bool(waiting)
                if received is not None:
                    assert received[0] in waiting
                    lent[step] = (*received, queues[received[0], step].popleft())
            else:
                ends[0].publish(0, epoch := step)
            assert [end.epoch(0) for end in ends] == [epoch] * 3
            assert all(bytes(frame.tolist()) == data for _, frame, data in lent.values())
        lent.clear()
