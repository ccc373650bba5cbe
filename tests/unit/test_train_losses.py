"""The chunked loss against the plain one, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from ppsd.train.losses import CHUNK_ROWS, LossWeights, Mixture, chunked_losses


def reference_loss(
    scores: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    weights: LossWeights,
    copied: torch.Tensor,
    odds: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """The loss as in the paper, rows in ``shares`` [n]: logits [n, Vd] of head and model.

    ``labels`` [n]; ``copied`` and ``odds`` [n]: see Mixture.
    """
    copy = torch.zeros_like(scores)
    offered = copied >= 0
    copy[offered, copied[offered]] = odds[offered].exp()
    mixture = scores.softmax(-1) + copy
    log_q = (mixture / mixture.sum(-1, keepdim=True)).log()
    log_p = teacher.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    picked = log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    surprise = -picked * (labels >= 0)
    return shares @ (weights.kl * divergence + weights.ce * surprise)


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, CHUNK_ROWS + 7])
@pytest.mark.parametrize(
    "weights", [LossWeights(1.0, 0.1), LossWeights(0.0, 1.0), LossWeights(2, 0)]
)
def test_chunked_equals_reference(rows: int, weights: LossWeights) -> None:
    torch.manual_seed(rows)
    features = torch.randn(2, rows, 16, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(rows, 16, dtype=torch.float64)
    lm_head = torch.randn(50, 16, dtype=torch.float64)
    labels = torch.randint(-1, 50, (rows,))
    labels[0] = -1
    copied = torch.where(torch.rand(rows) < 0.3, labels, torch.randint(-1, 50, (rows,)))
    odds = (2 * torch.randn(2, rows, dtype=torch.float64)).requires_grad_()
    factors = torch.tensor([1.0, 3.0], dtype=torch.float64)
    shares = torch.rand(rows, dtype=torch.float64)

    losses, kl, ce = chunked_losses(
        features, teacher, lm_head, labels, weights, Mixture(copied, odds), shares
    )
    (losses * factors).sum().backward()
    gradients = features.grad, odds.grad
    features.grad = odds.grad = None
    scores = features @ lm_head.T, [teacher @ lm_head.T] * 2
    expected = torch.stack(
        [
            reference_loss(s, t, labels, weights, copied, o, shares)
            for s, t, o in zip(*scores, odds, strict=True)
        ]
    )
    (expected * factors).sum().backward()

    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, (features.grad, odds.grad), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.kl * kl + weights.ce * ce, losses)


def test_a_head_that_is_the_teacher_has_no_divergence() -> None:
    torch.manual_seed(0)
    rows, lm_head = torch.randn(9, 8), torch.randn(20, 8)
    nothing, odds = torch.full((9,), -1), torch.zeros(1, 9)
    mixture = Mixture(nothing, odds)
    _, kl, ce = chunked_losses(
        rows[None], rows, lm_head, nothing, LossWeights(), mixture, torch.full((9,), 1 / 9)
    )
    assert abs(kl.item()) < 1e-6
    assert ce.item() == 0.0
