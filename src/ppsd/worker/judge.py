"""The last stage's voice: hidden rows in, the target's own tokens out.

Used by the last worker, or by rank 0 when there is one stage only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ppsd.errors import NonFiniteError, ProtocolError
from ppsd.model import kernels
from ppsd.model.stage import StageModel
from ppsd.speculation.sampling import Sampler
from ppsd.worker.messages import Begin, Block, Verdict


def require_finite(hidden: torch.Tensor, rank: int, position: int) -> None:
    """Raise NonFiniteError unless a stage's output rows [n, C] at ``position``… are finite."""
    if kernels.all_finite(hidden) or math.isfinite(hidden.sum().item()):
        return
    finite = torch.isfinite(hidden)
    if not finite.all():  # a sum can overflow by itself
        row = int((~finite.all(dim=1)).nonzero()[0])
        raise NonFiniteError(f"stage {rank} computed NaN or infinity at position {position + row}")


class TokenHistory:
    """The tokens fed so far, addressed by position like the key/value cache."""

    def __init__(self, capacity: int) -> None:
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._tokens = torch.from_numpy(self._ids)  # the same memory

    def write(self, position: int, tokens: Sequence[int]) -> None:
        """Put ``tokens`` at ``position``…"""
        self._ids[position : position + len(tokens)] = tokens

    def ids(self, first: int, end: int) -> tuple[int, ...]:
        """Return the tokens at positions from ``first`` to below ``end``."""
        return tuple(self._ids[first:end].tolist())

    def before(self, position: int, first: int = 0) -> torch.Tensor:
        """Return the tokens at positions from ``first`` to below ``position``; a view."""
        return self._tokens[first:position]


class Judge:
    """Samples the target's token for every judged row; randomness is (seed, position) alone."""

    def __init__(self, stage: StageModel, rank: int, max_context: int) -> None:
        self._stage = stage
        self._rank = rank
        self._history = TokenHistory(max_context)
        self._sampler: Sampler | None = None
        self._want_logits = self._want_hidden = False

    def begin(self, begin: Begin) -> None:
        """Sample as the request ``begin`` says from now on."""
        self._sampler = Sampler(
            begin.params, begin.prompt_length, frozenset(begin.stop_ids), begin.vocab_size
        )
        self._want_logits = begin.want_logits
        self._want_hidden = begin.want_hidden

    def verdict(self, block: Block, hidden: torch.Tensor) -> Verdict:
        """Judge the last ``block.judge`` of the rows ``hidden`` [n, C]."""
        if self._sampler is None:
            raise ProtocolError("a block arrived before any request began")
        rows = len(block.tokens)
        self._history.write(block.position, block.tokens)
        first = block.position + rows - block.judge + 1
        judged = hidden if block.judge == rows else hidden[rows - block.judge :]
        logits = self._stage.logits(judged) if block.judge else None
        tokens = () if logits is None else self._tokens(logits, first)
        return Verdict(
            block.slot,
            block.epoch,
            self._rank,
            block.position,
            rows,
            tokens,
            logits if self._want_logits else None,
            judged if self._want_hidden and block.judge else None,
        )

    def _tokens(self, logits: torch.Tensor, first: int) -> tuple[int, ...]:
        """The target's tokens at ``first``…, one for each row of ``logits`` [n, V]."""
        assert self._sampler is not None
        if self._sampler.takes_largest(first):
            found = kernels.largest(logits, self._sampler.vocab_size)
            if found is not None:
                return found
        return tuple(self._choose(row, first + i) for i, row in enumerate(logits))

    def _choose(self, logits: torch.Tensor, position: int) -> int:
        assert self._sampler is not None
        try:
            return self._sampler.choose(logits, self._history.before(position))
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (stage {self._rank}, position {position})") from error
