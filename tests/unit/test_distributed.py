"""torch.distributed: start-up refusals, lost and silent peers, damaged messages, shutdown."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ppsd.errors import (
    ConfigError,
    PipelineError,
    PipelineTimeoutError,
    ProtocolError,
    StageLostError,
)
from ppsd.transport.base import Geometry
from ppsd.transport.distributed import FAREWELL, DistributedEndpoint
from ppsd.transport.gloo_link import HEADER_BYTES, MAGIC, GlooLink
from ppsd.transport.rendezvous import meet, meet_from_environment
from tests.contract.transport_player import ROOT, RemoteRank, described, gloo_ranks
from tests.support.ports import free_port

SILENCE = 3  # seconds; heartbeats come every second
GEOMETRY = Geometry(size=2, forward_bytes=40_000, return_bytes=5_000, frames=2)


@pytest.fixture
def pair() -> Iterator[list[RemoteRank]]:
    """Two ranks that have met; a test may kill, stop or shut either."""
    ranks = gloo_ranks(GEOMETRY, timeout=SILENCE)
    ranks[0].call("send", 1, [(1, 40_000)])
    assert ranks[1].call("receive") == described(0, [(1, 40_000)])
    yield ranks
    for rank in ranks:
        if not rank.ended:
            rank.kill()
            rank.end()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_is_named(pair: list[RemoteRank], victim: int) -> None:
    survivor = pair[1 - victim]
    waiting = survivor.start("receive", 60)
    pair[victim].kill()
    with pytest.raises(StageLostError, match=f"rank {victim} is gone"):
        waiting.result(60)
    with pytest.raises(StageLostError, match=f"rank {victim} is gone"):
        survivor.call("send", victim, [(1, 10)])
    with pytest.raises(StageLostError, match=f"rank {victim} is gone"):
        survivor.call("receive", 0)
    assert not survivor.call("ended")
    survivor.shut()


def test_a_silent_rank_0_is_named_and_nobody_hangs(pair: list[RemoteRank]) -> None:
    """A stopped process keeps its connections, so only the missing signs of life tell."""
    pair[0].kill(signal.SIGSTOP)
    with pytest.raises(StageLostError, match="rank 0 gave no sign of life for 3"):
        pair[1].call("receive", 60)
    assert not pair[1].call("ended")
    pair[1].shut()


def test_close_does_not_wait_for_a_stopped_peer(pair: list[RemoteRank]) -> None:
    pair[1].kill(signal.SIGSTOP)
    assert pair[0].call("fill", 1, 40_000) >= 1
    pair[0].shut()


def test_a_worker_that_leaves_is_missed_only_when_needed(pair: list[RemoteRank]) -> None:
    pair[1].call("send", 0, [(5, 4_000)])
    pair[1].shut()
    assert pair[0].call("receive") == described(1, [(5, 4_000)])
    assert pair[0].call("receive", 1.5) is None  # long enough for a heartbeat to fail
    with pytest.raises(StageLostError, match="rank 1 is gone"):
        pair[0].call("send", 1, [(1, 10)])
    pair[0].shut()


def test_workers_do_not_outlive_rank_0(pair: list[RemoteRank]) -> None:
    pair[0].call("send", 1, [(5, 40_000)])
    pair[0].shut()
    assert pair[1].call("receive") == described(0, [(5, 40_000)])
    with pytest.raises(StageLostError, match="rank 0 is gone"):
        pair[1].call("receive", 60)
    assert pair[1].call("ended")
    pair[1].shut()


def test_rank_0_says_goodbye_to_stages_that_work() -> None:
    """To those that receive nothing meanwhile, and to those that rank 0 sends no frames to."""
    ranks = gloo_ranks(
        Geometry(size=3, forward_bytes=40_000, return_bytes=5_000, frames=2), SILENCE
    )
    ranks[0].call("fill", 1, 40_000)
    ranks[0].shut()
    for rank in ranks[1:]:
        assert rank.call("ended")
        assert rank.call("await_epoch", FAREWELL) == FAREWELL  # no pass is worth its end
        rank.shut()


def test_a_process_that_ends_without_close_ends_cleanly(pair: list[RemoteRank]) -> None:
    assert pair[0].end() == (0, "")
    with pytest.raises(StageLostError, match="rank 0 is gone"):
        pair[1].call("receive", 60)
    assert pair[1].call("ended")
    assert pair[1].end() == (0, "")


def test_a_full_link_to_a_lost_peer_is_not_a_timeout(pair: list[RemoteRank]) -> None:
    assert pair[0].call("fill", 1, 40_000) >= GEOMETRY.frames
    sending = pair[0].start("send", 1, [(1, 40_000)], 60)
    pair[1].kill()
    with pytest.raises(StageLostError, match="rank 1 is gone"):
        sending.result(60)


def test_another_protocol_is_refused(pair: list[RemoteRank]) -> None:
    pair[0].call("speak_other_protocol")
    pair[0].call("send", 1, [(1, 10)])
    with pytest.raises(ProtocolError, match="rank 0 sent a frame with magic 0x50545448"):
        pair[1].call("receive", 60)
    with pytest.raises(ProtocolError):
        pair[1].call("send", 0, [(1, 10)])


@pytest.mark.parametrize(
    ("magic", "length", "rows"),
    [
        (MAGIC, 2**40, 0),
        (MAGIC, -1, 0),
        (MAGIC, 101, 0),
        (MAGIC, 60, 41),
        (MAGIC, 60, -1),
        (MAGIC + 1, 5, 0),
        (0, 0, 0),
    ],
)
def test_a_damaged_header_is_refused(magic: int, length: int, rows: int) -> None:
    link = GlooLink(peer=3, limit=100, frames=1)
    buffer = torch.zeros(HEADER_BYTES + 100, dtype=torch.uint8)
    buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor([magic, length, rows, 0]))
    with pytest.raises(
        ProtocolError, match=f"rank 3 sent a frame with .* and {length} . {rows} bytes"
    ):
        link.check(buffer)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PipelineError, match=f"^address already in use: 127.0.0.1:{port}$"):
            meet(0, 2, "127.0.0.1", port, 5)


def failures(*starts: Callable[[], None]) -> list[str]:
    """Run start-ups that must all fail at the same time; return their texts."""
    with ThreadPoolExecutor(len(starts)) as threads:
        errors = [started.exception() for started in [threads.submit(start) for start in starts]]
    return [f"{type(error).__name__}: {error}" for error in errors]


def test_ranks_that_never_join_are_named_by_all_who_did() -> None:
    port = free_port()
    text = "PipelineTimeoutError: did not join within 2 s: rank 1, 3"
    assert failures(
        lambda: meet(0, 4, "127.0.0.1", port, 2),
        lambda: meet(2, 4, "127.0.0.1", port, 2),
    ) == [text, text]


def test_a_missing_rank_0_is_named() -> None:
    port = free_port()
    with pytest.raises(PipelineTimeoutError, match=f"rank 0 did not answer at 127.0.0.1:{port}"):
        meet(1, 2, "127.0.0.1", port, 1)


def test_a_rank_that_dies_once_all_have_met_is_not_waited_for() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        meetings = [threads.submit(meet, rank, 2, "127.0.0.1", port, 60) for rank in range(2)]
        first, _ = (meeting.result() for meeting in meetings)  # the second never opens its end

    def check() -> None:
        raise StageLostError("stage 1 was killed")

    with pytest.raises(StageLostError, match="stage 1 was killed"):
        DistributedEndpoint(GEOMETRY, first, SILENCE, join_timeout=2, check=check)


def test_ranks_that_disagree_on_the_size_are_refused() -> None:
    port = free_port()
    assert failures(
        lambda: meet(0, 2, "127.0.0.1", port, 2),
        lambda: meet(1, 3, "127.0.0.1", port, 2),
    ) == [
        "PipelineTimeoutError: did not join within 2 s: rank 1",
        "PipelineError: rank 1 was started as one of 3, rank 0 as one of 2",
    ]


def test_a_rank_started_twice_is_refused() -> None:
    port = free_port()
    texts = failures(
        lambda: meet(0, 3, "127.0.0.1", port, 2),
        lambda: meet(1, 3, "127.0.0.1", port, 2),
        lambda: meet(1, 3, "127.0.0.1", port, 2),
    )
    assert sorted(texts[1:]) == [
        "PipelineError: rank 1 was started twice",
        "PipelineTimeoutError: did not join within 2 s: rank 2",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", text) for text in ("one", "", "-1", "2", "1.5", "²", "9" * 50)),
        *(("WORLD_SIZE", text) for text in ("", "0", "two")),
        *(("MASTER_PORT", text) for text in ("", "0", "65536", "http")),
        ("MASTER_ADDR", ""),
    ],
)
def test_a_bad_torchrun_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, text in (good | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ConfigError, match=f"{name} must be .* as torchrun sets it, got '?{value}"):
        meet_from_environment(1)


TORCHRUN_PROGRAM = """
from ppsd.transport.base import Geometry
from ppsd.transport.distributed import DistributedEndpoint
from ppsd.transport.rendezvous import meet_from_environment
meeting = meet_from_environment(60)
rank = meeting.rank
end = DistributedEndpoint(Geometry(meeting.size, 100, 100, 2), meeting, 60)
if rank == 0:
    end.send(1, [bytes([1, 2, 3])], 60)
source, frame = end.receive(60)
if rank == 1:
    end.send(0, [bytes(value + 1 for value in frame)], 60)
else:
    print(source, frame.tolist())
end.close()
"""


def test_two_ranks_under_torchrun(tmp_path: object) -> None:
    program = os.path.join(str(tmp_path), "program.py")
    with open(program, "w") as file:
        file.write(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1 [2, 3, 4]\n"), done.stderr
