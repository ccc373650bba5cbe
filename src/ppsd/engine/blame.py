"""From a stage that failed or is gone to the error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ppsd.errors import (
    InsufficientMemoryError,
    KernelError,
    ModelError,
    NonFiniteError,
    PipelineTimeoutError,
    ProtocolError,
    StageFailedError,
    StageLostError,
    UnsupportedModelError,
)
from ppsd.transport.base import Endpoint
from ppsd.worker.messages import Message, Status, decode

LAST_FRAMES = 32  # more than may wait, among them a dead worker's account of itself

NAMED_ERRORS = {  # a worker's sentence says it all; other exceptions come with their traceback
    kind.__name__: kind
    for kind in (
        InsufficientMemoryError,
        KernelError,
        ModelError,
        NonFiniteError,
        PipelineTimeoutError,
        ProtocolError,
        StageLostError,
        UnsupportedModelError,
    )
}


def raise_if_lost(endpoint: Endpoint, check: Callable[[], None]) -> None:
    """Raise when a worker process has ended: its own account of it, else what ``check`` says.

    Frames that wait at ``endpoint`` are lost then.
    """
    try:
        check()
    except StageLostError:
        for _ in range(LAST_FRAMES):
            with contextlib.suppress(StageLostError):  # which may be but a consequence
                if (received := endpoint.receive(0.0)) is not None:
                    raise_failure(decode(received[1], endpoint.rows))
        raise


def raise_failure(message: Message) -> None:
    """Raise here what a worker raised there; its pipeline errors name their stage themselves."""
    if not isinstance(message, Status) or message.kind != "failed":
        return
    fields, stage = message.fields, f"stage {message.source}"
    kind = NAMED_ERRORS.get(fields["error"])
    if kind is None:
        text = f"{stage} failed: {fields['error']}: {fields['message']}"
        raise StageFailedError(text, fields["traceback"])
    raise kind(fields["message"] if fields["pipeline"] else f"{stage}: {fields['message']}")
