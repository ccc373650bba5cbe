"""Exact distribution of speculative text for tiny vocabularies. For tests of acceptance only.

`rejection` draws from two uniforms; both are integrated cell by cell, and all drafts enumerated.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ppsd.speculation.accept import accept, draw_target

Draw = Callable[[int, Tensor, Tensor, float, float], int]
Probs = tuple[float, ...]
Text = tuple[int, ...]
Pair = tuple[Probs, Probs]
"""Draft and target distribution (q, p) of one prefix."""
Model = Callable[[Text], Pair]


def tensor(probs: Probs) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64)


@dataclass(frozen=True)
class Step:
    """What is under test: how a target token is drawn, and the q that the judge believes in.

    The defaults are the production code; a planted bug replaces one of them.
    """

    draw: Draw = draw_target
    believe: Callable[[Probs], Probs] = tuple


def cdf_points(*weights: np.ndarray) -> set[float]:
    cdfs = [(w.cumsum() / w.sum()).tolist() for w in weights if w.sum() > 0]
    return {u for cdf in cdfs for u in cdf if u < 1}


def breakpoints(step: Step, draft: int, q: Probs, p: Probs) -> tuple[list[float], list[float]]:
    """Where the result may change along the acceptance and along the residual uniform."""
    gap = np.subtract(p, q)
    residual_axis = {0.0, 1.0} | cdf_points(gap.clip(0))
    accept_axis = {0.0, 1.0, min(1.0, p[draft] / q[draft])}
    if step.draw is not draw_target:  # a bug may change its mind elsewhere
        residual_axis |= cdf_points(np.array(p), abs(gap), (-gap).clip(0))
        residual_axis |= {u for u in gap.clip(0).cumsum().tolist() if u < 1}
        accept_axis |= residual_axis
    return sorted(accept_axis), sorted(residual_axis)


@cache
def kernel(step: Step, draft: int, q: Probs, p: Probs) -> Probs:
    """The exact distribution of the target's token given the draft.

    The result is constant between break points, so both uniforms are integrated by evaluating
    each cell once.
    """
    q = step.believe(q)
    result = [0.0] * len(p)
    cells = itertools.product(*map(itertools.pairwise, breakpoints(step, draft, q, p)))
    for (a, b), (c, d) in cells:
        token = step.draw(draft, tensor(q), tensor(p), (a + b) / 2, (c + d) / 2)
        result[token] += (b - a) * (d - c)
    return tuple(result)


def judged(step: Step, model: Model, drafts: Text) -> Iterator[tuple[Text, float]]:
    """Targets up to the first that differs from its draft, else the bonus; with probabilities."""
    agreed = 1.0
    for i, draft in enumerate(drafts):
        odds = kernel(step, draft, *model(drafts[:i]))
        for token, mass in enumerate(odds):
            if token != draft and mass > 0:
                yield (*drafts[:i], token), agreed * mass
        agreed *= odds[draft]
    _, bonus = model(drafts)
    yield from (((*drafts, token), agreed * mass) for token, mass in enumerate(bonus))


def plain_joint(model: Model, prefix: Text, length: int) -> np.ndarray:
    """Distribution of the ``length`` tokens after ``prefix``, one axis per token."""
    if length == 0:
        return np.array(1.0)
    _, p = model(prefix)
    tails = [
        mass * plain_joint(model, (*prefix, token), length - 1) for token, mass in enumerate(p)
    ]
    return np.stack(tails)


def speculative_joint(step: Step, model: Model, vocab: int, depth: int) -> np.ndarray:
    """The same for depth + 1 tokens: ``depth`` drafts, their judgement, then plain decoding."""
    emitted: dict[Text, float] = defaultdict(float)
    for drafts in itertools.product(range(vocab), repeat=depth):
        drafted = math.prod(model(drafts[:i])[0][token] for i, token in enumerate(drafts))
        for targets, mass in judged(step, model, drafts) if drafted > 0 else ():
            num_accepted, following = accept(drafts, targets)
            assert following is not None
            emitted[*drafts[:num_accepted], following] += drafted * mass
    joint = np.zeros((vocab,) * (depth + 1))
    for text, mass in emitted.items():
        joint[text] += mass * plain_joint(model, text, depth + 1 - len(text))
    return joint


def prefix_model(pairs: Sequence[Pair]) -> Model:
    """A drafter and a target whose distributions depend on the whole prefix."""

    def model(prefix: Text) -> Pair:
        key = len(prefix)
        for token in prefix:
            key = 3 * key + token
        return pairs[key % len(pairs)]

    return model


def check_joint(step: Step, pairs: Sequence[Pair], depth: int) -> None:
    model, vocab = prefix_model(pairs), len(pairs[0][0])
    actual = speculative_joint(step, model, vocab, depth)
    np.testing.assert_allclose(actual, plain_joint(model, (), depth + 1), rtol=0, atol=1e-12)
