"""Closed forms of decoding speed: pure float functions, vectorised over numpy arrays.

A block of m rows is the last committed token (or a draft) and the m - 1 drafts after it, so the
draft length γ of the literature is m - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def paper_speedup(alpha: ArrayLike, layers: ArrayLike, exit_layer: ArrayLike) -> Array:
    """Return ρ* = N / (αE + (1 − α)⌈N/E⌉E), the optimal speedup over plain decoding.

    Source: arXiv 2509.19368, Eq. 7, for ⌈N/E⌉ stages in lockstep, each as slow as E layers. No
    bound where E does not divide N: stages that do not wait for a common tick can beat it.
    """
    a, n, e = floats(alpha, layers, exit_layer)
    return array(n / (a * e + (1 - a) * np.ceil(n / e) * e))


def expected_tokens(alpha: ArrayLike, block: ArrayLike) -> Array:
    """Return (1 − α^m) / (1 − α), the mean tokens that the verdict on a block of m rows commits.

    Source: Leviathan et al. 2023, Eq. 1, whose γ is m − 1. For α independent from row to row.
    """
    a, m = floats(alpha, block)
    with np.errstate(divide="ignore", invalid="ignore"):
        return array(np.where(a < 1, (1 - a**m) / (1 - a), m))


def token_time(
    alpha: ArrayLike,
    block: ArrayLike,
    in_flight: ArrayLike,
    tick: ArrayLike,
    latency: ArrayLike,
    reaction: ArrayLike = 0.0,
) -> Array:
    """Return the mean time per committed token of the schedule (m, w); plain decoding is (1, 1).

    ``tick``: time from one block to the next through the slowest stage; ``latency``: from the
    first row of a block entering stage 0 to its verdict at rank 0, drafting for the next block not
    included; ``reaction``: further delay before a resync enters stage 0 (with w = 1 there is none,
    stage 0 being idle). Any one unit of time.

    A verdict confirms its whole block with probability a = α^m. Then the next verdict follows a
    tick later; after a miss, a latency (and reaction) later. Where w blocks do not fill the round
    trip (wτ < A), each w-th block of a run also waits A − wτ for room, which happens
    a^w / (1 − a^w) times a run. With m = 1 and a full pipeline: ατ + (1 − α)A. The times are taken
    as constant; the model adds no bubbles beyond these.
    """
    a, m, w, tau, whole, wait = floats(alpha, block, in_flight, tick, latency, reaction)
    run = a**m
    period = run**w
    with np.errstate(divide="ignore", invalid="ignore"):
        waits = np.where(run < 1, (1 - run) * period / (1 - period), 1 / w)
    step = run * tau + (1 - run) * (whole + wait) + np.maximum(0, whole - w * tau) * waits
    return array(np.where(w > 1, step, whole) / expected_tokens(a, m))


def floats(*values: ArrayLike) -> tuple[Array, ...]:
    """Return numbers as arrays."""
    return tuple(np.asarray(value, dtype=np.float64) for value in values)


def array(value: object) -> Array:
    """Return an array, also where arithmetic on 0-d arrays gave a number."""
    return np.asarray(value, dtype=np.float64)
