"""What rank 0 asks of the stages for a rival, and what they answer, as bytes.

A frame is the magic, the length of a JSON object, the object, and the numbers of its tensors.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ppsd.errors import ProtocolError
from ppsd.speculation.lookup import Match
from ppsd.transport.base import Part
from ppsd.worker.frame import DTYPES

MAGIC = b"RIVL"
PREFIX = struct.Struct("<4scI")  # magic, kind, bytes of JSON
DIGITS = 6  # of a confidence


@dataclass(frozen=True)
class Job:
    """A pass of rows through the stages, and what is asked of it.

    ``setup``: use the ``exits`` with ``heads`` (directories by exit; without one, the model's own
    final norm and LM head). ``prompt``: take a chunk, and on the ``last`` one say the first token.
    ``draft``: run one row and say the token behind ``exit``. ``verify``: say the target's tokens
    for all rows; if there is an ``exit``, the rows before the newest have come as far already.

    ``tokens`` are those of the rows, the first of which stands at ``position``; ``rows`` [n, C]
    come from the stage before. ``skip`` are sub-layers that a draft leaves out (skips.py).
    ``shadows``: every exit says its token for so many of the newest rows, of whose histories
    ``matches`` are the repetitions. ``verified`` [1, C] is the last layer's newest verified row.
    """

    ask: str
    position: int = 0
    tokens: tuple[int, ...] = ()
    exit: int = 0
    last: bool = False
    skip: tuple[int, ...] = ()
    shadows: int = 0
    matches: tuple[Match | None, ...] = ()
    exits: tuple[int, ...] = ()
    heads: dict[int, str] = field(default_factory=dict)
    rows: torch.Tensor | None = None
    verified: torch.Tensor | None = None


@dataclass(frozen=True)
class Reply:
    """What a stage says to rank 0.

    ``tokens`` with their ``confidences`` are drafted or, without, the target's own. ``shadows``
    are tokens and confidences by exit. ``rows`` [n, C] are the last layer's: behind a prompt its
    mean row and its newest, behind a verification the newest verified.
    """

    rank: int
    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    shadows: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    rows: torch.Tensor | None = None


TENSORS = ("rows", "verified")
KINDS: dict[bytes, type[Job] | type[Reply]] = {b"J": Job, b"R": Reply}


def encode(message: Job | Reply) -> list[Part]:
    """Lay a message out as the parts of a frame."""
    record = {f.name: getattr(message, f.name) for f in fields(message)}
    tensors = {name: record.pop(name) for name in TENSORS if name in record}
    held = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    record["tensors"] = {n: [DTYPES.index(t.dtype), *t.shape] for n, t in held.items()}
    text = json.dumps(record, separators=(",", ":")).encode()
    kind = b"J" if isinstance(message, Job) else b"R"
    return [PREFIX.pack(MAGIC, kind, len(text)) + text, *held.values()]


def is_rivals(frame: memoryview) -> bool:
    """Return True if a frame is one of these."""
    return bytes(frame[: len(MAGIC)]) == MAGIC


def decode(frame: memoryview, apart: torch.Tensor | None = None) -> Job | Reply:
    """Read a frame; ``apart`` are the last tensor's numbers where they travelled by themselves."""
    _, kind, size = PREFIX.unpack_from(frame)
    start = PREFIX.size + size
    record: dict[str, Any] = json.loads(bytes(frame[PREFIX.size : start]))
    held: dict[str, Any] = {}
    for name, (dtype, *shape) in record.pop("tensors").items():
        numbers = torch.empty(shape, dtype=DTYPES[dtype])
        data = frame[start : start + numbers.nbytes]
        start += numbers.nbytes
        if len(data) < numbers.nbytes:
            if apart is None or apart.numel() != numbers.numel():
                raise ProtocolError(f"a frame lacks the numbers of {name} {shape}")
            held[name] = apart.view(shape)
        else:
            held[name] = torch.frombuffer(bytearray(data), dtype=numbers.dtype).view(shape)
    return _restored(KINDS[kind](**record, **held))


def _restored(message: Job | Reply) -> Job | Reply:
    """Return a message with the types that JSON does not know."""
    if isinstance(message, Reply):
        shadows = {int(e): [(t, c) for t, c in said] for e, said in message.shadows.items()}
        return replace(
            message,
            tokens=tuple(message.tokens),
            confidences=tuple(message.confidences),
            shadows=shadows,
        )
    return replace(
        message,
        tokens=tuple(message.tokens),
        skip=tuple(message.skip),
        matches=tuple(None if m is None else Match(*m) for m in message.matches),
        exits=tuple(message.exits),
        heads={int(e): path for e, path in message.heads.items()},
    )
