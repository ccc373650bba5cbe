"""Closed forms of the paper beyond those that plans need: pure float functions over arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ppsd.plan.theory import Array, array, expected_tokens, floats

BISECTIONS = 60  # halvings of [0, 1]: more than a double resolves


def paper_alpha(speedup: ArrayLike, layers: ArrayLike, exit_layer: ArrayLike) -> Array:
    """Return the α at which ρ* equals ``speedup``: Eq. 7 solved for α; NaN outside [0, 1]."""
    rho, n, e = floats(speedup, layers, exit_layer)
    miss = np.ceil(n / e) * e
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(miss > e, (miss - n / rho) / (miss - e), np.nan)
    return array(np.where((alpha >= 0) & (alpha <= 1), alpha, np.nan))


def many_stages_limit(alpha: ArrayLike) -> Array:
    """Return 1 / (1 − α), which ρ* tends to as E/N goes to 0, however many stages; inf at α = 1."""
    with np.errstate(divide="ignore"):
        return array(1 / (1 - np.asarray(alpha, dtype=np.float64)))


def draft_then_verify_speedup(
    alpha: ArrayLike,
    block: ArrayLike,
    layers: ArrayLike,
    exit_layer: ArrayLike,
    head: ArrayLike = 0.0,
    row_cost: ArrayLike = 0.0,
    extra: ArrayLike = 0.0,
) -> Array:
    """Return the speedup of early-exit draft-then-verify over plain decoding, in layer times.

    A round runs layers [0, E) once a row, the exit head (``head`` layers) for each of the m − 1
    drafts, and the rest once for the whole block, each further row of which costs ``row_cost`` of
    the first. ``extra``: LM head and hops, in layers, paid once a round and once a plain token.
    The analysis is that of arXiv 2509.19368, section 3, with head, hops and row cost made explicit.
    """
    a, m = floats(alpha, block)
    round_time = _round_time(block, layers, exit_layer, head, row_cost, extra)
    n, fixed = floats(layers, extra)
    return array(expected_tokens(a, m) * (n + fixed) / round_time)


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
    n, fixed = floats(layers, extra)
    needed = _round_time(block, layers, exit_layer, head, row_cost, extra) / (n + fixed)
    return _alpha_for_tokens(needed, block)


def _alpha_for_tokens(tokens: ArrayLike, block: ArrayLike) -> Array:
    """Return the lowest α at which ``expected_tokens`` is ``tokens``; NaN above m."""
    wanted, m = np.broadcast_arrays(*floats(tokens, block))
    low, high = np.zeros_like(wanted), np.ones_like(wanted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = expected_tokens(middle, m) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    found = np.where(wanted <= 1, 0.0, (low + high) / 2)  # one token is always right
    return array(np.where(wanted <= m, found, np.nan))


def _round_time(
    block: ArrayLike,
    layers: ArrayLike,
    exit_layer: ArrayLike,
    head: ArrayLike,
    row_cost: ArrayLike,
    extra: ArrayLike,
) -> Array:
    m, n, e, h, r, x = floats(block, layers, exit_layer, head, row_cost, extra)
    return array(m * e + (m - 1) * h + (n - e) * (1 + (m - 1) * r) + x)
