"""Closed forms of decoding speed: pure float functions, vectorised over numpy arrays.

Used by model.py, reports and the bench. A block of m rows is the last committed token (or a draft)
and the m - 1 drafts after it, so the draft length γ of the literature is m - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BISECTIONS = 60  # halvings of [0, 1]: more than a double resolves


def paper_speedup(alpha: ArrayLike, layers: ArrayLike, exit_layer: ArrayLike) -> Array:
    """ρ* = N / (αE + (1 − α)⌈N/E⌉E), the optimal speedup over plain decoding.

    Source: arXiv 2509.19368, Eq. 7, for ⌈N/E⌉ stages in lockstep, each as slow as E layers. No
    bound where E does not divide N: stages that do not wait for a common tick can beat it.
    """
    a, n, e = _floats(alpha, layers, exit_layer)
    return _array(n / (a * e + (1 - a) * np.ceil(n / e) * e))


def paper_alpha(speedup: ArrayLike, layers: ArrayLike, exit_layer: ArrayLike) -> Array:
    """Return the α at which ρ* equals ``speedup``: Eq. 7 solved for α; NaN outside [0, 1]."""
    rho, n, e = _floats(speedup, layers, exit_layer)
    miss = np.ceil(n / e) * e
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(miss > e, (miss - n / rho) / (miss - e), np.nan)
    return _array(np.where((alpha >= 0) & (alpha <= 1), alpha, np.nan))


def many_stages_limit(alpha: ArrayLike) -> Array:
    """1 / (1 − α): what ρ* tends to as E/N goes to 0, however many stages; inf at α = 1."""
    with np.errstate(divide="ignore"):
        return _array(1 / (1 - np.asarray(alpha, dtype=np.float64)))


def expected_tokens(alpha: ArrayLike, block: ArrayLike) -> Array:
    """(1 − α^m) / (1 − α): mean tokens that the verdict on a block of m rows commits.

    Source: Leviathan et al. 2023, Eq. 1, whose γ is m − 1. For α independent from row to row.
    """
    a, m = _floats(alpha, block)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _array(np.where(a < 1, (1 - a**m) / (1 - a), m))


def token_time(
    alpha: ArrayLike,
    block: ArrayLike,
    in_flight: ArrayLike,
    tick: ArrayLike,
    latency: ArrayLike,
    reaction: ArrayLike = 0.0,
) -> Array:
    """Mean time per committed token of the schedule (m, w); plain decoding is (1, 1).

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
    a, m, w, tau, whole, wait = _floats(alpha, block, in_flight, tick, latency, reaction)
    run = a**m
    period = run**w
    with np.errstate(divide="ignore", invalid="ignore"):
        waits = np.where(run < 1, (1 - run) * period / (1 - period), 1 / w)
    step = run * tau + (1 - run) * (whole + wait) + np.maximum(0, whole - w * tau) * waits
    return _array(np.where(w > 1, step, whole) / expected_tokens(a, m))


def draft_then_verify_speedup(
    alpha: ArrayLike,
    block: ArrayLike,
    layers: ArrayLike,
    exit_layer: ArrayLike,
    head: ArrayLike = 0.0,
    row_cost: ArrayLike = 0.0,
    extra: ArrayLike = 0.0,
) -> Array:
    """Speedup of early-exit draft-then-verify decoding over plain decoding, in layer times.

    A round runs layers [0, E) once a row, the exit head (``head`` layers) for each of the m − 1
    drafts, and the rest once for the whole block, each further row of which costs ``row_cost`` of
    the first. ``extra``: LM head and hops, in layers, paid once a round and once a plain token.
    The analysis is that of arXiv 2509.19368, section 3, with head, hops and row cost made explicit.
    """
    a, m = _floats(alpha, block)
    round_time = _round_time(block, layers, exit_layer, head, row_cost, extra)
    n, fixed = _floats(layers, extra)
    return _array(expected_tokens(a, m) * (n + fixed) / round_time)


def break_even_alpha(
    block: ArrayLike,
    layers: ArrayLike,
    exit_layer: ArrayLike,
    head: ArrayLike = 0.0,
    row_cost: ArrayLike = 0.0,
    extra: ArrayLike = 0.0,
) -> Array:
    """Return the α below which draft-then-verify is slower than plain decoding; NaN if always.

    The arguments are those of ``draft_then_verify_speedup``, whose root this is.
    """
    n, fixed = _floats(layers, extra)
    needed = _round_time(block, layers, exit_layer, head, row_cost, extra) / (n + fixed)
    return alpha_for_tokens(needed, block)


def alpha_for_tokens(tokens: ArrayLike, block: ArrayLike) -> Array:
    """Return the α at which ``expected_tokens`` is ``tokens``; NaN unless 1 ≤ tokens ≤ m."""
    wanted, m = np.broadcast_arrays(*_floats(tokens, block))
    low, high = np.zeros_like(wanted), np.ones_like(wanted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = expected_tokens(middle, m) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return _array(np.where((wanted >= 1) & (wanted <= m), (low + high) / 2, np.nan))


def _round_time(
    block: ArrayLike,
    layers: ArrayLike,
    exit_layer: ArrayLike,
    head: ArrayLike,
    row_cost: ArrayLike,
    extra: ArrayLike,
) -> Array:
    m, n, e, h, r, x = _floats(block, layers, exit_layer, head, row_cost, extra)
    return _array(m * e + (m - 1) * h + (n - e) * (1 + (m - 1) * r) + x)


def _floats(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(value, dtype=np.float64) for value in values)


def _array(value: object) -> Array:
    """Arithmetic on 0-d arrays gives numpy scalars; callers always get an array."""
    return np.asarray(value, dtype=np.float64)
