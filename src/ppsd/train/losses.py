"""Losses of heads: KL(model ‖ head) and cross-entropy, in bounded memory.

Both distributions live on the tokens that are scored: the model's is renormalised over them. Labels
are indices into these, -1 for others, which have no cross-entropy. The head's is the mixture that
it drafts from (lookup.mixed): a copied token c adds its weight w = exp(odds) to the head's q, so

    log mix = log q + [c]·softplus(odds - log q(c)) - softplus(odds).

Copies of tokens that are not scored teach nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# With 8192 draft tokens 256 rows are 8 MiB a logit matrix, which stays in a CPU's cache; a GPU is
# better off with fewer kernels.
CHUNK_ROWS = 256
GPU_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class LossWeights:
    """Factors of the two terms; the total is their weighted sum (PPSD, App. C.1)."""

    kl: float = 1.0
    ce: float = 0.1


@dataclass(frozen=True)
class Mixture:
    """``copied`` [n]: index among those scored of what lookup offers, -1 for nothing.

    ``odds`` [E, n]: the log weight that each head gives it.
    """

    copied: torch.Tensor
    odds: torch.Tensor


def chunked_losses(
    features: torch.Tensor,
    teacher: torch.Tensor,
    lm_head: torch.Tensor,
    labels: torch.Tensor,
    weights: LossWeights,
    mixture: Mixture,
    shares: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses [E], their KL [E] and cross-entropy [E] of E heads that share a teacher.

    ``features`` [E, n, C] and ``teacher`` [n, C] are normed rows; ``lm_head`` [Vd, C] turns
    either into logits and is frozen. ``shares`` [n] weigh the rows. Never more than three logit
    matrices of a chunk's rows exist: the gradient of each chunk is taken to ``features`` and
    ``mixture.odds`` at once.
    """
    losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    losses = _Chunked.apply(  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        features, mixture.odds, teacher, lm_head, labels, mixture.copied, weights, shares
    )
    return losses


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        odds: torch.Tensor,
        teacher: torch.Tensor,
        lm_head: torch.Tensor,
        labels: torch.Tensor,
        copied: torch.Tensor,
        weights: LossWeights,
        shares: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        heads, count, _ = features.shape
        gradient, odds_gradient = torch.empty_like(features), torch.zeros_like(odds)
        kl, ce = features.new_zeros(2, heads, dtype=_wide(features))
        shares = shares.to(kl.dtype)
        for rows in _chunks(count, CHUNK_ROWS if features.device.type == "cpu" else GPU_CHUNK_ROWS):
            log_p = _log_softmax(teacher[rows], lm_head)
            p, share = log_p.exp(), shares[rows]
            negentropy = (p * log_p).sum(-1)
            known, slots = _known(labels[rows])
            offered = _known(copied[rows])
            for head in range(heads):
                log_q = _log_softmax(features[head, rows], lm_head)
                kl[head] += share @ (negentropy - (p * log_q).sum(-1))
                ce[head] -= share[known] @ log_q[known, slots]
                copies = _copying(log_q, p, labels[rows], offered, odds[head, rows], weights)
                kl[head] -= share[copies.rows] @ copies.gained_kl
                ce[head] -= share[copies.rows] @ copies.gained_ce
                by_odds = (share[copies.rows] * copies.by_odds).to(odds)
                odds_gradient[head, rows].index_copy_(0, copies.rows, by_odds)
                slope = _slope(log_q, p, known, slots, weights, copies)
                by_row = slope.to(lm_head.dtype) @ lm_head
                gradient[head, rows] = (share[:, None] * by_row).to(features.dtype)
        ctx.save_for_backward(gradient, odds_gradient)
        ctx.mark_non_differentiable(kl, ce)
        return weights.kl * kl + weights.ce * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_features, by_odds = ctx.saved_tensors
        factors = gradients[0].to(by_features.dtype)[:, None]
        return by_features * factors[:, None], by_odds * factors, None, None, None, None, None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _log_softmax(rows: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    scores = rows.to(lm_head.dtype) @ lm_head.T
    return scores.to(_wide(rows)).log_softmax(-1)


def _known(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows whose label is scored, and those labels."""
    known = (labels >= 0).nonzero()[:, 0]
    return known, labels[known]


class _Copying(NamedTuple):
    """Changes by copies for one head: in ``rows`` [k], where token ``ids`` [k] is copied.

    ``gained_kl`` and ``gained_ce`` [k]: how much either falls; ``by_odds`` [k]: the loss's
    derivative; ``pull`` [k]: the same by the log-probability of the copied token.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    gained_kl: torch.Tensor
    gained_ce: torch.Tensor
    by_odds: torch.Tensor
    pull: torch.Tensor


def _copying(
    log_q: torch.Tensor,
    p: torch.Tensor,
    labels: torch.Tensor,
    offered: tuple[torch.Tensor, torch.Tensor],
    odds: torch.Tensor,
    weights: LossWeights,
) -> _Copying:
    rows, ids = offered
    odds = odds[rows].to(p.dtype)
    above = odds - log_q[rows, ids]
    chance = p[rows, ids]
    same, known = ((labels[rows] == ids).to(p.dtype), (labels[rows] >= 0).to(p.dtype))
    gain, loss = _softplus(above), _softplus(odds)
    pull = (weights.kl * chance + weights.ce * same) * above.sigmoid()
    by_odds = (weights.kl + weights.ce * known) * odds.sigmoid() - pull
    return _Copying(rows, ids, chance * gain - loss, same * gain - known * loss, by_odds, pull)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + e^x) to the last digit; PyTorch's own gives up at x = 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _slope(
    log_q: torch.Tensor,
    p: torch.Tensor,
    known: torch.Tensor,
    slots: torch.Tensor,
    weights: LossWeights,
    copies: _Copying,
) -> torch.Tensor:
    """Return each row's slope by the head's logits: softmax minus target, for each term.

    Consumes ``log_q``.
    """
    factor = torch.full_like(log_q[:, :1], weights.kl)
    factor[known] += weights.ce
    factor[copies.rows, 0] -= copies.pull
    slope = log_q.exp_().mul_(factor).sub_(p, alpha=weights.kl)
    slope[known, slots] -= weights.ce
    slope[copies.rows, copies.ids] += copies.pull
    return slope
