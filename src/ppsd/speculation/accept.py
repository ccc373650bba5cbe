"""Which drafts stand. Pure: randomness is an argument. For the policy and the engine.

Both acceptance modes draw the target's own token and compare it with the draft; they differ only
in how that token is drawn. `coupled`: ``Sampler.choose``, whose noise both sides share.
`rejection`: ``draw_target``, which returns the draft as often as any exact method can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the policy uses ``accept`` and must not cost its users an import of PyTorch
    from torch import Tensor


def accept(drafts: Sequence[int], targets: Sequence[int]) -> tuple[int, int | None]:
    """Judge consecutive drafts by the target's tokens for the same positions.

    Returns the number of accepted drafts (the longest common prefix) and the token that follows
    them: the correction of a wrong draft, the bonus after all drafts, or None if the target has
    not judged that position yet. Raises ValueError for more than ``len(drafts) + 1`` targets.
    """
    if len(targets) > len(drafts) + 1:
        raise ValueError(f"targets must hold at most {len(drafts) + 1} tokens, got {len(targets)}")
    num_accepted = 0
    for draft, target in zip(drafts, targets, strict=False):
        if draft != target:
            break
        num_accepted += 1
    return num_accepted, targets[num_accepted] if num_accepted < len(targets) else None


def draw_target(
    draft: int,
    draft_probs: Tensor,
    target_probs: Tensor,
    accept_uniform: float,
    residual_uniform: float,
) -> int:
    """Draw the target's token so that it equals ``draft`` as often as possible.

    Leviathan et al. 2023, Algorithm 1, for one position. ``draft`` was drawn from ``draft_probs``;
    both distributions are float64 [V]; the uniforms are independent and in [0, 1). The result is
    distributed as ``target_probs`` and equals ``draft`` iff the draft is accepted, because a
    rejected draft has no mass in the residual. Raises ValueError if ``draft`` has no draft mass.
    """
    draft_mass, target_mass = float(draft_probs[draft]), float(target_probs[draft])
    if not draft_mass > 0:
        raise ValueError(f"draft must have positive draft probability, token {draft} has none")
    if accept_uniform < target_mass / draft_mass:
        return draft
    residual = (target_probs - draft_probs).clamp(min=0)
    if not residual.any():
        # Only rounding leads here: the distributions agree, so the target's own serves.
        residual = target_probs
    return _inverse_cdf(residual, residual_uniform)


def _inverse_cdf(weights: Tensor, uniform: float) -> int:
    """Return the token at ``uniform`` in the cumulative sum of ``weights`` (any positive total)."""
    support = weights.nonzero().squeeze(1)
    cumulative = weights[support].cumsum(0)
    rank = int((cumulative <= uniform * cumulative[-1]).sum())
    # Rounding can lift uniform · total up to the total when that is denormal.
    return int(support[min(rank, len(support) - 1)])
