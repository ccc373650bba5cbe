"""The protocol: messages that travel between ranks, and how they are laid out.

Those of candidate trees are in wave_messages.py, log-probabilities of a prompt in scores.py.

A frame is a 64-byte little-endian header followed by a body. No pickle: bodies are token ids, rows
of numbers whose dtype and shape the header states, or JSON. docs/protocol.md walks through it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, get_origin, get_type_hints

import torch

from ppsd.errors import ProtocolError
from ppsd.speculation.masks import Mask
from ppsd.transport.base import Part
from ppsd.types import SamplingParams
from ppsd.worker.frame import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Landing,
    encode_fields,
    side_by_side,
    split_masks,
    split_rows,
    split_sides,
)
from ppsd.worker.scores import KIND as SCORES
from ppsd.worker.scores import UNSCORED, Scores, decode_scores, encode_scores
from ppsd.worker.wave_messages import (
    KINDS,
    Opinion,
    Verdicts,
    Wave,
    decode_opinion,
    decode_verdicts,
    decode_wave,
    encode_wave_message,
)

# what reading a body that is JSON of another shape, or no JSON, can raise
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Block(NamedTuple):
    """Rows of one request on their way from a stage to the next (k → k+1).

    ``tokens`` [n] and ``hidden`` [n, C] stand at ``position``… and follow the token at
    ``parent`` (position - 1 in a chain); the last stage answers the last ``judge`` rows, within
    their ``masks`` if there are any. A block that ``joins`` runs in one pass with the wave that
    comes behind it.
    """

    slot: int
    epoch: int
    position: int
    parent: int
    judge: int
    tokens: tuple[int, ...]
    hidden: torch.Tensor
    masks: tuple[Mask, ...] = ()
    joins: bool = False


class Verdict(NamedTuple):
    """The target's tokens [judge] for a block.

    When they are wanted, with the logits [judge, V] they were drawn from, and ``feedback``
    [judge, C], the rows that the last layer made, on which later drafts may rest.
    """

    slot: int
    epoch: int
    source: int
    position: int
    rows: int
    tokens: tuple[int, ...]
    logits: torch.Tensor | None = None
    feedback: torch.Tensor | None = None


@dataclass(frozen=True)
class Begin:
    """A request starts in ``slot`` (forwarded to the last stage, which samples).

    ``vocab_size`` counts the real tokens (logits may be padded); ``want_logits`` and
    ``want_feedback`` ask for the target's logits and the last layer's rows with every verdict,
    ``want_opinions`` for those of heads on the way, which may say ``prompt_ids`` beside their
    draft vocabularies. ``scores``: each of the prompt's tokens is scored, beside so many of the
    likeliest (UNSCORED: none is). Its first ``shared`` rows are those of the slot ``source``: every
    stage copies them, unless that is its own.
    """

    slot: int
    params: SamplingParams
    prompt_length: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    prompt_ids: tuple[int, ...] = ()
    want_logits: bool = False
    want_feedback: bool = False
    want_opinions: bool = False
    scores: int = UNSCORED
    source: int = 0
    shared: int = 0


@dataclass(frozen=True)
class Control:
    """Ask every stage for a Status: ``report`` or ``busy``; or end them: ``stop``. Forwarded."""

    verb: str


class Refusal(NamedTuple):
    """A request cannot go on, for the reason in ``message``; stage ``source`` takes others."""

    slot: int
    epoch: int
    source: int
    message: str


@dataclass(frozen=True)
class Status:
    """Tell of a stage: ``progress``, ``ready``, ``report``, ``busy`` or ``failed``."""

    source: int
    kind: str
    fields: dict[str, Any]


Message = Block | Wave | Verdict | Verdicts | Opinion | Scores | Refusal | Begin | Control | Status
_KINDS: dict[type, int] = {
    Block: 1,
    Verdict: 2,
    Begin: 3,
    Control: 4,
    Status: 5,
    Refusal: 6,
    **KINDS,
    Scores: SCORES,
}
# Messages that are JSON: which fields travel in the header; the others make up the body.
_HEADED: dict[type, tuple[str, ...]] = {
    Begin: ("slot",),
    Control: (),
    Status: ("source",),
    Refusal: ("slot", "source"),
}
_BODIES: dict[type, dict[str, type]] = {
    kind: {n: get_origin(hint) or hint for n, hint in get_type_hints(kind).items() if n not in own}
    for kind, own in _HEADED.items()
}


def encode(message: Message) -> list[Part]:
    """Lay a message out: header with token ids or JSON, then rows of numbers.

    Rows stay on their device; what becomes of them is the transport's choice.
    """
    if isinstance(message, Block):
        return _encode_block(message)
    if isinstance(message, Verdict):
        return _encode_verdict(message)
    if isinstance(message, Wave | Verdicts | Opinion):
        return encode_wave_message(message)
    if isinstance(message, Scores):
        return encode_scores(message)
    return _encode_json(message)


def decode(
    frame: memoryview, rows: torch.Tensor | None = None, landing: Landing | None = None
) -> Message:
    """Read a message from a frame and the rows (uint8 [n]) that travelled apart from it, if any.

    The result does not share the frame's memory; a block's rows lie in ``landing`` until the next
    block's do, or are its own without one. Raises ProtocolError for anything that is not a
    message of this protocol version.
    """
    if len(frame) < HEADER_BYTES:
        raise ProtocolError(f"frame of {len(frame)} bytes is shorter than a header")
    header = HEADER.unpack_from(frame)
    magic, version, kind, *_, body_bytes = header
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"frame has magic {magic:#x} version {version}, not ours")
    body = frame[HEADER_BYTES:]
    present = len(body) + (0 if rows is None else rows.numel())
    if body_bytes != present:
        raise ProtocolError(f"frame announces {body_bytes} bytes of body and has {present}")
    if kind == _KINDS[Block]:
        return _decode_block(header, body, rows, landing)
    if kind == _KINDS[Verdict]:
        return _decode_verdict(header, body, rows)
    if kind == _KINDS[Wave]:
        return decode_wave(header, body, rows, landing)
    if kind == _KINDS[Verdicts]:
        return decode_verdicts(header, body, rows)
    if kind == _KINDS[Opinion]:
        return decode_opinion(header, body, rows)
    if kind == SCORES:
        return decode_scores(header, body, rows)
    return _decode_json(header, body)


def _encode_block(block: Block) -> list[Part]:
    return encode_fields(
        _KINDS[Block],
        block.tokens,
        block.hidden,
        slot=block.slot,
        epoch=block.epoch,
        position=block.position,
        parent=block.parent,
        judge=block.judge,
        beside=len(block.masks[0]) if block.masks else 0,
        before=b"".join(block.masks),
        flags=block.joins,
    )


def _encode_verdict(verdict: Verdict) -> list[Part]:
    slot, epoch, source, position, rows, tokens, logits, feedback = verdict
    numbers, beside = side_by_side(feedback, logits)
    return encode_fields(
        _KINDS[Verdict],
        tokens,
        numbers,
        slot=slot,
        source=source,
        epoch=epoch,
        position=position,
        rows=rows,
        beside=beside,
    )


def _encode_json(message: Begin | Control | Status | Refusal) -> list[Part]:
    kind = type(message)
    record = {name: getattr(message, name) for name in _BODIES[kind]}
    body = json.dumps(record, default=SamplingParams.to_json, separators=(",", ":")).encode()
    slot, source = (getattr(message, n) if n in _HEADED[kind] else 0 for n in ("slot", "source"))
    return encode_fields(_KINDS[kind], (), None, slot=slot, source=source, before=body)


def _decode_block(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None, landing: Landing | None
) -> Block:
    _, _, _, dtype, flags, slot, _, epoch, position, parent, rows, judge, width, beside, _ = header
    if not 0 <= judge <= rows or rows < 1 or position < 0:
        raise ProtocolError(f"block of {rows} rows at {position} asks for {judge} verdicts")
    masks, body = split_masks(body, judge, beside)
    tokens, hidden = split_rows(body, apart, landing, rows, (rows, width), dtype)
    if hidden is None:
        raise ProtocolError(f"block of {rows} rows has none")
    return Block(slot, epoch, position, parent, judge, tokens, hidden, masks, bool(flags))


def _decode_verdict(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None
) -> Verdict:
    _, _, _, dtype, _, slot, source, epoch, position, _, rows, judge, width, beside, _ = header
    shape = (judge if width else 0, width)
    tokens, both = split_rows(body, apart, None, judge, shape, dtype)
    if not 0 <= beside <= width:
        raise ProtocolError(f"verdict states feedback of {beside} numbers among {width}")
    feedback, logits = split_sides(both, beside)
    return Verdict(slot, epoch, source, position, rows, tokens, logits, feedback)


def _decode_json(header: tuple[int, ...], body: memoryview) -> Message:
    kind = next((each for each in _BODIES if _KINDS[each] == header[2]), None)
    if kind is None:
        raise ProtocolError(f"frame is of unknown kind {header[2]}")
    headed = {"slot": header[5], "source": header[6]}
    try:
        record = json.loads(bytes(body))
        if kind is Begin:
            record["params"] = SamplingParams.from_json(record["params"])
            for ids in ("stop_ids", "prompt_ids"):
                record[ids] = tuple(int(token) for token in record[ids])
        fields = {name: _typed(record[name], of) for name, of in _BODIES[kind].items()}
        message: Message = kind(**fields, **{name: headed[name] for name in _HEADED[kind]})
    except MALFORMED as error:
        raise ProtocolError(f"control frame cannot be read: {error}") from error
    return message


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
