"""The chunked loss against the plain one, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from ppsd.train.losses import CHUNK_ROWS, LossWeights, chunked_losses, reference_loss


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
    factors = torch.tensor([1.0, 3.0], dtype=torch.float64)

    losses, kl, ce = chunked_losses(features, teacher, lm_head, labels, weights)
    (losses * factors).sum().backward()
    gradient, features.grad = features.grad, None
    expected = torch.stack(
        [reference_loss(f @ lm_head.T, teacher @ lm_head.T, labels, weights) for f in features]
    )
    (expected * factors).sum().backward()

    assert features.grad is not None
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, features.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights.kl * kl + weights.ce * ce, losses)


def test_a_head_that_is_the_teacher_has_no_divergence() -> None:
    torch.manual_seed(0)
    rows, lm_head = torch.randn(9, 8), torch.randn(20, 8)
    _, kl, ce = chunked_losses(rows[None], rows, lm_head, torch.full((9,), -1), LossWeights())
    assert abs(kl.item()) < 1e-6
    assert ce.item() == 0.0
