"""Memory of a stage before it is loaded: one estimate for plan, check and report.

What is in use is told by ``worker.machine.memory_used``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import psutil

from ppsd.config import DEFAULT_CONTEXT
from ppsd.errors import InsufficientMemoryError
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan, weight_bytes
from ppsd.model.weights import TensorSource
from ppsd.plan.planner import Plan
from ppsd.plan.profile import Profile
from ppsd.plan.sizes import WORKER_BYTES, Sizes


def default_context(spec: ModelSpec) -> int:
    """Return how many positions a cache holds where nothing else is asked for."""
    return min(spec.max_context, DEFAULT_CONTEXT)


def stage_bytes(
    spec: ModelSpec,
    source: TensorSource,
    plans: Sequence[StagePlan],
    head: int,
    *,
    apart: bool,
    inner: Sequence[int] = (),
) -> list[int]:
    """Return the bytes each process needs for its stage: weights, a full key/value cache, runtime.

    ``head`` counts the numbers of stage 0's exit head, ``inner`` those of later ones. Stages that
    are not ``apart`` share one process, and come as one number.
    """
    sizes = Sizes.of(spec)
    bounds = (0, *(plan.last for plan in plans))
    assert all(
        plan.first == first for plan, (first, _) in zip(plans, pairwise(bounds), strict=True)
    )
    each = [
        sizes.stage_bytes(
            bounds,
            rank,
            plan.dtype.itemsize,
            plan.slots * (plan.max_context + plan.loose),
            head,
            weight_bytes(spec, plan, source),
        )
        for rank, plan in enumerate(plans)
    ]
    for rank, numbers in enumerate(inner):
        each[rank] += numbers * plans[rank].dtype.itemsize
    return each if apart else [sum(each) - (len(each) - 1) * WORKER_BYTES]


def shape_bytes(profile: Profile, context: int, plan: Plan) -> list[int]:
    """Return the bytes each worker needs for a model of known shape, all weights being whole."""
    weights = plan.exit.weights if plan.exit else 0
    return [
        profile.sizes.stage_bytes(plan.bounds, rank, profile.itemsize, context, weights)
        for rank in range(plan.cost.size)
    ]


def check_free(needed: Sequence[int], what: str, max_context: int, concurrent: int) -> None:
    """Raise InsufficientMemoryError if this host has less free than the bytes of all stages."""
    free = psutil.virtual_memory().available
    if sum(needed) > free:
        each = ", ".join(f"stage {r} {n / 2**30:.2f}" for r, n in enumerate(needed))
        fewer = f"fewer concurrent requests ({concurrent} now), " if concurrent > 1 else ""
        raise InsufficientMemoryError(
            f"{what} needs about {sum(needed) / 2**30:.2f} GiB here ({each}), but "
            f"{free / 2**30:.2f} GiB are free; use {fewer}a narrower dtype, a smaller max_context "
            f"({max_context} now) or more hosts"
        )
