"""Candidate trees on virtual clocks: heads whose right candidate has a chosen rank.

The engine of waves and the stage loop are the real ones; see virtual.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppsd.engine.first_stage import FirstStage
from ppsd.engine.wave_engine import WaveEngine
from ppsd.lab.clocks import nanoseconds
from ppsd.lab.simulator import Simulated, decoded
from ppsd.lab.virtual import (
    HEAD,
    RIGHT,
    VirtualDrafter,
    VirtualJudge,
    VirtualLink,
    VirtualLinks,
    VirtualPipeline,
    VirtualStage,
)
from ppsd.plan.model import CostModel
from ppsd.plan.waves import shares
from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.masks import Mask
from ppsd.speculation.policy import Schedule
from ppsd.speculation.tree import CANDIDATES
from ppsd.speculation.waves import Row
from ppsd.worker.loop import Worker
from ppsd.worker.messages import Begin, Block
from ppsd.worker.wave_messages import Opinion

VOCABULARY = 64
MISSED = CANDIDATES  # the rank of a right token that is no candidate


def ranks(alpha: float, tokens: int, seed: int = 0) -> bytes:
    """Return for each position at which rank a head has the right token, MISSED for none.

    Its first candidate is right with probability ``alpha``; see plan.waves.shares.
    """
    limits = np.cumsum(shares(alpha))
    draws = np.random.default_rng(seed).random(tokens)
    return np.searchsorted(limits, draws, side="right").astype(np.uint8).tobytes()


class VirtualHead:
    """A head that takes time and has the right token at the rank that ``found`` says.

    Its probabilities are those ranks' frequencies, so they are calibrated.
    """

    def __init__(
        self, pipeline: VirtualPipeline, rank: int, found: bytes, first: int, seconds: float
    ) -> None:
        self._pipeline = pipeline
        self._clock = pipeline.clocks[rank]
        self._found = found
        self._first = first
        self._time = nanoseconds(seconds)
        counted = np.bincount(np.frombuffer(found, np.uint8), minlength=CANDIDATES + 1)
        chances = torch.from_numpy(counted[:CANDIDATES] / max(1, len(found))).float()
        self._numbers = torch.cat([chances, torch.zeros(len(LENGTHS))])

    def begin(self, begin: Begin) -> None:
        """Need nothing."""

    def share(self, source: int, slot: int, length: int) -> None:
        """Need nothing."""

    def commit(self, slot: int, length: int, moves: Sequence[tuple[int, int]]) -> None:
        """Need nothing."""

    def lag(self, rows: Sequence[Row], hidden: torch.Tensor) -> None:
        """Take no time: a few rows cost as much as one, when they are run at last."""

    def observe(self, rank: int, block: Block, hidden: torch.Tensor) -> Opinion | None:
        if not block.judge:
            return None
        end = block.position + len(block.tokens)
        return self._say(rank, [(block.slot, block.epoch)], [end])

    def opinion(
        self,
        rank: int,
        rows: Sequence[Row],
        hidden: torch.Tensor,
        verified: torch.Tensor | None = None,
        masks: Sequence[Mask] = (),
    ) -> Opinion:
        nodes = [(row.slot, row.node) for row in rows]
        return self._say(rank, nodes, [row.position + 1 for row in rows])

    def _say(self, rank: int, nodes: list[tuple[int, int]], places: list[int]) -> Opinion:
        self._clock.now += self._pipeline.jittered(self._time, HEAD, places[0])
        tokens = tuple(self._candidates(place) for place in places)
        numbers = self._numbers.expand(len(nodes), -1)
        return Opinion(rank, tuple(nodes), tokens, numbers)

    def _candidates(self, position: int) -> tuple[int, ...]:
        """Return tokens among which RIGHT has its rank, and the others are the position's own."""
        at = position - self._first
        rank = self._found[at] if at < len(self._found) else MISSED
        wrong = [1 + (position * CANDIDATES + i) % (VOCABULARY - 1) for i in range(CANDIDATES)]
        return tuple(RIGHT if i == rank else token for i, token in enumerate(wrong))


@dataclass(frozen=True)
class Boundary:
    """A head behind a later stage: the rank of the right token by position, and its seconds."""

    found: bytes
    seconds: float


def simulate_waves(
    cost: CostModel,
    rows: int,
    found: bytes,
    *,
    inner: Mapping[int, Boundary] | None = None,
    prompt_tokens: int = 1,
    jitter: float = 0.0,
    seed: int = 0,
    trace: bool = False,
) -> Simulated:
    """Decode one request of ``len(found)`` tokens by waves of at most ``rows`` rows.

    ``found``: see ``ranks``; ``inner``: heads on later boundaries, by stage.
    """
    pipeline = VirtualPipeline(cost, jitter=jitter, seed=seed, trace=trace)
    context = prompt_tokens + len(found) + 1
    head = VirtualHead(pipeline, 0, found, prompt_tokens, cost.head)
    drafter = VirtualDrafter(pipeline, b"", prompt_tokens)  # for waves the head speaks
    stage = FirstStage(VirtualStage(pipeline, 0), drafter, pipeline.recorders[0], head)
    judge = VirtualJudge(pipeline, context)
    for rank in range(1, cost.size):
        link, recorder = VirtualLink(pipeline, rank), pipeline.recorders[rank]
        later = (inner or {}).get(rank)
        speaks = None
        if later is not None:
            speaks = VirtualHead(pipeline, rank, later.found, prompt_tokens, later.seconds)
        last = judge if rank == cost.size - 1 else None
        stages = VirtualStage(pipeline, rank)
        pipeline.workers.append(Worker(rank, stages, link, last, recorder, speaks))
    engine = WaveEngine(
        stage,
        VirtualLinks(pipeline),
        Schedule(1, cost.size),
        max_context=context,
        rows=rows,
        loose=rows * cost.size,
        lookup=False,
        opinions=bool(inner),
    )
    return decoded(engine, pipeline, prompt_tokens, len(found), VOCABULARY)
