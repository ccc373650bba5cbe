"""The whole protocol: every message that travels between ranks, and how it is laid out.

A frame is a 64-byte little-endian header followed by a body. No pickle: bodies are token ids,
rows of numbers whose dtype and shape the header states, or JSON. docs/protocol.md walks through
it. Used by worker/ and engine/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ppsd.errors import ProtocolError
from ppsd.speculation.masks import Mask
from ppsd.transport.base import Part
from ppsd.types import SamplingParams
from ppsd.worker.frame import (
    DTYPES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Landing,
    packed_ids,
    split_masks,
    split_rows,
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
    their ``masks`` if there are any.
    """

    slot: int
    epoch: int
    position: int
    parent: int
    judge: int
    tokens: tuple[int, ...]
    hidden: torch.Tensor
    masks: tuple[Mask, ...] = ()


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
    ``want_opinions`` for those of heads on the way. ``scores``: each of the prompt's tokens is
    scored, beside so many of the likeliest (UNSCORED: none is). Its first ``shared`` rows are those
    of the slot ``source``: every stage copies them, unless that is its own.
    """

    slot: int
    params: SamplingParams
    prompt_length: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    want_logits: bool = False
    want_feedback: bool = False
    want_opinions: bool = False
    scores: int = UNSCORED
    source: int = 0
    shared: int = 0


@dataclass(frozen=True)
class Control:
    """``report`` (every stage answers with a Status of that kind) or ``stop``; forwarded."""

    verb: str


class Refusal(NamedTuple):
    """A request cannot go on, for the reason in ``message``; stage ``source`` takes others."""

    slot: int
    epoch: int
    source: int
    message: str


@dataclass(frozen=True)
class Status:
    """A stage speaks of itself: ``progress``, ``ready``, ``report`` or ``failed``."""

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
    if isinstance(message, Begin):
        record = {
            "params": message.params.to_json(),
            "prompt_length": message.prompt_length,
            "stop_ids": message.stop_ids,
            "vocab_size": message.vocab_size,
            "want_logits": message.want_logits,
            "want_feedback": message.want_feedback,
            "want_opinions": message.want_opinions,
            "scores": message.scores,
            "source": message.source,
            "shared": message.shared,
        }
        return _encode_json(Begin, record, slot=message.slot)
    if isinstance(message, Control):
        return _encode_json(Control, {"verb": message.verb})
    if isinstance(message, Refusal):
        record = {"epoch": message.epoch, "message": message.message}
        return _encode_json(Refusal, record, slot=message.slot, source=message.source)
    return _encode_json(
        Status, {"kind": message.kind, "fields": message.fields}, source=message.source
    )


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
    ids, hidden = b"".join((*block.masks, packed_ids(block.tokens))), block.hidden.contiguous()
    beside = len(block.masks[0]) if block.masks else 0
    rows, width = hidden.shape
    header = HEADER.pack(
        MAGIC, VERSION, _KINDS[Block], DTYPES.index(hidden.dtype), 0, block.slot, 0, block.epoch,
        block.position, block.parent, rows, block.judge, width, beside, len(ids) + hidden.nbytes,
    )  # fmt: skip
    return [header + ids, hidden]


def _encode_verdict(verdict: Verdict) -> list[Part]:
    slot, epoch, source, position, rows, tokens, logits, feedback = verdict
    both = [part for part in (feedback, logits) if part is not None]
    ids, numbers, dtype, width, size = packed_ids(tokens), None, 0, 0, 0
    if both:  # side by side in one matrix
        numbers = torch.cat(both, 1) if len(both) > 1 else both[0].contiguous()
        dtype, width, size = DTYPES.index(numbers.dtype), numbers.shape[1], numbers.nbytes
    beside = 0 if feedback is None else feedback.shape[1]
    header = HEADER.pack(
        MAGIC, VERSION, _KINDS[Verdict], dtype, 0, slot, source, epoch,
        position, 0, rows, len(tokens), width, beside, len(ids) + size,
    )  # fmt: skip
    return [header + ids] if numbers is None else [header + ids, numbers]


def _encode_json(
    kind: type, record: dict[str, Any], *, slot: int = 0, source: int = 0
) -> list[Part]:
    body = json.dumps(record, separators=(",", ":")).encode()
    header = HEADER.pack(
        MAGIC, VERSION, _KINDS[kind], 0, 0, slot, source, 0, 0, 0, 0, 0, 0, 0, len(body)
    )
    return [header + body]


def _decode_block(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None, landing: Landing | None
) -> Block:
    _, _, _, dtype, _, slot, _, epoch, position, parent, rows, judge, width, beside, _ = header
    if not 0 <= judge <= rows or rows < 1 or position < 0:
        raise ProtocolError(f"block of {rows} rows at {position} asks for {judge} verdicts")
    masks, body = split_masks(body, judge, beside)
    tokens, hidden = split_rows(body, apart, landing, rows, (rows, width), dtype)
    if hidden is None:
        raise ProtocolError(f"block of {rows} rows has none")
    return Block(slot, epoch, position, parent, judge, tokens, hidden, masks)


def _decode_verdict(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None
) -> Verdict:
    _, _, _, dtype, _, slot, source, epoch, position, _, rows, judge, width, beside, _ = header
    shape = (judge if width else 0, width)
    tokens, both = split_rows(body, apart, None, judge, shape, dtype)
    if not 0 <= beside <= width:
        raise ProtocolError(f"verdict states feedback of {beside} numbers among {width}")
    if both is None:
        return Verdict(slot, epoch, source, position, rows, tokens)
    return Verdict(
        slot,
        epoch,
        source,
        position,
        rows,
        tokens,
        logits=both[:, beside:] if beside < width else None,
        feedback=both[:, :beside] if beside else None,
    )


def _decode_json(header: tuple[int, ...], body: memoryview) -> Message:
    kind, slot, source = header[2], header[5], header[6]
    try:
        record = json.loads(bytes(body))
        if kind == _KINDS[Begin]:
            return _begin(slot, record)
        if kind == _KINDS[Control]:
            return Control(_typed(record["verb"], str))
        if kind == _KINDS[Refusal]:
            epoch, text = _typed(record["epoch"], int), _typed(record["message"], str)
            return Refusal(slot, epoch, source, text)
        if kind == _KINDS[Status]:
            return Status(source, _typed(record["kind"], str), _typed(record["fields"], dict))
    except MALFORMED as error:
        raise ProtocolError(f"control frame cannot be read: {error}") from error
    raise ProtocolError(f"frame is of unknown kind {kind}")


def _begin(slot: int, record: dict[str, Any]) -> Begin:
    return Begin(
        slot=slot,
        params=SamplingParams.from_json(record["params"]),
        prompt_length=int(record["prompt_length"]),
        stop_ids=tuple(int(token) for token in record["stop_ids"]),
        vocab_size=int(record["vocab_size"]),
        want_logits=bool(record["want_logits"]),
        want_feedback=bool(record["want_feedback"]),
        want_opinions=bool(record["want_opinions"]),
        scores=int(record["scores"]),
        source=int(record["source"]),
        shared=int(record["shared"]),
    )


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
