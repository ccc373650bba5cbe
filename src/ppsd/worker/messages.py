"""The whole protocol: every message that travels between ranks, and how it is laid out.

A frame is a 64-byte little-endian header followed by a body. No pickle: bodies are token ids,
rows of numbers whose dtype and shape the header states, or JSON. docs/protocol.md walks through
it. Used by worker/ and engine/.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import torch

from ppsd.errors import ProtocolError
from ppsd.types import SamplingParams

MAGIC = 0x50505344  # "PPSD"
VERSION = 2
# magic, version, kind, dtype, flags, slot, source, epoch,
# position, parent, rows, judge, width, bytes of body
HEADER = struct.Struct("<IBBBBHHQiiiiIQ16x")
HEADER_BYTES = HEADER.size
TOKEN_BYTES = 8  # ids travel as int64: no conversion on either side
CONTROL_BYTES = 1 << 16  # room for a control or status body; larger status texts are cut

# what reading a body that is JSON of another shape, or no JSON, can raise
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Block:
    """Rows of one request on their way from a stage to the next (k → k+1).

    ``tokens`` [n] int64 and ``hidden`` [n, C] stand at ``position``… and follow the token at
    ``parent`` (position - 1 in a chain); the last stage answers the last ``judge`` rows.
    """

    slot: int
    epoch: int
    position: int
    parent: int
    judge: int
    tokens: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """The target's tokens [judge] for a block.

    When they are wanted, with the logits [judge, V] they were drawn from, and the rows
    [judge, C] that the last layer made.
    """

    slot: int
    epoch: int
    source: int
    position: int
    rows: int
    tokens: torch.Tensor
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class Begin:
    """A request starts in ``slot`` (forwarded to the last stage, which samples).

    ``vocab_size`` counts the real tokens (logits may be padded); ``want_logits`` and
    ``want_hidden`` ask for the target's logits and the last layer's rows with every verdict.
    """

    slot: int
    params: SamplingParams
    prompt_length: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    want_logits: bool = False
    want_hidden: bool = False


@dataclass(frozen=True)
class Control:
    """``report`` (every stage answers with a Status of that kind) or ``stop``; forwarded."""

    verb: str


@dataclass(frozen=True)
class Status:
    """A stage speaks of itself: ``progress``, ``ready``, ``report`` or ``failed``."""

    source: int
    kind: str
    fields: dict[str, Any]


Message = Block | Verdict | Begin | Control | Status
_KINDS: dict[type, int] = {Block: 1, Verdict: 2, Begin: 3, Control: 4, Status: 5}


def frame_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """Size of the largest frame with ``rows`` rows of ``width`` numbers, or of a control frame."""
    body = rows * (TOKEN_BYTES + width * dtype.itemsize)
    return HEADER_BYTES + max(body, CONTROL_BYTES)


def encode(message: Message) -> list[torch.Tensor]:
    """Lay a message out as uint8 tensors: header, token ids or JSON, then rows of numbers.

    Rows stay on their device; what becomes of them is the transport's choice.
    """
    if isinstance(message, Block):
        return _encode_block(message)
    if isinstance(message, Verdict):
        return _encode_verdict(message)
    if isinstance(message, Begin):
        record = {
            "params": message.params.to_json(),
            "prompt_length": message.prompt_length,
            "stop_ids": message.stop_ids,
            "vocab_size": message.vocab_size,
            "want_logits": message.want_logits,
            "want_hidden": message.want_hidden,
        }
        return _encode_json(Begin, record, slot=message.slot)
    if isinstance(message, Control):
        return _encode_json(Control, {"verb": message.verb})
    return _encode_json(
        Status, {"kind": message.kind, "fields": message.fields}, source=message.source
    )


def decode(frame: torch.Tensor, rows: torch.Tensor | None = None) -> Message:
    """Read a message from a frame (uint8 [n]) and the rows that travelled apart from it, if any.

    The result does not share the frame's memory. Raises ProtocolError for anything that is not a
    message of this protocol version.
    """
    if frame.numel() < HEADER_BYTES:
        raise ProtocolError(f"frame of {frame.numel()} bytes is shorter than a header")
    header = HEADER.unpack(frame[:HEADER_BYTES].numpy().tobytes())
    magic, version, kind, *_, body_bytes = header
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"frame has magic {magic:#x} version {version}, not ours")
    body = frame[HEADER_BYTES:]
    present = body.numel() + (0 if rows is None else rows.numel())
    if body_bytes != present:
        raise ProtocolError(f"frame announces {body_bytes} bytes of body and has {present}")
    if kind == _KINDS[Block]:
        return _decode_block(header, body, rows)
    if kind == _KINDS[Verdict]:
        return _decode_verdict(header, body, rows)
    return _decode_json(header, body)


def _header(
    kind: type,
    parts: list[torch.Tensor],
    *,
    dtype: int = 0,
    flags: int = 0,
    slot: int = 0,
    source: int = 0,
    epoch: int = 0,
    position: int = 0,
    parent: int = 0,
    rows: int = 0,
    judge: int = 0,
    width: int = 0,
) -> list[torch.Tensor]:
    body = sum(part.numel() for part in parts)
    packed = HEADER.pack(
        MAGIC, VERSION, _KINDS[kind], dtype, flags, slot, source, epoch, position, parent, rows,
        judge, width, body,
    )  # fmt: skip
    return [torch.frombuffer(bytearray(packed), dtype=torch.uint8), *parts]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _encode_block(block: Block) -> list[torch.Tensor]:
    return _header(
        Block,
        [_bytes(block.tokens), _bytes(block.hidden)],
        dtype=DTYPES.index(block.hidden.dtype),
        slot=block.slot,
        epoch=block.epoch,
        position=block.position,
        parent=block.parent,
        rows=block.hidden.shape[0],
        judge=block.judge,
        width=block.hidden.shape[1],
    )


def _encode_verdict(verdict: Verdict) -> list[torch.Tensor]:
    parts = [_bytes(verdict.tokens)]
    dtype = width = 0
    both = [rows for rows in (verdict.hidden, verdict.logits) if rows is not None]
    if both:  # side by side in one matrix; ``parent`` tells them apart
        rows = torch.cat(both, 1) if len(both) > 1 else both[0]
        parts.append(_bytes(rows))
        dtype, width = DTYPES.index(rows.dtype), rows.shape[1]
    return _header(
        Verdict,
        parts,
        dtype=dtype,
        parent=0 if verdict.hidden is None else verdict.hidden.shape[1],
        slot=verdict.slot,
        source=verdict.source,
        epoch=verdict.epoch,
        position=verdict.position,
        rows=verdict.rows,
        judge=verdict.tokens.numel(),
        width=width,
    )


def _encode_json(kind: type, record: dict[str, Any], **header: int) -> list[torch.Tensor]:
    text = json.dumps(record, separators=(",", ":")).encode()
    return _header(kind, [torch.frombuffer(bytearray(text), dtype=torch.uint8)], **header)


def _split_rows(
    body: torch.Tensor, apart: torch.Tensor | None, tokens: int, shape: tuple[int, int], dtype: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [tokens] and numbers of ``shape`` from a body that must hold just these."""
    if not 0 <= dtype < len(DTYPES) or tokens < 0 or min(shape) < 0:
        raise ProtocolError(f"frame states dtype {dtype}, {tokens} tokens, rows of shape {shape}")
    kind = DTYPES[dtype]
    cut = tokens * TOKEN_BYTES
    numbers = body[cut:].clone() if apart is None else apart
    if numbers.numel() != shape[0] * shape[1] * kind.itemsize or body.numel() < cut:
        raise ProtocolError(f"{numbers.numel()} bytes are not rows of shape {shape} in {kind}")
    return body[:cut].clone().view(torch.int64), numbers.view(kind).view(shape)


def _decode_block(header: tuple[int, ...], body: torch.Tensor, apart: torch.Tensor | None) -> Block:
    _, _, _, dtype, _, slot, _, epoch, position, parent, rows, judge, width, _ = header
    if not 0 <= judge <= rows or rows < 1 or position < 0:
        raise ProtocolError(f"block of {rows} rows at {position} asks for {judge} verdicts")
    tokens, hidden = _split_rows(body, apart, rows, (rows, width), dtype)
    return Block(slot, epoch, position, parent, judge, tokens, hidden)


def _decode_verdict(
    header: tuple[int, ...], body: torch.Tensor, apart: torch.Tensor | None
) -> Verdict:
    _, _, _, dtype, _, slot, source, epoch, position, hidden, rows, judge, width, _ = header
    shape = (judge if width else 0, width)
    tokens, both = _split_rows(body, apart, judge, shape, dtype)
    if not 0 <= hidden <= width:
        raise ProtocolError(f"verdict states rows of {hidden} numbers among {width}")
    return Verdict(
        slot,
        epoch,
        source,
        position,
        rows,
        tokens,
        logits=both[:, hidden:] if hidden < width else None,
        hidden=both[:, :hidden] if hidden else None,
    )


def _decode_json(header: tuple[int, ...], body: torch.Tensor) -> Message:
    kind, slot, source = header[2], header[5], header[6]
    try:
        record = json.loads(body.numpy().tobytes())
        if kind == _KINDS[Begin]:
            return _begin(slot, record)
        if kind == _KINDS[Control]:
            return Control(_typed(record["verb"], str))
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
        want_hidden=bool(record["want_hidden"]),
    )


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
