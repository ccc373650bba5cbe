"""Run the frozen model and its heads over whole sequences, without a key/value cache.

Rows of all sequences are flattened to n = B·T, so weights and row functions are those of inference;
only attention sees the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ppsd.model.exit_head import ExitHead
from ppsd.model.layers import Attention, DecoderLayer, Rope, RopeRows
from ppsd.model.stage import Stage


def by_sequence(rows: torch.Tensor, sequences: int) -> torch.Tensor:
    """Return flattened rows [B·T, heads, D] as [B, heads, T, D]."""
    return rows.reshape(sequences, -1, *rows.shape[1:]).transpose(1, 2)


def causal_attention(sequences: int) -> Attention:
    """Return attention of every row [B·T, …] to its own sequence's rows up to itself."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (by_sequence(t, sequences) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return attention


def whole_sequences(rope: Rope, sequences: int, length: int) -> RopeRows:
    """Return the rotary rows of flattened sequences that all begin at position 0."""
    device = rope.cos.device
    return RopeRows(rope, torch.arange(length, device=device).repeat(sequences))


@dataclass(frozen=True)
class Features:
    """Rows [B·T, C] of one frozen forward: after each exit layer, and at its end."""

    exits: dict[int, torch.Tensor]
    last: torch.Tensor


@torch.no_grad()
def teacher_forward(
    model: Stage, tokens: torch.Tensor, exits: Collection[int], depth: int | None = None
) -> Features:
    """Run the unsplit ``model`` over ``tokens`` [B, T]; padding belongs at the end of a row.

    The one forward serves all ``exits``; it ends after ``depth`` layers, all by default. Memory:
    the rows of one layer, and those kept.
    """
    assert model.embedding is not None, "the teacher holds all layers"
    rope = whole_sequences(model.rope, *tokens.shape)
    attention = causal_attention(tokens.shape[0])
    x = model.embedding[tokens.flatten()]
    kept: dict[int, torch.Tensor] = {}
    for done, weights in enumerate(model.layers[:depth], start=1):
        x = DecoderLayer(weights, model.spec)(x, rope, attention)
        if done in exits:
            kept[done] = x
    return Features(kept, x)


@torch.no_grad()
def head_forward(head: ExitHead, hidden: torch.Tensor, sequences: int) -> torch.Tensor:
    """Run rows [B·T, C] of whole sequences through a head, as ``ExitHead.forward`` does."""
    rope = whole_sequences(head.rope, sequences, len(hidden) // sequences)
    x = head.enter(hidden)
    for weights in head.layers:
        x = DecoderLayer(weights, head.spec)(x, rope, causal_attention(sequences))
    return x


def teacher_rows(model: Stage, features: Features, rows: torch.Tensor) -> torch.Tensor:
    """Return final-normed ``rows`` of the teacher: times an LM head they are its logits."""
    with torch.no_grad():
        return model.final_norm()(features.last[rows])
