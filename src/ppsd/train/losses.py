"""What a head is trained on: KL(model ‖ head) and cross-entropy, plain and in bounded memory.

Both distributions live on the draft vocabulary: the model's is renormalised over it. Labels are
indices into it, -1 for tokens outside, which have no cross-entropy. Within train/ only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

CHUNK_ROWS = 256  # with 8192 draft tokens, 8 MiB a logit matrix: it stays in a CPU's cache


@dataclass(frozen=True)
class LossWeights:
    """Factors of the two terms; the total is their weighted sum (PPSD, App. C.1)."""

    kl: float = 1.0
    ce: float = 0.1


def reference_loss(
    scores: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """The loss as in the paper, a mean over rows: logits [n, Vd] of head and model, labels [n]."""
    log_q, log_p = scores.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    picked = log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    surprise = -picked * (labels >= 0)
    return (weights.kl * divergence + weights.ce * surprise).mean()


def chunked_losses(
    features: torch.Tensor,
    teacher: torch.Tensor,
    lm_head: torch.Tensor,
    labels: torch.Tensor,
    weights: LossWeights,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [E], their KL [E] and cross-entropy [E] for E heads that share one teacher.

    ``features`` [E, n, C] and ``teacher`` [n, C] are normed rows; ``lm_head`` [Vd, C] turns
    either into logits and is frozen. Never more than three logit matrices of CHUNK_ROWS rows
    exist: the gradient of each chunk is taken to ``features`` at once.
    """
    losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    losses = _Chunked.apply(  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        features, teacher, lm_head, labels, weights
    )
    return losses


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        teacher: torch.Tensor,
        lm_head: torch.Tensor,
        labels: torch.Tensor,
        weights: LossWeights,
    ) -> tuple[torch.Tensor, ...]:
        heads, count, _ = features.shape
        gradient = torch.empty_like(features)
        terms = features.new_zeros(2, heads, dtype=_wide(features))
        for rows in _chunks(count):
            log_p = _log_softmax(teacher[rows], lm_head)
            p = log_p.exp()
            negentropy = (p * log_p).sum()
            for head in range(heads):
                log_q = _log_softmax(features[head, rows], lm_head)
                terms[0, head] += negentropy - (p * log_q).sum()
                known, slots = _known(labels[rows])
                terms[1, head] -= log_q[known, slots].sum()
                slope = _slope(log_q, p, known, slots, weights) / count
                gradient[head, rows] = (slope.to(lm_head.dtype) @ lm_head).to(features.dtype)
        ctx.save_for_backward(gradient)
        kl, ce = terms / count
        ctx.mark_non_differentiable(kl, ce)
        return weights.kl * kl + weights.ce * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * gradients[0].to(gradient.dtype)[:, None, None]
        return scaled, None, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(count: int) -> Iterator[slice]:
    return (slice(i, min(i + CHUNK_ROWS, count)) for i in range(0, count, CHUNK_ROWS))


def _log_softmax(rows: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    scores = rows.to(lm_head.dtype) @ lm_head.T
    return scores.to(_wide(rows)).log_softmax(-1)


def _known(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose label is in the draft vocabulary, and those labels."""
    known = (labels >= 0).nonzero()[:, 0]
    return known, labels[known]


def _slope(
    log_q: torch.Tensor,
    p: torch.Tensor,
    known: torch.Tensor,
    slots: torch.Tensor,
    weights: LossWeights,
) -> torch.Tensor:
    """Derivative of the summed loss by the head's logits: softmax minus target, for each term.

    Consumes ``log_q``.
    """
    factor = torch.full_like(log_q[:, :1], weights.kl)
    factor[known] += weights.ce
    slope = log_q.exp_().mul_(factor).sub_(p, alpha=weights.kl)
    slope[known, slots] -= weights.ce
    return slope
