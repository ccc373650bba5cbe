"""How likely the model finds a prompt's own tokens: what the last stage says of them.

Part of the protocol (messages.py). Logits would be a thousand times as long, so the last stage
sends what is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ppsd.errors import ProtocolError
from ppsd.model.kernels import MAX_ROWS
from ppsd.transport.base import Part
from ppsd.worker.frame import decode_fields, encode_fields, frame_bytes

KIND = 10
MAX_TOP = 20  # likeliest tokens at a position
UNSCORED = -1


class Scores(NamedTuple):
    """The log-probabilities of a prompt's tokens at ``position``…, given all before them.

    ``numbers`` float64 [n, 1 + k]: a token's own, and those of the k likeliest, whose ids
    ``tokens`` holds.
    """

    slot: int
    epoch: int
    source: int
    position: int
    tokens: tuple[tuple[int, ...], ...]
    numbers: torch.Tensor


def scores_bytes(rows: int) -> int:
    """Return the size of the largest frame of so many scores."""
    return frame_bytes(rows, 2 * MAX_TOP + 1, torch.float64)


def score(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    following: Sequence[int],
    vocab_size: int,
    top: int,
) -> tuple[tuple[tuple[int, ...], ...], torch.Tensor]:
    """Return tokens and numbers of Scores for the tokens that follow ``rows`` [n, C]."""
    tokens: list[tuple[int, ...]] = []
    numbers = []
    ids = torch.tensor(following)
    # few at once: compiled kernels then sum as for a row alone, and logits take little memory
    for part, next_ids in zip(torch.split(rows, MAX_ROWS), torch.split(ids, MAX_ROWS), strict=True):
        logits = logits_of(part)[:, :vocab_size].cpu().double().log_softmax(1)
        own = logits.gather(1, next_ids[:, None])
        likeliest = logits.topk(min(top, vocab_size), dim=1)
        tokens += map(tuple, likeliest.indices.tolist())
        numbers.append(torch.cat([own, likeliest.values], 1))
    return tuple(tokens), torch.cat(numbers)


def encode_scores(scores: Scores) -> list[Part]:
    """Lay scores out as integers and rows of numbers."""
    return encode_fields(
        KIND,
        [token for tokens in scores.tokens for token in tokens],
        scores.numbers,
        slot=scores.slot,
        source=scores.source,
        epoch=scores.epoch,
        position=scores.position,
    )


def decode_scores(header: tuple[int, ...], body: memoryview, apart: torch.Tensor | None) -> Scores:
    """Read scores; raises ProtocolError."""
    fields, numbers = decode_fields(header, body, apart)
    slot, source, epoch, position, rows, width = header[5], *header[6:9], header[10], header[12]
    top = width - 1
    if numbers is None or len(fields) != rows * top:
        raise ProtocolError(f"scores of {rows} tokens have {len(fields)} fields")
    tokens = tuple(fields[i * top : (i + 1) * top] for i in range(rows))
    return Scores(slot, epoch, source, position, tokens, numbers)
