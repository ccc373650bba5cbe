"""How ranks on several hosts find each other and form torch.distributed's default group.

Imported by engine/ and worker/ before they make a DistributedEndpoint. Every rank announces
itself in a store kept by rank 0; rank 0 alone decides who is missing, and tells the others.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its stubs
from torch.distributed.distributed_c10d import PrefixStore, Store

from ppsd.errors import (
    ConfigError,
    PipelineError,
    PipelineTimeoutError,
    ProtocolError,
    StageLostError,
)

POLL_SECONDS = 0.02
INTERFACE = "GLOO_SOCKET_IFNAME"
MAX_TEXT_BYTES = 1 << 24


def init_group(
    rank: int,
    size: int,
    host: str,
    port: int,
    timeout: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Form the default group of ``size`` ranks that meet at rank 0's ``host:port``.

    Rank 0 calls ``check`` while it waits; it raises when a rank is known not to come any more.
    Raises PipelineError when the address is in use or the ranks disagree on who they are, and
    PipelineTimeoutError naming the ranks that did not join within ``timeout`` seconds.
    """
    try:
        store = _open_store(rank, host, port, timeout)
        _meet(store, rank, size, timeout, check)
        limit = timedelta(seconds=timeout)
        group_store = PrefixStore("group", store)
        dist.init_process_group(
            "gloo", store=group_store, rank=rank, world_size=size, timeout=limit
        )
    except dist.DistError as error:
        raise StageLostError(f"rank 0 at {host}:{port} went away during start-up") from error


def init_group_from_environment(timeout: float) -> tuple[int, int]:
    """Form the default group under torchrun and return (rank, size).

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; errors are those of ``init_group``.
    """
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError("MASTER_ADDR", host, "rank 0's host name, as torchrun sets it")
    init_group(rank, size, host, port, timeout)
    return rank, size


def open_group(backend: str, timeout: float) -> dist.ProcessGroup:
    """Return a group of all ranks; PipelineTimeoutError when one of them does not come."""
    try:
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise PipelineTimeoutError(
            f"a rank that had joined did not connect within {timeout:g} s ({cause})"
        ) from error
    assert isinstance(group, dist.ProcessGroup)  # it is an int for ranks outside the group
    return group


def leave_group() -> None:
    """Undo ``init_group``, so that this process can form another group; no endpoint may be open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(name, text, "a number, as torchrun sets it")
    return int(text)


def _open_store(rank: int, host: str, port: int, timeout: float) -> Store:
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not agent_keeps_store
    listener = _listener(host, port) if listens and _is_loopback(host) else None
    try:
        store = TCPStore(
            host,
            port,
            is_master=listens,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except dist.DistError as error:
        if not listens:
            raise PipelineTimeoutError(
                f"rank 0 did not answer at {host}:{port} within {timeout} s"
            ) from error
        if "EADDRINUSE" in str(error):
            raise PipelineError(f"address already in use: {host}:{port}") from error
        raise PipelineError(f"cannot listen at {host}:{port}: {error}") from error
    # torchrun keeps one store over restarts; names of a former attempt must not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"ppsd/{attempt}", store)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket of this host alone; TCPStore's own would listen on all its interfaces."""
    try:
        return socket.create_server((host, port), backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PipelineError(f"address already in use: {host}:{port}") from error
        raise PipelineError(f"cannot listen at {host}:{port}: {error.strerror}") from error


@contextmanager
def listening_with(host: str) -> Iterator[None]:
    """Let groups made meanwhile listen on the loopback interface alone if rank 0's ``host`` is.

    Gloo takes the interface from the environment, and otherwise that of the host's name.
    """
    if not _is_loopback(host):
        yield
        return
    before = os.environ.get(INTERFACE)
    addresses = psutil.net_if_addrs().items()
    loopback = [name for name, of in addresses if any(a.address == "127.0.0.1" for a in of)]
    os.environ[INTERFACE] = loopback[0]
    try:
        yield
    finally:
        del os.environ[INTERFACE]
        if before is not None:
            os.environ[INTERFACE] = before


def _meet(store: Store, rank: int, size: int, timeout: float, check: Callable[[], None]) -> None:
    """Return when all ranks are known to be here; raise the same error on all when they are not."""
    if rank == 0:
        store.set("size", str(size))
    elif (expected := int(_get(store, "size", timeout))) != size:
        raise PipelineError(
            f"rank {rank} was started as one of {size}, rank 0 as one of {expected}"
        )
    if store.add(f"rank {rank}", 1) > 1:
        raise PipelineError(f"rank {rank} was started twice")
    if rank == 0:
        store.set("missing", _missing_ranks(store, size, timeout, check))
    if missing := _get(store, "missing", timeout):
        raise PipelineTimeoutError(f"did not join within {timeout} s: rank {missing}")


def _missing_ranks(store: Store, size: int, timeout: float, check: Callable[[], None]) -> str:
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(size) if not store.check([f"rank {rank}"])]:
        if time.monotonic() > deadline:
            break
        check()
        time.sleep(POLL_SECONDS)
    return ", ".join(map(str, missing))


def _get(store: Store, key: str, timeout: float) -> str:
    # Rank 0 may have started later than this rank, and its own deadline with it.
    store.set_timeout(timedelta(seconds=2 * timeout))
    value: bytes = store.get(key)
    return value.decode()


def free_port() -> int:
    """Return a TCP port of this host that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def send_text(to: int, text: str) -> None:
    """Send text to a rank of the group, before any endpoint exists."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    dist.send(torch.tensor([data.numel()]), to)
    dist.send(data, to)


def receive_text(source: int) -> str:
    """Receive what ``send_text`` sent; ProtocolError when its length makes no sense."""
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source)
    if not 0 < int(length) <= MAX_TEXT_BYTES:
        raise ProtocolError(f"rank {source} announces a text of {int(length)} bytes")
    data = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(data, source)
    return data.numpy().tobytes().decode()
