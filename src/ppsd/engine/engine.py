"""The engine: events go to the policy, its commands go to the pipeline. One request at a time.

Used by llm.py and by tests; knows token ids only, no text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from ppsd.engine.pipeline import Pipeline, judged
from ppsd.speculation.accept import draw_target
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Command, Emit, Event, Feed, Finish, Policy, Schedule
from ppsd.speculation.sampling import Sampler, Stream, uniform
from ppsd.types import SamplingParams
from ppsd.worker.messages import Begin, Verdict

ACCEPTANCES = ("coupled", "rejection")

LogitsSink = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Request:
    """One request in token ids.

    ``cached``: rows of the prompt to take over from the request before. ``logits``, when given,
    receives (position, target logits [V]) of every judged row; a position may come again, and the
    last call for it is the one that counts.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    vocab_size: int
    cached: int = 0
    logits: LogitsSink | None = None


class Engine:
    """Decodes requests under one schedule; ``step`` is the whole loop.

    ``gate`` pauses speculation while it does not pay; without one it is never paused.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        *,
        acceptance: str = "coupled",
        prefill_chunk: int = 128,
        gate: Gate | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.schedule = schedule
        self.rejection = acceptance == "rejection"
        pipeline.draft_stream = Stream.DRAFT if self.rejection else Stream.TARGET
        pipeline.drafting = schedule.drafts and pipeline.drafter is not None
        self.prefill_chunk = prefill_chunk
        self.gate = gate
        self._commands: deque[Command] = deque()

    def decode(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Emit, None, None]:
        """Yield committed tokens as they become final; ``policy`` tells the rest afterwards.

        Closing the iterator early, ``stop``, or ``cancelled`` once it says so, ends the request
        and frees the pipeline.
        """
        self._start(request)
        try:
            while not (self.policy.finished and not self._commands) and not cancelled():
                emit = self.step()
                if emit is not None:
                    yield emit
        finally:
            self.stop("abort")
            self._commands.clear()
            self.pipeline.publish(self.policy.epoch)

    def stop(self, reason: str) -> None:
        """End the current request with ``reason``; what is not yet emitted is dropped."""
        finishing = self.policy.stop(reason)
        if finishing:
            self._commands.clear()
            self._commands.extend(finishing)

    def step(self) -> Emit | None:
        """Carry out one command, or wait for one answer when there is nothing to do."""
        if not self._commands:
            self._take(self.pipeline.wait())
            return None
        command = self._commands.popleft()
        if isinstance(command, Emit):
            return command
        if isinstance(command, Finish):
            self.finish_reason = command.reason
        else:
            self._feed(command)
        return None

    def _start(self, request: Request) -> None:
        self._request = request
        self.finish_reason = "abort"
        self.policy = Policy(
            self.schedule,
            max_tokens=request.params.max_tokens,
            stop_ids=request.stop_ids,
            epoch=self.pipeline.epoch,
            prefill_chunk=self.prefill_chunk,
            prefill_in_flight=self.pipeline.size,
        )
        stop_ids = tuple(sorted(request.stop_ids))
        wanted = self.rejection or request.logits is not None
        prompt_length = len(request.prompt)
        begin = Begin(
            0,
            request.params,
            prompt_length,
            stop_ids,
            request.vocab_size,
            want_logits=wanted,
            want_hidden=self.pipeline.wants_last_rows,
        )
        self._sampler = Sampler(request.params, prompt_length, request.stop_ids, request.vocab_size)
        self.pipeline.publish(self.policy.epoch)
        self.pipeline.begin(begin)
        self._commands.clear()
        if self.gate is not None:
            self.gate.begin(self.policy, time.monotonic())
        self._commands.extend(self.policy.start(request.prompt, request.cached))

    def _feed(self, feed: Feed) -> None:
        if feed.epoch != self.policy.epoch:
            return
        drafted = self.pipeline.feed(feed, lambda: self._interrupted(feed.epoch))
        if drafted is not None:
            self._on(drafted)

    def _interrupted(self, epoch: int) -> bool:
        """Take verdicts that came meanwhile; whether they made work of ``epoch`` pointless."""
        while (verdict := self.pipeline.poll()) is not None:
            self._take(verdict)
        return self.policy.epoch != epoch

    def _take(self, verdict: Verdict) -> None:
        if verdict.epoch != self.policy.epoch:
            return
        self.pipeline.keep(verdict)
        if self._request.logits is not None and verdict.logits is not None:
            first = verdict.position + verdict.rows - verdict.logits.shape[0] + 1
            for i, row in enumerate(verdict.logits):
                self._request.logits(first + i, row)
        self._on(judged(verdict, self._targets(verdict)))
        if self.gate is not None:
            self.gate.watch(self.policy, time.monotonic())

    def _on(self, event: Event) -> None:
        self._commands.extend(self.policy.on(event))
        if self.policy.epoch > self.pipeline.epoch:
            self.pipeline.publish(self.policy.epoch)

    def _targets(self, verdict: Verdict) -> tuple[int, ...]:
        """The target's tokens; under ``rejection`` drawn here, coupled to the waiting drafts."""
        if not self.rejection or verdict.logits is None:
            return verdict.tokens
        tokens = list(verdict.tokens)
        first = verdict.position + verdict.rows - len(tokens) + 1
        for i, logits in enumerate(verdict.logits):
            draft = self.policy.draft_at(first + i)
            if draft is not None:
                tokens[i] = self._draw(first + i, draft, logits)
        return tuple(tokens)

    def _draw(self, position: int, draft: int, logits: torch.Tensor) -> int:
        assert self.pipeline.drafter is not None
        seed = self._request.params.seed
        return draw_target(
            draft,
            self.pipeline.drafter.probabilities(position),
            self._sampler.probabilities(logits, self.pipeline.history(position)),
            uniform(seed, position, Stream.ACCEPT),
            uniform(seed, position, Stream.RESIDUAL),
        )
