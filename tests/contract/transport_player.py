"""One rank under test, driven by single commands: in this process, or as a child over its pipes.

A frame is described by (seed, length) pairs, one for each part, so that both sides know its
content; what a rank received is reported as (source, length, SHA-256).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ppsd import errors
from ppsd.transport import distributed
from ppsd.transport.base import Endpoint, Geometry
from ppsd.transport.distributed import DistributedEndpoint
from ppsd.transport.rendezvous import meet
from ppsd.transport.shared_memory import SharedMemoryEndpoint
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
Parts = list[tuple[int, int]]
PATIENCE = 60.0  # longer than any command below may take on a busy machine


def content(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def described(source: int, parts: Parts) -> list[Any]:
    data = b"".join(content(*part) for part in parts)
    return [source, len(data), hashlib.sha256(data).hexdigest()]


class Player:
    """The commands; each returns something that JSON can carry."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def send(self, to: int, parts: Parts, timeout: float = PATIENCE) -> None:
        first, *others = (content(*part) for part in parts)
        self.endpoint.send(to, [first, *map(tensor, others)], timeout)

    def send_all(self, to: int, frames: list[Parts]) -> None:
        for parts in frames:
            self.send(to, parts)

    def send_from_one_buffer(self, to: int, seeds: list[int], length: int) -> None:
        buffer = torch.empty(length, dtype=torch.uint8)
        for seed in seeds:
            buffer.copy_(tensor(content(seed, length)))
            self.endpoint.send(to, [buffer], PATIENCE)
            buffer.fill_(0)

    def fill(self, to: int, length: int) -> int:
        """Send frames with seeds 0, 1, … until the link is full; return how many it took."""
        for seed in range(1000):
            try:
                self.send(to, [(seed, length)], timeout=0.3)
            except errors.PipelineTimeoutError:
                return seed
        raise AssertionError("the link never fills up")

    def receive(self, timeout: float = PATIENCE) -> list[Any] | None:
        received = self.endpoint.receive(timeout)
        if received is None:
            return None
        source, frame = received
        apart = self.endpoint.rows
        data = bytes(frame.tolist()) + (b"" if apart is None else bytes(apart.tolist()))
        return [source, len(data), hashlib.sha256(data).hexdigest()]

    def receive_all(self, count: int) -> list[Any]:
        return [self.receive() for _ in range(count)]

    def publish(self, epoch: int) -> None:
        self.endpoint.publish(0, epoch)

    def await_epoch(self, epoch: int) -> int:
        deadline = time.monotonic() + PATIENCE
        while self.endpoint.epoch(0) != epoch and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.endpoint.epoch(0)

    def ended(self) -> bool:
        return self.endpoint.ended

    def speak_other_protocol(self) -> None:
        distributed.MAGIC = 0x50545448

    def close(self) -> None:
        self.endpoint.close()
        self.endpoint.close()


class LocalRank:
    """A player on a thread of its own; ``start`` returns at once, ``call`` waits."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.player = Player(endpoint)
        self._thread = ThreadPoolExecutor(1)

    def start(self, command: str, *arguments: Any) -> Future[Any]:
        return self._thread.submit(self._do, command, list(arguments))

    def call(self, command: str, *arguments: Any) -> Any:
        return self.start(command, *arguments).result(2 * PATIENCE)

    def shut(self) -> None:
        self.call("close")
        self._thread.shutdown()

    def _do(self, command: str, arguments: list[Any]) -> Any:
        return getattr(self.player, command)(*arguments)


class RemoteRank(LocalRank):
    """A player in a child process, which ends with its standard input."""

    def __init__(self, setup: dict[str, Any], *fds: int) -> None:
        self.ended = False
        self._thread = ThreadPoolExecutor(1)
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        child_in, ours_out = os.pipe()
        ours_in, child_out = os.pipe()
        self._commands = os.fdopen(ours_out, "w")
        self._replies = os.fdopen(ours_in)
        self.pid = nursery().fork(setup, child_in, child_out, self._noise.fileno(), *fds)
        os.close(child_in)
        os.close(child_out)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signal_number)

    def shut(self) -> None:
        """Close, end the child, and insist on a clean exit."""
        self.call("close")
        assert self.end() == (0, "")

    def end(self) -> tuple[int, str]:
        """Tell the child to end; return its exit status and what it wrote to standard error."""
        self.ended = True
        self._thread.shutdown()
        self._commands.close()
        self._replies.close()
        status = nursery().wait(self.pid)
        self._noise.seek(0)
        with self._noise:
            return status, self._noise.read().decode()

    def _do(self, command: str, arguments: list[Any]) -> Any:
        print(json.dumps([command, arguments]), file=self._commands, flush=True)
        reply = json.loads(self._replies.readline())
        if "error" in reply:
            raise getattr(errors, reply["error"])(reply["text"])
        return reply["result"]


class Nursery:
    """A process that has imported torch and forks players, which saves each two seconds."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        subprocess.Popen(
            [sys.executable, "-m", "tests.contract.transport_player", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        )
        theirs.close()

    def fork(self, setup: dict[str, Any], *fds: int) -> int:
        """Start a player with ``fds`` as standard input, output and error, and the segment."""
        socket.send_fds(self._socket, [json.dumps(setup).encode()], fds)
        return int(self._socket.recv(100))

    def wait(self, pid: int) -> int:
        """Return the exit status of a player, negative for a signal."""
        self._socket.send(json.dumps(pid).encode())
        return int(self._socket.recv(100))


@functools.cache
def nursery() -> Nursery:
    return Nursery()


def gloo_ranks(geometry: Geometry, timeout: float, *, apart: bool = False) -> list[RemoteRank]:
    port = free_port()
    common = {"geometry": vars(geometry), "port": port, "timeout": timeout, "apart": apart}
    return [RemoteRank({"rank": rank} | common) for rank in range(geometry.size)]


def _serve(requests: socket.socket) -> None:
    """Be the nursery; return in every forked child once it has played."""
    while True:
        message, fds, *_ = socket.recv_fds(requests, 4096, 4)
        if not message:
            break
        request = json.loads(message)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif (answer := os.fork()) == 0:
            requests.close()
            for standard, fd in enumerate(fds[:3]):
                os.dup2(fd, standard)
                os.close(fd)
            _play(request, *fds[3:])
            break
        for fd in fds:
            os.close(fd)
        requests.send(str(answer).encode())


def _play(setup: dict[str, Any], *fds: int) -> None:
    torch.set_num_threads(1)
    player = Player(_endpoint(setup, *fds))
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            reply = {"result": getattr(player, command)(*arguments)}
        except errors.PpsdError as error:
            reply = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(reply), flush=True)


def _endpoint(setup: dict[str, Any], *fds: int) -> Endpoint:
    geometry, rank = Geometry(**setup["geometry"]), setup["rank"]
    if fds:
        return SharedMemoryEndpoint(fds[0], geometry, rank, spin=False)
    meeting = meet(rank, geometry.size, "127.0.0.1", setup["port"], PATIENCE)
    apart = torch.device("cpu") if setup["apart"] else None
    return DistributedEndpoint(geometry, meeting, setup["timeout"], apart)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
