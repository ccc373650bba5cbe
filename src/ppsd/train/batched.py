"""The frozen model and its heads over batches of whole sequences, without a key/value cache.

Imported by measure/.

Rows of all sequences are flattened to n = B·T, so weights and row functions are those of
inference; only attention sees the batch.
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
    """Flattened rows [B·T, heads, D] as [B, heads, T, D]."""
    return rows.reshape(sequences, -1, *rows.shape[1:]).transpose(1, 2)


def causal_attention(sequences: int) -> Attention:
    """Attention of every row to its own sequence's rows up to itself; rows are [B·T, …]."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (by_sequence(t, sequences) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return attention


def whole_sequences(rope: Rope, sequences: int, length: int) -> RopeRows:
    """Rotary rows of ``sequences`` flattened sequences that all begin at position 0."""
    device = rope.cos.device
    return RopeRows(rope, torch.arange(length, device=device).repeat(sequences))


@dataclass(frozen=True)
class Features:
    """What one frozen forward gives: rows [B·T, C] after each exit layer, and at its end."""

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
    """``ExitHead.forward`` for whole sequences: rows [B·T, C] after the exit layer to [B·T, C]."""
    rope = whole_sequences(head.rope, sequences, len(hidden) // sequences)
    x = head.enter(hidden)
    for weights in head.layers:
        x = DecoderLayer(weights, head.spec)(x, rope, causal_attention(sequences))
    return x


def teacher_rows(model: Stage, features: Features, rows: torch.Tensor) -> torch.Tensor:
    """Final-normed rows [len(rows), C] of the teacher: times an LM head they are its logits."""
    with torch.no_grad():
        return model.final_norm()(features.last[rows])
