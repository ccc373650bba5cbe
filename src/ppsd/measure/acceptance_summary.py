"""Figures from judged drafts: rates with intervals, by category and position, first heads right.

Numbers in, JSON-ready numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppsd.engine.choose import head_layers
from ppsd.engine.llm import LLM
from ppsd.measure.acceptance import OUTSIDE, Answer, Outcome
from ppsd.measure.verify import first_difference
from ppsd.model.head_files import HeadConfig
from ppsd.model.spec import ModelSpec
from ppsd.plan.planner import Exit, Problem, choose
from ppsd.plan.profile import estimate
from ppsd.plan.sizes import Sizes
from ppsd.plan.theory import paper_speedup
from ppsd.train.interval import interval
from ppsd.types import SamplingParams

TOPS = (1, 2, 4, 8)
BUCKET = 8  # positions after the prompt that are counted together

Figures = dict[str, Any]


def summarize(outcomes: Sequence[Outcome]) -> Figures:
    """Return one head's figures: overall, ``by_category`` and ``by_position`` after the prompt."""
    categories = sorted({o.category for o in outcomes})
    by_category = {c: rate([o.ranks for o in outcomes if o.category == c]) for c in categories}
    longest = max(len(o.ranks) for o in outcomes)
    by_position = [
        {"first": first + 1, "last": first + BUCKET}
        | rate([part for o in outcomes if (part := o.ranks[first : first + BUCKET])])
        for first in range(0, longest, BUCKET)
    ]
    overall = rate([o.ranks for o in outcomes])
    return overall | {"by_category": by_category, "by_position": by_position}


def rate(prompts: Sequence[Sequence[int]]) -> Figures:
    """Return the figures of the ranks of each prompt.

    ``alpha``: accepted / judged; ``interval``: see ``interval``; ``top[k]``: share of positions
    where the model's token is among the head's first k; ``outside``: share of tokens that are not
    scored.
    """
    ranks = np.concatenate([np.asarray(p) for p in prompts])
    accepted = [sum(rank == 0 for rank in p) for p in prompts]
    return {
        "alpha": float((ranks == 0).mean()),
        "interval": interval(accepted, [len(p) for p in prompts]),
        "prompts": len(prompts),
        "judged": len(ranks),
        "accepted": sum(accepted),
        "top": {str(k): float(((ranks >= 0) & (ranks < k)).mean()) for k in TOPS},
        "outside": float((ranks == OUTSIDE).mean()),
    }


def first_right(outcomes: Mapping[str, Sequence[Outcome]]) -> Figures:
    """Return how often each head is the first to be right, the heads given from the lowest exit up.

    ``shares`` by label add up to 1 with ``none``, positions where no head is right.
    """
    columns = [np.concatenate([o.hits for o in found]) for found in outcomes.values()]
    hits = np.stack(columns, 1).astype(bool)  # [positions, heads]
    first = np.where(hits.any(1), hits.argmax(1), hits.shape[1])
    counts = np.bincount(first, minlength=hits.shape[1] + 1)
    shares = counts / len(first)
    return {
        "counts": dict(zip(outcomes, counts.tolist(), strict=False)) | {"none": int(counts[-1])},
        "shares": dict(zip(outcomes, shares.tolist(), strict=False)) | {"none": float(shares[-1])},
        "judged": len(first),
    }


def held_out(config: HeadConfig) -> dict[str, Any] | None:
    """Return what training measured, None for what is no measurement."""
    found = config.metrics.get("validation")
    sound = isinstance(found, dict) and isinstance(found.get("alpha"), int | float)
    return found if sound else None


def expected_speed(spec: ModelSpec, head: HeadConfig, alpha: float, stages: int) -> Figures:
    """Return the speedup on ``stages`` equal devices, by parameters read, with free hops.

    ``head_layers``: a draft's cost in layer-times. ``paper``: ρ*, which counts neither head nor LM
    head. Raises ConfigError when no split of so many stages ends stage 0 at the exit layer.
    """
    profile = estimate(Sizes.of(spec))
    depth, layer = head_layers(profile.sizes, head), profile.layer_time(0)
    draft = profile.head_time(depth, head.draft_vocab)
    exit_ = Exit(head.exit_layer, alpha, draft)
    plan = choose(Problem(profile, stages, (exit_,), exit_layer=head.exit_layer, mode="ppsd"))
    return {
        "head_layers": draft / layer,
        "stages": stages,
        "split": list(plan.bounds[1:-1]),
        "speedup": plan.speedup,
        "paper": float(paper_speedup(alpha, spec.num_layers, head.exit_layer)),
    }


def decode(
    llm: LLM, answers: Sequence[Answer], outcomes: Sequence[Outcome], params: SamplingParams
) -> Figures:
    """Decode answers again with the engine, and compare what it judged and accepted, one by one.

    ``equal_tokens``: prompts whose tokens are all the same. ``compared`` positions have the same
    prefix in both; at ``differing`` of them the draft was accepted in one and not in the other.
    ``late``: drafts for which the engine had its verdict first, so that they were not judged, in
    prompts with equal tokens; these differ where the draft was right.
    """
    judged = accepted = equal = compared = differing = late = 0
    for answer, outcome in zip(answers, outcomes, strict=True):
        said = llm.run(answer.tokens[: answer.start], params)
        judged += said.stats.counts.judged
        accepted += said.stats.counts.accepted
        parting = first_difference(said.token_ids, answer.tokens[answer.start :])
        equal += parting is None
        late += (answer.judged - said.stats.counts.judged) * (parting is None)
        same = slice(answer.judged if parting is None else min(parting, answer.judged))
        pairs = list(zip(said.accepted[same], outcome.hits[same], strict=True))
        compared += len(pairs)
        differing += sum(engine != bool(hit) for engine, hit in pairs)
    return {
        "prompts": len(answers),
        "judged": judged,
        "accepted": accepted,
        "alpha": accepted / judged if judged else None,
        "offline": {
            "judged": sum(a.judged for a in answers),
            "accepted": sum(sum(o.hits) for o in outcomes),
        },
        "equal_tokens": equal,
        "compared": compared,
        "differing": differing,
        "late": late,
    }
