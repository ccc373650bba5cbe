"""Pipelines of oracle stages whose engine decodes in waves, for the contract tests."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from ppsd.engine.sequence import Request
from ppsd.engine.sequence import Sequence as Running
from ppsd.engine.wave_engine import WaveEngine
from ppsd.speculation.policy import Emit, Schedule
from ppsd.types import SamplingParams
from ppsd.worker.inner_head import InnerHead
from tests.support.hash_model import HashHead, all_rows
from tests.support.rig import CONTEXT, VOCAB, Rig


@dataclass
class Asked:
    """A request, and how far it is let go: ``most`` steps of the engine after it began."""

    prompt: Sequence[int]
    params: SamplingParams
    stop: frozenset[int] = frozenset()
    reuse: bool = False
    most: int | None = None
    tokens: list[int] = field(default_factory=list)
    running: Running | None = None


class WaveRig(Rig):
    """A Rig with a WaveEngine; ``heads``: how often the head at the end of a stage is right."""

    def __init__(
        self,
        stages: int,
        rows: int,
        *,
        heads: Mapping[int, float],
        concurrent: int = 1,
        loose: int = 16,
        lookup: bool = True,
        feedback: bool = False,
        costs: Sequence[float] = (),
        **settings,
    ) -> None:
        super().__init__(stages, Schedule(1, stages), concurrent=concurrent, loose=loose, **settings)
        held = {"slots": concurrent, "loose": loose}
        self.heads = {r: HashHead(r, self.vocab, alpha, **held) for r, alpha in heads.items()}
        for rank, head in self.heads.items():
            if rank:
                self.workers[rank - 1]._head = InnerHead(head)
            else:
                self.stage.head = InnerHead(head)
        self.lookup = lookup
        self.stage.drafter = SimpleNamespace(feedback=feedback)
        self.engine = WaveEngine(
            self.stage,
            self.links,
            self.schedule,
            max_context=CONTEXT,
            rows=rows,
            costs=costs,
            loose=loose,
            lookup=lookup,
            opinions=any(self.heads),
            slots=concurrent,
            **self.engine_settings,
        )

    def be_late(self, luck: Callable[[], bool]) -> None:
        """Let answers, and epochs at the workers, be seen only when ``luck`` has it."""
        poll = self.links.poll
        self.links.poll = lambda: poll() if luck() else None
        for worker in self.workers:
            worker._link.epoch = self._late(luck)

    def _late(self, luck: Callable[[], bool]) -> Callable[[int], int]:
        seen = [0] * self.concurrent

        def epoch(slot: int) -> int:
            if luck():
                seen[slot] = self.hub.epochs[slot]
            return seen[slot]

        return epoch

    def pause_all_at_will(self, wills: Sequence[bool]) -> None:
        """Pause or resume every sequence, as ``wills`` say in turn, whenever stage 0 looks up."""
        poll, pattern = self.links.poll, itertools.cycle(wills)

        def willing():
            for running in self.engine._running:
                (running.policy.pause if next(pattern) else running.policy.resume)()
            return poll()

        self.links.poll = willing

    def learn(self, asked: Asked) -> list[int]:
        """Let the heads know what plain decoding says; return it."""
        plain = self.plain(asked.prompt, asked.params, asked.stop)
        rows = all_rows(torch.tensor([*asked.prompt, *plain]), self.stages, self.vocab)
        for rank, head in self.heads.items():
            head.learn([*asked.prompt, *plain], rows[rank], rows[-1])
        return plain

    def answer(self, requests: Sequence[Asked], wait: Callable[[], bool] = lambda: False) -> None:
        """Run requests; each begins once a slot is free and ``wait`` does not put it off."""
        waiting, steps = list(requests), Counter[Running]()
        under_way: dict[Running, Asked] = {}
        while waiting or self.engine.busy:
            while waiting and self.engine.has_room and not (self.engine.busy and wait()):
                asked = waiting.pop(0)
                request = Request(
                    tuple(asked.prompt), asked.params, asked.stop, self.vocab, reuse=asked.reuse
                )
                asked.running = self.engine.add(request)
                under_way[asked.running] = asked
            for sequence, output in self.engine.step():
                under_way[sequence].tokens += output.tokens if isinstance(output, Emit) else ()
            for sequence in list(self.engine._running):
                steps[sequence] += 1
                if steps[sequence] == under_way[sequence].most:
                    self.engine.abort(sequence)

    def check(self, asked: Asked, plain: Sequence[int]) -> None:
        """Compare an answer with plain decoding's, and look for anything left behind."""
        assert asked.running is not None
        reason, policy = asked.running.finish_reason, asked.running.waves
        if reason == "abort":
            assert asked.tokens == plain[: len(asked.tokens)]
        else:
            assert asked.tokens == plain
            assert reason == ("stop" if plain[-1] in asked.stop else "length")
        counts, cells = policy.counts, policy._cells
        assert counts.drafted == counts.judged + counts.discarded
        assert counts.judged == counts.accepted + counts.resyncs
        assert sum(counts.ranks.values()) == sum(counts.levels.values()) == counts.accepted
        assert sorted(cells._loose) == list(range(CONTEXT, CONTEXT + self.loose))
        assert not cells._own
        assert not policy.waves
        if not self.lookup and all(head.alpha == 1.0 for head in self.heads.values()):
            assert counts.resyncs == 0, "a head that is always right has seen all rows"


def cycled(values: Sequence[bool]) -> Callable[[], bool]:
    """Return ``values`` again and again, and True from the start if there are none."""
    return itertools.cycle(values or [True]).__next__


__all__ = ["VOCAB", "Asked", "WaveRig", "cycled"]
