"""The protocol: what is encoded comes back, and other bytes are refused with one error only."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ppsd.engine.sequence import Request, begin_message
from ppsd.errors import ProtocolError
from ppsd.model.draft_vocabulary import NEWEST
from ppsd.transport.base import gather, part_bytes
from ppsd.types import (
    MAX_LOGIT_BIAS,
    MAX_STOP_IDS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from ppsd.worker.frame import (
    CONTROL_BYTES,
    DTYPES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Landing,
    frame_bytes,
    packed_ids,
)
from ppsd.worker.messages import (
    Begin,
    Block,
    Control,
    Message,
    Status,
    Verdict,
    decode,
    encode,
)
from tests.support.any_messages import MESSAGES, all_messages


def frame(message: Message) -> bytearray:
    parts = encode(message)
    whole = bytearray(sum(map(part_bytes, parts)))
    gather(parts, ctypes.addressof(ctypes.c_char.from_buffer(whole)))
    return whole


def arrivals(message: Message) -> Iterator[Message]:
    """What is read of a message in one piece, and where its rows travel apart from it."""
    yield decode(memoryview(frame(message)))
    front, *rows = encode(message)
    for apart in rows:
        yield decode(memoryview(bytes(front)), apart.contiguous().view(torch.uint8).flatten())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", MESSAGES)
@given(st.data())
@settings(max_examples=60)
def test_round_trip_of_every_message(kind, data) -> None:
    arrives(data.draw(MESSAGES[kind]))


def test_round_trip_of_an_empty_verdict() -> None:
    arrives(Verdict(0, 1, 2, 3, 4, ()))


def arrives(message: Message) -> None:
    if isinstance(message, Verdict) and not message.tokens:
        assume(message.logits is None and message.feedback is None)  # nothing judged has no rows
    for back in arrivals(message):
        assert type(back) is type(message)
        for name in message.__match_args__:
            assert same(getattr(message, name), getattr(back, name)), name


def test_rows_of_one_block_after_another_land_in_one_place() -> None:
    def block(rows: int, value: float, dtype: torch.dtype) -> Block:
        tokens = tuple(range(rows))
        return Block(0, 1, 2, 1, rows, tokens, torch.full((rows, 4), value, dtype=dtype))

    landing, places = Landing(), []
    for rows, value, dtype in (
        (1, 1.0, torch.float32),
        (1, 2.0, torch.float32),
        (2, 3.0, torch.float32),
        (2, 4.0, torch.bfloat16),
        (1, 5.0, torch.bfloat16),
    ):
        sent = block(rows, value, dtype)
        back = decode(memoryview(frame(sent)), None, landing)
        assert isinstance(back, Block)
        assert same(sent.hidden, back.hidden)
        places.append(back.hidden.data_ptr())
    assert places[0] == places[1]


def test_a_decoded_message_does_not_share_the_frames_memory() -> None:
    hidden = torch.arange(6.0).view(2, 3)
    bits = frame(Block(0, 1, 0, -1, 2, (4, 5), hidden))
    block = decode(memoryview(bits))
    assert isinstance(block, Block)
    bits[:] = bytes(len(bits))
    assert block.tokens == (4, 5)
    assert torch.equal(block.hidden, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_fit_what_the_geometry_reserves(dtype) -> None:
    hidden = torch.zeros(500, 90, dtype=dtype)
    block = Block(0, 1, 0, -1, 500, (0,) * 500, hidden)
    assert len(frame(block)) == frame_bytes(500, 90, dtype)
    assert frame_bytes(1, 1, dtype) == HEADER_BYTES + CONTROL_BYTES


def refused_or_read(bits: bytes | bytearray) -> Message | None:
    """Any bytes are a message or a ProtocolError; every other exception is a bug."""
    try:
        return decode(memoryview(bits))
    except ProtocolError:
        return None


@given(all_messages, st.data())
@settings(max_examples=150)
def test_truncated_and_lengthened_frames_are_refused(message, data) -> None:
    bits = frame(message)
    cut = data.draw(st.integers(0, len(bits) - 1))
    for damaged in (bits[:cut], bits + bytes(1 + cut)):
        with pytest.raises(ProtocolError):
            decode(memoryview(damaged))


@given(all_messages, st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=250)
def test_flipped_bits_never_raise_anything_else(message, flips) -> None:
    bits = frame(message)
    for place, bit in flips:
        bits[place % len(bits)] ^= 1 << bit
    refused_or_read(bits)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data) -> None:
    assert refused_or_read(data) is None


def headed(body: bytes, **changes: int) -> memoryview:
    """A frame with a body of any content under an otherwise well-formed header."""
    header = {
        "magic": MAGIC, "version": VERSION, "kind": 1, "dtype": 1, "flags": 0, "slot": 0,
        "source": 0, "epoch": 1, "position": 0, "parent": -1, "rows": 1, "judge": 1, "width": 2,
        "beside": 0, "bytes": len(body),
    }  # fmt: skip
    assert set(changes) <= set(header)
    return memoryview(HEADER.pack(*(header | changes).values()) + body)


ROW = bytes(8 + 2 * 4)


def test_the_header_used_below_is_well_formed() -> None:
    assert isinstance(decode(headed(ROW)), Block)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": 1}, "magic 0x1"),
        ({"version": VERSION + 1}, f"version {VERSION + 1}"),
        ({"kind": 77}, "cannot be read|unknown kind"),
        ({"dtype": 9}, "dtype 9"),
        ({"rows": 2**31 - 1, "judge": 0}, "not rows of shape .2147483647"),
        ({"rows": -1}, "-1 rows"),
        ({"rows": 0, "judge": 0}, "0 rows"),
        ({"position": -5}, "at -5"),
        ({"judge": 2}, "2 verdicts"),
        ({"judge": -1}, "-1 verdicts"),
        ({"width": 2**32 - 1}, "shape .1, 4294967295"),
        ({"beside": 2**32 - 1}, "masks of 4294967295 bytes for 1 rows"),
        ({"beside": 8}, "not rows of shape"),
        ({"bytes": 2**63}, "announces 9223372036854775808"),
        ({"kind": 2, "judge": -1}, "-1 tokens"),
        ({"kind": 2, "judge": 1, "width": 2, "beside": 3}, "feedback of 3 numbers among 2"),
        ({"kind": 2, "judge": 2**31 - 1}, "0 bytes are not rows of shape .2147483647"),
    ],
)
def test_absurd_headers_are_named(changes, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode(headed(ROW, **changes))


def fields_of(*fields: int) -> bytes:
    return packed_ids(fields)


@pytest.mark.parametrize(
    ("kind", "body", "changes", "words"),
    [
        (7, (), {"rows": 0}, "ends within its fields"),
        (7, (2**62,), {"rows": 0}, "ends within its fields"),
        (7, (1, 0, 1, 5, 2**62), {"rows": 0}, "ends within its fields"),
        (7, (1, 0, 1, 5, 0, 9), {"rows": 0}, "has other fields"),
        (7, (1, 0, 1, 5, -1), {"rows": 0}, "list of -2 fields"),
        (7, (1, 0, 1, 5, 0, 3, 1, 1, 1, 1, 1, 0), {"rows": 1, "width": 0}, "has other fields"),
        (7, (1, 0, 1, 5, 0, 0, 1, 1, 1, 1, 1, -1), {"rows": 1, "width": 0}, "list of -1 fields"),
        (7, (0,), {"rows": -1}, "states dtype"),
        (8, (1, 2), {"rows": 0}, "not three a node"),
        (8, (0, 1, 2), {"rows": 2, "width": 0, "beside": 2}, None),
        (9, (), {"rows": 0}, "other numbers"),
        (9, (-3,), {"rows": 0}, "other numbers"),
        (9, (2**62, 1), {"rows": 1, "width": 0}, "other numbers"),
        (10, (), {"rows": 0}, "scores of 0 tokens"),
        (10, (1, 2), {"rows": 1, "width": 0}, "scores of 1 tokens"),
        (10, (1, 2), {"rows": 2**31 - 1, "width": 0}, "scores of 2147483647 tokens"),
    ],
)
def test_absurd_fields_of_waves_are_named(kind, body, changes, words) -> None:
    frame = headed(fields_of(*body), kind=kind, judge=len(body), **changes)
    if words is None:
        assert refused_or_read(frame) is not None
        return
    with pytest.raises(ProtocolError, match=words):
        decode(frame)


GOOD = {
    "params": SamplingParams().to_json(),
    "prompt_length": 3,
    "stop_ids": [],
    "vocab_size": 9,
    "prompt_ids": [],
    "want_logits": False,
    "want_feedback": False,
    "want_opinions": False,
    "scores": -1,
    "source": 0,
    "shared": 0,
}


@pytest.mark.parametrize(
    "record",
    [
        None, 7, [], "text", {}, {**GOOD, "params": 3}, {**GOOD, "params": []},
        {**GOOD, "params": {**GOOD["params"], "logit_bias": []}},
        {**GOOD, "params": {**GOOD["params"], "logit_bias": {"x": 1}}},
        {**GOOD, "params": {**GOOD["params"], "temperature": -1}},
        {**GOOD, "params": {**GOOD["params"], "unknown": 1}},
        {**GOOD, "prompt_length": float("inf")}, {**GOOD, "prompt_length": None},
        {**GOOD, "stop_ids": 5}, {**GOOD, "stop_ids": ["x"]}, {**GOOD, "vocab_size": "many"},
        {**GOOD, "prompt_ids": 5}, {**GOOD, "prompt_ids": ["x"]},
    ],
)  # fmt: skip
def test_a_begin_of_another_shape_is_refused(record) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        decode(headed(json.dumps(record).encode(), kind=3))
    assert isinstance(decode(headed(json.dumps(GOOD).encode(), kind=3)), Begin)


def test_the_longest_request_fits_into_a_control_frame() -> None:
    """A longer one would end the pipeline."""
    most = 2**31 - 1
    params = SamplingParams(
        temperature=0.1 + 0.2,
        logit_bias={most - i: -100 / 3 for i in range(MAX_LOGIT_BIAS)},
        stop=("\N{GRINNING FACE}" * MAX_STOP_LENGTH,) * MAX_STOP_STRINGS,
        stop_token_ids=range(most - MAX_STOP_IDS, most),
        seed=2**63 - 1,
        max_tokens=most,
        min_tokens=most,
    )
    stop_ids = frozenset((*params.stop_token_ids, *range(64)))
    prompt = tuple(range(most - 2 * NEWEST, most))
    request = Request(prompt, params, stop_ids, vocab_size=most, top=20)
    begin = begin_message(3, request, feedback=True, logits=True)
    assert len(frame(begin)) <= HEADER_BYTES + CONTROL_BYTES
    assert begin.stop_ids == tuple(sorted(stop_ids))
    assert begin.params.logit_bias == params.logit_bias
    assert begin.prompt_ids == prompt[-NEWEST:]


@pytest.mark.parametrize("kind", [3, 4, 5, 6])
@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"[" * 60_000, b'{"verb":1}', b'{"kind":"ready","fields":[]}']
)
def test_other_json_is_refused(kind, body) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        decode(headed(body, kind=kind))


def test_the_page_of_the_protocol_is_of_this_version() -> None:
    """Of the first bytes of a frame, and of what a stage is asked for and tells."""
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    first = bytes(frame(Control("stop")))[:4].decode()
    assert f"| the number {MAGIC:#x} (`PPSD`), so the bytes are `{first}` |" in page
    assert f"| 4 | version | {VERSION}; any other is refused |" in page
    for kind in (Control, Status):
        [told] = re.findall(rf"\| {kind.__name__.lower()} \| JSON: (.*?) \|", page)
        assert set(re.findall("`[a-z]+`", told)) == set(re.findall("`[a-z]+`", kind.__doc__ or ""))
