"""How ranks on several hosts find each other and open groups of their own for messages.

Comes before a DistributedEndpoint is made. Every rank announces itself in a store kept by rank 0;
rank 0 alone decides who is missing, and tells the others. torch.distributed's default group is left
alone: a process may have one, for something else, and may be a rank of several pipelines.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its stubs
from torch.distributed.distributed_c10d import PrefixStore, Store

from ppsd import checks
from ppsd.errors import (
    ConfigError,
    PipelineError,
    PipelineTimeoutError,
    StageLostError,
)

POLL_SECONDS = 0.02
MAX_RANKS = 1 << 16
INTERFACES = "GLOO_SOCKET_IFNAME"
LOOPBACK = "127.0.0.1"


class Group(Protocol):
    """What is used of torch.distributed's process groups."""

    def send(self, tensors: list[torch.Tensor], to: int, tag: int, /) -> dist.Work:
        """Start sending to a rank."""

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int, /) -> dist.Work:
        """Start receiving from a rank."""

    def abort(self) -> None:
        """End whatever is under way."""


@dataclass(frozen=True)
class Meeting:
    """A rank among ``size`` that have met, and the store they share; ``local``: on one host."""

    rank: int
    size: int
    store: Store
    local: bool


_native: weakref.WeakSet[object] = weakref.WeakSet()  # they have threads of their own


def _leak_in_child() -> None:
    """Keep what a fork has copied from ever being destroyed: that waits for threads not copied."""
    for thing in _native:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_in_child)


def meet(
    rank: int,
    size: int,
    host: str,
    port: int,
    timeout: float,
    check: Callable[[], None] = lambda: None,
    listener: socket.socket | None = None,
) -> Meeting:
    """Return when all ``size`` ranks have come to rank 0's ``host:port``.

    Calls ``check`` while it waits; it raises when a rank is known not to come any more, or nobody
    wants it. ``listener`` is rank 0's socket, if it listens there already. Raises ConfigError for a
    network interface that is not here, PipelineError when the address is in use or the ranks
    disagree on who they are, and PipelineTimeoutError naming the ranks that did not join within
    ``timeout`` seconds.
    """
    _check_interfaces()
    try:
        if rank:
            _reach(host, port, timeout, check)
        store = _open_store(rank, host, port, timeout, listener)
        _meet(store, rank, size, timeout, check)
    except dist.DistError as error:
        raise StageLostError(f"rank 0 at {host}:{port} went away during start-up") from error
    return Meeting(rank, size, store, _is_loopback(host))


def rank_from_environment() -> tuple[int, int]:
    """Return (rank, size) as torchrun sets them; raises ConfigError naming the variable."""
    size = _variable("WORLD_SIZE", 1, MAX_RANKS)
    return _variable("RANK", 0, size - 1), size


def meet_from_environment(timeout: float, check: Callable[[], None] = lambda: None) -> Meeting:
    """Meet the ranks that torchrun started; ``check`` and errors are those of ``meet``.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    rank, size = rank_from_environment()
    port = _variable("MASTER_PORT", 1, 65535)
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError("MASTER_ADDR", host, "rank 0's host name, as torchrun sets it")
    return meet(rank, size, host, port, timeout, check)


def open_group(
    kind: str,
    name: str,
    meeting: Meeting,
    timeout: float,
    check: Callable[[], None] = lambda: None,
) -> Group:
    """Return a group of ``kind`` gloo or nccl of all ranks; every rank has to call this.

    ``check`` is as in ``meet``. PipelineTimeoutError when some did not within ``timeout`` seconds.
    """
    made: SimpleQueue[Group | Exception] = SimpleQueue()

    def make() -> None:
        try:
            made.put(_make_group(kind, name, meeting, timeout))
        except Exception as error:  # it is raised again, where the group is awaited
            made.put(error)

    # Apart, as gloo and nccl wait for a rank that has died, too, and heed nothing meanwhile.
    threading.Thread(target=make, name=f"ppsd-open-{name}", daemon=True).start()
    while True:
        try:
            group = made.get(timeout=POLL_SECONDS)
        except Empty:
            check()
            continue
        if isinstance(group, Exception):
            raise group
        return group


def _make_group(kind: str, name: str, meeting: Meeting, timeout: float) -> Group:
    rank, limit = meeting.rank, timedelta(seconds=timeout)
    store = PrefixStore(name, meeting.store)
    make: Any = {"gloo": "ProcessGroupGloo", "nccl": "ProcessGroupNCCL"}[kind]
    make = getattr(dist, make)  # not all of it is in torch's stubs
    how: Any = limit
    try:
        if kind == "nccl" or meeting.local:
            how = make.Options() if kind == "nccl" else make._Options()
            how._timeout = limit
        if kind == "gloo" and meeting.local:  # or it listens where this host's name leads
            how._devices = [make.create_device(hostname=LOOPBACK)]
        group: Group = make(store, rank, meeting.size, how)
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise PipelineTimeoutError(
            f"rank {rank} could not connect to all others within {timeout:g} s ({cause})"
        ) from error
    _native.add(group)
    return group


def send_text(meeting: Meeting, to: int, text: str) -> None:
    """Leave a text for a rank, one at most."""
    meeting.store.set(f"text {meeting.rank} {to}", text)


def receive_text(
    meeting: Meeting, source: int, timeout: float, check: Callable[[], None] = lambda: None
) -> str:
    """Return the text that a rank left for this one; ``check`` is as in ``meet``.

    Raises StageLostError when rank 0 is gone, PipelineTimeoutError when none came.
    """
    try:
        return _get(meeting.store, f"text {source} {meeting.rank}", timeout, check)
    except dist.DistNetworkError as error:
        raise StageLostError("rank 0 went away during start-up") from error
    except dist.DistError as error:
        raise PipelineTimeoutError(f"rank {source} said nothing within {timeout:g} s") from error


def _variable(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    value = int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else text
    return checks.integer(name, value, low, high, f"in [{low}, {high}], as torchrun sets it")


def _check_interfaces() -> None:
    here = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get(INTERFACES, "").split(",")):
        if name not in here:
            raise ConfigError(INTERFACES, name, f"among this host's {', '.join(here)}")


def _reach(host: str, port: int, timeout: float, check: Callable[[], None]) -> None:
    """Return once rank 0 listens: the store's own attempts to reach it heed no signal."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            check()
            time.sleep(POLL_SECONDS)
    raise PipelineTimeoutError(f"rank 0 did not answer at {host}:{port} within {timeout} s")


def _open_store(
    rank: int, host: str, port: int, timeout: float, listener: socket.socket | None
) -> Store:
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not agent_keeps_store
    if listens and listener is None and _is_loopback(host):
        listener = listen(host, port)
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
        cause = str(error).partition("\n")[0]
        raise PipelineError(f"cannot listen at {host}:{port}: {cause}") from error
    # torchrun keeps one store over restarts; names of a former attempt must not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"ppsd/{attempt}", store)
    _native.add(shared)
    return shared


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str = LOOPBACK, port: int = 0) -> socket.socket:
    """Return a socket of this host alone; TCPStore's own would listen on all its interfaces.

    Port 0 stands for any free one. PipelineError when the address is in use.
    """
    try:
        return socket.create_server((host, port), backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PipelineError(f"address already in use: {host}:{port}") from error
        raise PipelineError(f"cannot listen at {host}:{port}: {error.strerror}") from error


def _meet(store: Store, rank: int, size: int, timeout: float, check: Callable[[], None]) -> None:
    """Return when all ranks are known to be here; raise the same error on all when they are not."""
    if rank == 0:
        store.set("size", str(size))
    elif (expected := int(_get(store, "size", 2 * timeout, check))) != size:
        raise PipelineError(
            f"rank {rank} was started as one of {size}, rank 0 as one of {expected}"
        )
    if store.add(f"rank {rank}", 1) > 1:
        raise PipelineError(f"rank {rank} was started twice")
    if rank == 0:
        store.set("missing", _missing_ranks(store, size, timeout, check))
    # Rank 0 may have started later than this rank, and its own deadline with it.
    if missing := _get(store, "missing", 2 * timeout, check):
        raise PipelineTimeoutError(f"did not join within {timeout} s: rank {missing}")


def _missing_ranks(store: Store, size: int, timeout: float, check: Callable[[], None]) -> str:
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(size) if not store.check([f"rank {rank}"])]:
        if time.monotonic() > deadline:
            break
        check()
        time.sleep(POLL_SECONDS)
    return ", ".join(map(str, missing))


def _get(store: Store, key: str, timeout: float, check: Callable[[], None]) -> str:
    """Wait for a value, and hear of signals and ``check`` meanwhile, which ``get`` does not."""
    deadline = time.monotonic() + timeout
    while not (there := store.check([key])) and time.monotonic() < deadline:
        check()
        time.sleep(POLL_SECONDS)
    store.set_timeout(timedelta(seconds=timeout if there else POLL_SECONDS))
    value: bytes = store.get(key)
    return value.decode()
