"""Pipelines of oracle stages whose engine decodes in waves, for the contract tests."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        super().__init__(
            stages, Schedule(1, stages), concurrent=concurrent, loose=loose, **settings
        )
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
            worker._link.epoch = self._late(luck, worker._link.epoch)

    def _late(self, luck: Callable[[], bool], newest: Callable[[int], int]) -> Callable[[int], int]:
        seen = [0] * self.concurrent

        def epoch(slot: int) -> int:
            if luck():
                seen[slot] = newest(slot)
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
            head.learn(len(asked.prompt), [*asked.prompt, *plain], rows[rank], rows[-1])
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
        heads = self.heads.values()
        if not self.lookup and all(head.alpha == 1.0 and not head.torn for head in heads):
            assert counts.resyncs == 0, "a head that is always right has seen all rows"


def cycled(values: Sequence[bool]) -> Callable[[], bool]:
    """Return ``values`` again and again, and True from the start if there are none."""
    return itertools.cycle(values or [True]).__next__


def check_at_random(seed: int, timeout: float = 2.0) -> None:
    """Ask a few things of a random pipeline, in a random order of work, and check the answers."""
    luck = random.Random(seed)
    stages, concurrent = luck.randint(2, 4), luck.randint(1, 3)
    alphas = [0.5, 0.8, 1.0]
    rig = WaveRig(
        stages,
        luck.choice([1, 4, 8, 16]),
        heads={rank: luck.choice(alphas) for rank in range(stages - 1) if luck.random() < 0.8},
        concurrent=concurrent,
        loose=luck.choice([3, 12]),
        chunk=luck.randint(1, 5),
        lookup=luck.random() < 0.4,
    )
    rig.links._timeout = timeout
    turns = [luck.randrange(stages) for _ in range(luck.randint(1, 12))]
    moves = itertools.cycle(turns)
    rig.order = lambda: next(moves) or None
    rig.move_while_stage_0_computes(turns)
    rig.be_late(cycled([luck.random() < 0.6 for _ in range(9)] + [True]))
    if luck.random() < 0.3:
        rig.pause_all_at_will([luck.random() < 0.3 for _ in range(9)])
    requests = [_request_at_random(luck) for _ in range(concurrent + 1)]
    for _ in range(2):  # the second time as next turns of the same conversations
        plain = [rig.learn(asked) for asked in requests]
        rig.answer(requests)
        for asked, tokens in zip(requests, plain, strict=True):
            rig.check(asked, tokens)
        requests = [
            replace(a, prompt=[*a.prompt, *a.tokens, 7], reuse=True, tokens=[]) for a in requests
        ]


def _request_at_random(luck: random.Random) -> Asked:
    prompt = [1, 2, 5, 0, 3, 4][: luck.choice([0, 6])]
    prompt += [luck.randrange(VOCAB) for _ in range(luck.randint(1, 5))]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.6} if luck.random() < 0.5 else {}
    params = SamplingParams(
        temperature=luck.choice([0.0, 0.7, 1.5]), seed=luck.randrange(9), max_tokens=14, **penalties
    )
    stop = frozenset(luck.choice([(), (), (3,)]))
    most = luck.choice([None, None, luck.randint(5, 50)])
    return Asked(prompt, params, stop, most=most)
