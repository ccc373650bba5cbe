"""What a stage behind the first hears and says: messages over a transport."""

from __future__ import annotations

from typing import Protocol

from ppsd.model.passes import Watch
from ppsd.transport.base import Endpoint
from ppsd.worker.frame import Landing
from ppsd.worker.messages import Message, decode, encode


class Link(Protocol):
    """One stage's end of the links; the simulator has a virtual one."""

    def receive(self, timeout: float) -> Message | None:
        """Return the next message, or None when none came within ``timeout`` seconds."""

    def send(self, to: int, message: Message) -> None:
        """Send to rank ``to``; raises PipelineError when it cannot be reached."""

    def epoch(self, slot: int) -> int:
        """Return the slot's newest epoch that is known here."""

    def watch(self, *slots: int) -> Watch:
        """Return the words that change with the slots' epochs, for a pass to look at."""


class TransportLink:
    """Messages as frames over ``endpoint``; no send takes longer than ``timeout`` seconds."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._landing = Landing()
        self._watches: dict[int, Watch] = {}

    def receive(self, timeout: float) -> Message | None:
        received = self._endpoint.receive(timeout)
        if received is None:
            return None
        return decode(received[1], self._endpoint.rows, self._landing)

    def send(self, to: int, message: Message) -> None:
        self._endpoint.send(to, encode(message), self._timeout)

    def epoch(self, slot: int) -> int:
        return self._endpoint.epoch(slot)

    def watch(self, *slots: int) -> Watch:
        if len(slots) > 1:
            return Watch([word for slot in slots for word in self._endpoint.words(slot)])
        (slot,) = slots
        if slot not in self._watches:
            self._watches[slot] = Watch(self._endpoint.words(slot))
        return self._watches[slot]
