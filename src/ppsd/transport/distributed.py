"""Transport over torch.distributed (gloo) for stages on several hosts.

Frames are CPU bytes and travel over gloo. When every rank has a GPU of its own, the rows of a frame
travel apart, GPU to GPU over NCCL; the frame announces them, so a receive is only ever posted for
rows that are on their way.

What gloo (torch 2.13) is like, and what follows from it:

- Bytes move only once the receiver has asked for them, so every incoming link has a thread that
  always asks. Control messages have their own tag and thread, and so overtake waiting frames.
- A send is known to be done only by waiting for it, and when its connection breaks during the
  call that wait may never end. So every message is answered, and every outgoing link has a thread
  that waits for the answers: posting a receive on a broken connection does raise.
- A wait that times out closes every connection of the group. So waits for frames never time out,
  and ``close`` lets one wait time out on purpose: nothing else wakes the other threads, and a
  thread left inside gloo aborts the interpreter at exit.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

from ppsd.errors import PipelineError, PipelineTimeoutError, StageLostError
from ppsd.transport.base import Geometry, Part, frame_bytes, gather, part_bytes
from ppsd.transport.gloo_link import (
    FRAME_TAG,
    GOODBYE,
    HANG_UP_TAG,
    HEADER_BYTES,
    MAGIC,
    ROWS_TAG,
    Arrival,
    GlooLink,
    header,
)
from ppsd.transport.rendezvous import Group, Meeting, open_group

FRAME_ANSWER_TAG, CONTROL_TAG, CONTROL_ANSWER_TAG = range(5, 8)
ROWS_BACKEND = {"cuda": "nccl", "cpu": "gloo"}  # CPU rows travel apart in tests only
ROWS_PART = 1  # a frame's parts are what describes it, and then rows of numbers
NO_ROWS = torch.empty(0, dtype=torch.uint8)
FOREVER = timedelta(days=365)
HEARTBEAT_SECONDS = 1.0
FAREWELL = 2**63 - 1  # rank 0's last epoch of every slot: whatever is at work is void
GOODBYE_SECONDS = 1.0  # how long close() waits for sent frames and the farewell to arrive
LEAVING_SECONDS, JOIN_SECONDS = 5.0, 60.0  # waits for a thread's end; for other ranks


class DistributedEndpoint:
    """One rank's end of the links between ``geometry.size`` ranks that have met.

    Making one is collective, within ``join_timeout`` seconds, and calls ``check`` while it waits.
    Rank 0 and a worker take each other for lost after ``timeout`` seconds without a sign of life.
    ``apart`` is the device on which the rows of frames travel apart; None keeps them in the frames.
    """

    def __init__(
        self,
        geometry: Geometry,
        meeting: Meeting,
        timeout: float,
        apart: torch.device | None = None,
        *,
        join_timeout: float = JOIN_SECONDS,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank = meeting.rank
        self.size = geometry.size
        self.rows: torch.Tensor | None = None
        self._apart = apart
        self._timeout = timeout
        self._process, self._meeting = os.getpid(), meeting  # rank 0 keeps the store for all
        self._group = open_group("gloo", "frames", meeting, join_timeout, check)
        self._rows_group: Group | None = None
        if apart is not None:
            kind = ROWS_BACKEND[apart.type]
            self._rows_group = open_group(kind, "rows", meeting, join_timeout, check)
        self._outgoing = geometry.outgoing(rank)
        self._epochs = torch.zeros(geometry.slots, dtype=torch.int64)
        self._arrivals = torch.zeros(1, dtype=torch.int64)  # changes with every frame
        self.ended = self._leaving = self._closed = False
        self._left: set[int] = set()
        self._failure: PipelineError | None = None
        self._heard = threading.Event()
        self._arrived: SimpleQueue[Arrival | None] = SimpleQueue()
        self._lent: tuple[GlooLink, torch.Tensor] | None = None
        self._senders = {to: GlooLink(to, n, geometry.frames) for to, n in self._outgoing.items()}
        self._receivers = [
            GlooLink(k, n, geometry.frames) for k, n in geometry.incoming(rank).items()
        ]
        self._listeners = {to: threading.Event() for to in range(1, self.size)} if rank == 0 else {}
        self._answered = dict.fromkeys(self._listeners, time.monotonic())
        self._threads = self._start_threads()
        self._tellers = [
            self._start(self._tell, (to, news), to) for to, news in self._listeners.items()
        ]
        atexit.register(self.close)  # for a main thread that dies of an error

    def send(self, to: int, parts: Sequence[Part], timeout: float) -> None:
        """Copy the frame into a buffer and start sending it; see ``Endpoint.send``."""
        frame_bytes(self._outgoing, to, parts)
        inside = parts if self._apart is None else parts[:ROWS_PART]
        apart = parts[len(inside) :]
        flat = [part.view(-1).view(torch.uint8) for part in apart if isinstance(part, torch.Tensor)]
        rows = torch.cat(flat) if flat else NO_ROWS
        self._send(self._senders[to], sum(map(part_bytes, inside)), inside, rows, timeout)

    def receive(self, timeout: float) -> tuple[int, memoryview] | None:
        """Return the next frame in order of arrival; see ``Endpoint.receive``."""
        if self._lent is not None:
            self._lent[0].free.put(self._lent[1])
            self._lent = None
        try:
            arrived = self._arrived.get(timeout=timeout)
        except Empty:
            self._check_answers()
            return None
        if arrived is None:
            self._arrived.put(None)
            raise self._failed()
        link, buffer, self.rows = arrived
        self._lent = link, buffer
        return link.peer, link.payload(buffer)

    def words(self, slot: int) -> tuple[int, ...]:
        """Return the addresses to watch, which this rank's own threads write to."""
        if self.rank == 0:
            return (self._arrivals.data_ptr(),)
        return (self._epochs.data_ptr() + slot * self._epochs.itemsize,)

    def publish(self, slot: int, epoch: int) -> None:
        """Wake the threads that tell the workers."""
        self._epochs[slot] = epoch
        self._wake()

    def epoch(self, slot: int) -> int:
        """Return the slot's epoch last heard from rank 0."""
        return int(self._epochs[slot])

    def _wake(self) -> None:
        for news in self._listeners.values():
            news.set()

    def close(self) -> None:
        """Let sent frames and rank 0's farewell arrive, for a second at most; then cut connections.

        Workers raise StageLostError when rank 0 has gone, with its farewell or without; that a
        worker has gone is an error only to who sends to it.
        """
        if self._closed or os.getpid() != self._process:  # a forked child may say nothing
            return
        self._leaving = True
        self._wake()
        self._say_goodbye()
        self._closed = True
        atexit.unregister(self.close)
        self._heard.set()
        for link in self._senders.values():
            link.sending.put(None)
        for link in self._receivers:
            link.free.put(None)
        self._hang_up()
        for thread in [*self._threads, *self._tellers]:
            thread.join(LEAVING_SECONDS)
        if self._rows_group is not None:
            self._rows_group.abort()

    def _start_threads(self) -> list[threading.Thread]:
        jobs: list[tuple[Callable[..., None], tuple[object, ...], int]] = []
        jobs += [(self._complete_sends, (link,), link.peer) for link in self._senders.values()]
        jobs += [(self._receive_frames, (link,), link.peer) for link in self._receivers]
        if self.rank > 0:
            jobs += [(self._listen, (), 0), (self._watch, (), 0)]
        return [self._start(*job) for job in jobs]

    def _start(
        self, job: Callable[..., None], arguments: tuple[object, ...], peer: int
    ) -> threading.Thread:
        name = f"ppsd-{job.__name__}-{peer}"
        thread = threading.Thread(target=self._guard, args=(job, arguments, peer), name=name)
        thread.daemon = True  # the interpreter joins other threads before it runs atexit
        thread.start()
        return thread

    def _guard(self, job: Callable[..., None], arguments: tuple[object, ...], peer: int) -> None:
        """Run a thread's ``job``; gloo's errors are RuntimeErrors that mean ``peer`` is gone."""
        try:
            job(*arguments)
        except PipelineError as error:
            self._fail(error)
        except RuntimeError:
            if peer not in self._left or job == self._complete_sends:
                self._fail(_lost(peer))

    def _complete_sends(self, link: GlooLink) -> None:
        while (item := link.sending.get()) is not None:
            works, buffer, _ = item
            self._await_answer(link.peer, FRAME_ANSWER_TAG, works)
            link.free.put(buffer)

    def _receive_frames(self, link: GlooLink) -> None:
        # The sender never has more than ``frames`` unanswered, so older answers have arrived.
        answers: deque[dist.Work] = deque(maxlen=link.frames + 1)
        while (buffer := link.free.get()) is not None:
            self._receive_piece(link.first(buffer), link.peer, FRAME_TAG)
            goodbye = link.says_goodbye(buffer)
            if goodbye:
                self._left |= {link.peer} - {0}
            else:
                self._receive_rest(link, buffer)
            answers.append(self._start_send(torch.zeros(1), link.peer, FRAME_ANSWER_TAG))
            if goodbye:
                self._await_hang_up(link.peer)

    def _receive_rest(self, link: GlooLink, buffer: torch.Tensor) -> None:
        link.check(buffer)
        for rest, tag in link.pieces(buffer, link.length(buffer))[1:]:
            self._receive_piece(rest, link.peer, tag)
        rows: torch.Tensor | None = None
        if size := link.rows_bytes(buffer):
            rows = torch.empty(size, dtype=torch.uint8, device=self._apart)
            self._receive_piece(rows, link.peer, ROWS_TAG, group=self._rows_group)
        self._arrived.put((link, buffer, rows))
        self._arrivals += 1

    def _await_hang_up(self, peer: int) -> None:
        """Wait for the connection to end, which keeps the answer to the goodbye alive till then."""
        self._receive_piece(torch.empty(1), peer, HANG_UP_TAG)

    def _tell(self, worker: int, news: threading.Event) -> None:
        """Send the epochs to ``worker`` when one changes, and once a second as a sign of life.

        The last ones are a farewell: unlike a frame, it waits for no stage to be passed on.
        """
        while not self._leaving:
            self._tell_epochs(worker, self._epochs.clone())
            self._answered[worker] = time.monotonic()
            news.wait(HEARTBEAT_SECONDS)
            news.clear()
        self._tell_epochs(worker, torch.full_like(self._epochs, FAREWELL))

    def _tell_epochs(self, worker: int, epochs: torch.Tensor) -> None:
        work = self._start_send(epochs, worker, CONTROL_TAG)
        self._await_answer(worker, CONTROL_ANSWER_TAG, [work])

    def _check_answers(self) -> None:
        """Raise if a worker has left the epoch unanswered for too long: it is stopped, or hangs."""
        now = time.monotonic()
        for worker, last in self._answered.items():
            if now - last > self._timeout and worker not in self._left:
                raise StageLostError(f"rank {worker} gave no sign of life for {self._timeout:g} s")

    def _listen(self) -> None:
        words = torch.empty_like(self._epochs)
        answers: deque[dist.Work] = deque(maxlen=2)  # rank 0 waits for each
        while True:
            self._receive_piece(words, 0, CONTROL_TAG)
            self.ended = bool(words[0] == FAREWELL)
            self._epochs.copy_(words)
            self._heard.set()
            answers.append(self._start_send(torch.zeros(1), 0, CONTROL_ANSWER_TAG))

    def _watch(self) -> None:
        """Take rank 0 for lost when nothing is heard of it; a broken connection is seen sooner."""
        while self._heard.wait(self._timeout):
            self._heard.clear()
            if self._closed:
                return
        raise StageLostError(f"rank 0 gave no sign of life for {self._timeout} s")

    def _await_answer(self, peer: int, tag: int, works: list[dist.Work]) -> None:
        self._receive_piece(torch.empty(1), peer, tag)
        for work in works:
            work.wait(FOREVER)

    def _start_send(
        self, piece: torch.Tensor, to: int, tag: int, group: Group | None = None
    ) -> dist.Work:
        return (group or self._group).send([piece], to, tag)

    def _receive_piece(
        self,
        piece: torch.Tensor,
        peer: int,
        tag: int,
        wait: timedelta = FOREVER,
        group: Group | None = None,
    ) -> None:
        (group or self._group).recv([piece], peer, tag).wait(wait)

    def _send(
        self,
        link: GlooLink,
        length: int,
        parts: Sequence[Part],
        rows: torch.Tensor,
        timeout: float,
    ) -> None:
        buffer = self._free_buffer(link, timeout)
        header(buffer).copy_(torch.tensor([MAGIC, length, rows.numel(), 0]))
        gather(parts, buffer.data_ptr() + HEADER_BYTES)
        pieces = link.pieces(buffer, length)
        try:
            works = [self._start_send(piece, link.peer, tag) for piece, tag in pieces]
            if rows.numel():
                works.append(self._start_send(rows, link.peer, ROWS_TAG, self._rows_group))
        except RuntimeError as error:
            self._fail(_lost(link.peer))
            raise self._failed() from error
        link.sending.put((works, buffer, rows))

    def _free_buffer(self, link: GlooLink, timeout: float) -> torch.Tensor:
        if self._failure is not None:
            raise self._failed()
        try:
            buffer = link.free.get(timeout=max(0.0, timeout))
        except Empty:
            raise PipelineTimeoutError(
                f"the link from rank {self.rank} to rank {link.peer} stayed full for {timeout} s"
            ) from None
        if buffer is None:
            raise self._failed()
        return buffer

    def _fail(self, error: PipelineError) -> None:
        """Remember the first error and wake whoever waits."""
        self._failure = self._failure or error
        self._arrived.put(None)
        for link in self._senders.values():
            link.free.put(None)

    def _failed(self) -> PipelineError:
        assert self._failure is not None
        return type(self._failure)(str(self._failure))

    def _say_goodbye(self) -> None:
        """Tell the receivers of this rank's frames that it leaves; wait until they know.

        Rank 0 tells every worker at the same time (``_tell``). Cutting a connection before that
        could destroy frames unread in the peer's socket.
        """
        deadline = time.monotonic() + GOODBYE_SECONDS
        for link in self._senders.values():
            with suppress(PipelineError):  # a peer that is gone needs no goodbye
                self._send(link, GOODBYE, [], NO_ROWS, deadline - time.monotonic())
        for link in self._senders.values():
            with suppress(PipelineError):  # nor can it confirm one
                for _ in range(link.frames):
                    self._free_buffer(link, deadline - time.monotonic())
        for teller in self._tellers:
            teller.join(max(0.0, deadline - time.monotonic()))

    def _hang_up(self) -> None:
        """Let a wait time out on some peer that is still there, which cuts all connections."""
        for peer in set(range(self.size)) - {self.rank}:
            with suppress(RuntimeError):  # the timeout, which is the purpose
                self._receive_piece(torch.empty(1), peer, HANG_UP_TAG, timedelta(milliseconds=1))


def _lost(peer: int) -> StageLostError:
    return StageLostError(f"rank {peer} is gone: it closed the connection")
