"""Pipelines of oracle stages inside one process, for the contract tests."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch

from ppsd.engine.drafter import Drafter, DraftState, Given
from ppsd.engine.engine import Engine
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.links import Links, OwnLinks, StageLinks
from ppsd.engine.sequence import Request
from ppsd.lab.oracle import OracleDrafter
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Emit, Schedule
from ppsd.transport.base import Geometry
from ppsd.transport.inprocess import InProcessHub
from ppsd.types import SamplingParams
from ppsd.worker.frame import frame_bytes
from ppsd.worker.judge import Judge
from ppsd.worker.link import TransportLink
from ppsd.worker.loop import Worker
from ppsd.worker.recorder import Recorder
from tests.support.hash_model import PADDING, WIDTH, HashStage, last_rows, plain_decode

CONTEXT = 96
VOCAB = 8


class Witness(OracleDrafter):
    """An oracle that asks for verified rows, and looks at what it gets.

    ``seen``: the newest verified position, -1 for none, by the tokens that a draft followed.
    """

    feedback = True
    stages = 1

    def draft(self, state: DraftState, given: Given) -> int:
        newest = -1
        if given.verified is not None:
            rows = last_rows(given.history, self.stages, self._vocab)
            newest = max(p for p, row in enumerate(rows) if torch.equal(row, given.verified[0]))
        assert self.seen.setdefault(tuple(given.history.tolist()), newest) == newest
        return super().draft(state, given)

    @functools.cached_property
    def seen(self) -> dict[tuple[int, ...], int]:
        return {}


class Rig:
    """``stages`` oracle stages, an engine on top, and which worker moves when.

    ``order`` is asked for the rank to step next whenever the engine waits or polls; None lets
    every worker go as far as it can.
    """

    def __init__(
        self,
        stages: int,
        schedule: Schedule,
        *,
        acceptance: str = "coupled",
        chunk: int = 4,
        vocab: int = VOCAB,
        frames: int = 64,
        gate: Gate | None = None,
        concurrent: int = 1,
        loose: int = 0,
    ) -> None:
        self.stages, self.vocab = stages, vocab
        self.concurrent, self.loose = concurrent, loose
        size = frame_bytes(max(chunk, schedule.block), WIDTH + vocab + PADDING, torch.float32)
        self.hub = InProcessHub(Geometry(stages, size, size, frames, concurrent))
        held = {"slots": concurrent, "loose": loose}
        self.models = [HashStage(rank, stages, vocab, **held) for rank in range(stages)]
        self.workers = [self._worker(rank) for rank in range(1, stages)]
        self.order: Callable[[], int | None] = lambda: None
        self.hub.on_idle = self.step
        recorder = Recorder()
        self.stage = FirstStage(self.models[0], None, recorder)
        self.links: Links = (
            OwnLinks(Judge(self.models[0], 0, CONTEXT), recorder)
            if stages == 1
            else StageLinks(self.hub.endpoint(0), timeout=5.0, slots=concurrent)
        )
        self.engine_settings = {"acceptance": acceptance, "prefill_chunk": chunk, "gate": gate}
        self.schedule = schedule

    def _worker(self, rank: int) -> Worker:
        model = self.models[rank]
        judge = Judge(model, rank, CONTEXT, self.concurrent) if model.is_last else None
        return Worker(rank, model, TransportLink(self.hub.endpoint(rank), 5.0), judge)

    def step(self) -> bool:
        """Let one worker, or all in turn, handle one message."""
        rank = self.order()
        if rank is not None and self.workers[rank - 1].step(0.0):
            return True
        return any(worker.step(0.0) for worker in self.workers)

    def move_while_stage_0_computes(self, turns: Sequence[int]) -> None:
        """Step workers in the order of ``turns`` before stage 0 looks whether to go on.

        A 0 hands back to stage 0; several turns before it make verdicts queue up.
        """
        pattern = itertools.cycle(turns)

        def stepping() -> None:
            for rank in itertools.takewhile(bool, itertools.islice(pattern, 6)):
                self.workers[rank - 1].step(0.0)

        self.links.watch().look = stepping

    def pause_at_will(self, wills: Sequence[bool]) -> None:
        """Pause or resume the policy, as ``wills`` say in turn, whenever stage 0 looks up.

        That is between its layers, after they are done, and before it drafts.
        """
        poll = self.links.poll
        pattern = itertools.cycle(wills)

        def willing():
            policy = self.sequence.policy
            (policy.pause if next(pattern) else policy.resume)()
            return poll()

        self.links.poll = willing

    def decode(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: frozenset[int] = frozenset(),
        *,
        alpha: float = 0.6,
        reuse: bool = False,
        drafter: Drafter | None = None,
        most: int = CONTEXT,
    ) -> list[int]:
        """Run one request; the drafter knows the truth and is right with probability alpha.

        It is left early once it has said ``most`` tokens.
        """
        if self.schedule.drafts and drafter is None:
            truth = [*prompt, *self.plain(prompt, params, stop)]
            drafter = Witness(truth, alpha, self.vocab)
            drafter.stages = self.stages
        self.stage.drafter = drafter
        if not hasattr(self, "engine"):
            self.engine = Engine(
                self.stage,
                self.links,
                self.schedule,
                max_context=CONTEXT,
                **self.engine_settings,
            )
        self.engine.stage.drafting = self.schedule.drafts
        request = Request(tuple(prompt), params, stop, self.vocab, reuse=reuse)
        self.sequence = self.engine.add(request)
        tokens: list[int] = []
        while self.engine.busy and len(tokens) < most:
            for _, output in self.engine.step():
                tokens += output.tokens if isinstance(output, Emit) else ()
                self.output = output
        self.engine.abort(self.sequence)
        return tokens

    def plain(
        self, prompt: Sequence[int], params: SamplingParams, stop: frozenset[int]
    ) -> list[int]:
        return plain_decode(prompt, params, stop, self.stages, self.vocab)
