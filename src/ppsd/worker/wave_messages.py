"""Messages of candidate trees: waves, their verdicts, and what heads on the way think.

Part of the protocol (messages.py); their fields travel as integers, before rows of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch

from ppsd.errors import ProtocolError
from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.masks import Mask
from ppsd.speculation.tree import MAX_DEPTH
from ppsd.speculation.waves import Part, Row
from ppsd.transport.base import Part as Bytes
from ppsd.worker.frame import (
    TOKEN_BYTES,
    Landing,
    decode_fields,
    encode_fields,
    side_by_side,
    split_masks,
    split_sides,
)


class Wave(NamedTuple):
    """Rows of candidate trees on their way from a stage to the next, parents before children.

    ``hidden`` [n, C] are the ``rows``; every slot among them has a part. A wave whose rows have all
    died travels without any if its parts have moves to tell. ``masks``: as in Block, for every row
    or none.
    """

    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    hidden: torch.Tensor
    masks: tuple[Mask, ...] = ()


class Verdicts(NamedTuple):
    """The target's ``tokens`` [n] after the rows of nodes (slot, node) that a wave verified.

    ``logits`` [n, V] and ``feedback`` [n, C]: as in Verdict.
    """

    source: int
    nodes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    logits: torch.Tensor | None = None
    feedback: torch.Tensor | None = None


class Opinion(NamedTuple):
    """What a head behind stage ``source`` says of the children of nodes (slot, node).

    ``tokens`` [n, k] by falling probability; ``numbers`` float32 [n, k + LENGTHS]: their
    probabilities, and the log weights of a copy (lookup.ODDS).
    """

    source: int
    nodes: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, ...], ...]
    numbers: torch.Tensor


KINDS: dict[type, int] = {Wave: 7, Verdicts: 8, Opinion: 9}


def wave_bytes(rows: int, slots: int) -> int:
    """Return the most bytes of a wave's fields."""
    return TOKEN_BYTES * (1 + slots * (4 + 2 * MAX_DEPTH) + rows * (7 + 2 * MAX_DEPTH))


def encode_wave_message(message: Wave | Verdicts | Opinion) -> list[Bytes]:
    """Lay a message out as integers and rows of numbers."""
    kind = KINDS[type(message)]
    if isinstance(message, Wave):
        masks = message.masks
        width = len(masks[0]) if masks else 0
        fields = _wave_fields(message)
        return encode_fields(kind, fields, message.hidden, beside=width, before=b"".join(masks))
    pairs = chain.from_iterable(message.nodes)
    if isinstance(message, Opinion):
        fields = [len(message.tokens[0]), *pairs, *chain.from_iterable(message.tokens)]
        return encode_fields(kind, fields, message.numbers, source=message.source)
    numbers, beside = side_by_side(message.feedback, message.logits)
    fields = [*pairs, *message.tokens]
    return encode_fields(kind, fields, numbers, source=message.source, beside=beside)


def _wave_fields(wave: Wave) -> list[int]:
    fields = [len(wave.parts)]
    for slot, root, length, moves in wave.parts:
        fields += [slot, root, length, len(moves), *chain.from_iterable(moves)]
    for *alone, nodes, cells in wave.rows:
        fields += [*alone, len(nodes), *nodes, *cells]
    return fields


def decode_wave(
    header: tuple[int, ...],
    body: memoryview,
    apart: torch.Tensor | None,
    landing: Landing | None,
) -> Wave:
    """Read a wave; raises ProtocolError."""
    masks, body = split_masks(body, header[10], header[13])
    fields, hidden = decode_fields(header, body, apart, landing)
    rows, width, taken = header[10], header[12], iter(fields)
    try:
        parts = tuple([_part(taken) for _ in range(next(taken))])
        read = tuple([_row(taken) for _ in range(rows)])
    except (StopIteration, RuntimeError) as error:
        raise ProtocolError("wave ends within its fields") from error
    if next(taken, None) is not None or {row.slot for row in read} - {p.slot for p in parts}:
        raise ProtocolError(f"wave of {rows} rows and {len(parts)} parts has other fields")
    return Wave(parts, read, torch.empty(0, width) if hidden is None else hidden, masks)


def _part(fields: Iterator[int]) -> Part:
    slot, root, length, moves = _some(fields, 4)
    ends = _some(fields, 2 * moves)
    return Part(slot, root, length, tuple(zip(ends[::2], ends[1::2], strict=True)))


def _row(fields: Iterator[int]) -> Row:
    slot, node, parent, position, token, cell, depth = _some(fields, 7)
    return Row(
        slot, node, parent, position, token, cell, _some(fields, depth), _some(fields, depth)
    )


def _some(fields: Iterator[int], count: int) -> tuple[int, ...]:
    if count < 0:
        raise ProtocolError(f"wave has a list of {count} fields")
    return tuple([next(fields) for _ in range(count)])


def decode_verdicts(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None
) -> Verdicts:
    """Read verdicts; raises ProtocolError."""
    fields, numbers = decode_fields(header, body, apart)
    source, beside = header[6], header[13]
    count, rest = divmod(len(fields), 3)
    if rest or (numbers is not None and (len(numbers) != count or beside > numbers.shape[1])):
        raise ProtocolError(f"verdicts have {len(fields)} fields, not three a node")
    nodes, tokens = fields[: 2 * count], fields[2 * count :]
    pairs = tuple(zip(nodes[::2], nodes[1::2], strict=True))
    feedback, logits = split_sides(numbers, beside)
    return Verdicts(source, pairs, tokens, logits, feedback)


def decode_opinion(
    header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None
) -> Opinion:
    """Read an opinion; raises ProtocolError."""
    fields, numbers = decode_fields(header, body, apart)
    rows, width = header[10], fields[0] if fields else -1
    if numbers is None or numbers.shape != (rows, width + len(LENGTHS)):
        raise ProtocolError(f"opinion on {rows} nodes has other numbers than it states")
    if len(fields) != 1 + rows * (2 + width):
        raise ProtocolError(f"opinion on {rows} nodes has {len(fields)} fields")
    nodes, tokens = fields[1 : 1 + 2 * rows], fields[1 + 2 * rows :]
    return Opinion(
        header[6],
        tuple(zip(nodes[::2], nodes[1::2], strict=True)),
        tuple(tokens[i * width : (i + 1) * width] for i in range(rows)),
        numbers,
    )
