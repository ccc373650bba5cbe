"""``LLM``: a model running as a pipeline, text in and text out. The Python face of ppsd."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ppsd.config import EngineConfig
from ppsd.engine.answer import Answer, Chunk, Completion
from ppsd.engine.build import Progress, RunningPipeline, check_memory, plan_layout
from ppsd.engine.choose import serves_as
from ppsd.engine.drafter import Drafter
from ppsd.engine.engine import Engine, LogitsSink, Request
from ppsd.engine.prompt import Prompt, encode
from ppsd.engine.sequence import Transcript
from ppsd.engine.stats import RequestStats, stage_stats
from ppsd.engine.thread import EngineThread, Job
from ppsd.engine.trace import TraceLog
from ppsd.errors import ConfigError, PipelineError
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import resolve_model
from ppsd.model.tokenizer import StreamDecoder, Tokenizer
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Schedule, schedule_for
from ppsd.types import SamplingParams

__all__ = ["LLM", "Chunk", "Completion", "Prompt"]


class LLM:
    """A model cut into stages and ready to decode; use as a context manager or ``close`` it.

    ``LLM(model, stages=2, mode="ppsd", …)`` takes the fields of EngineConfig; what they leave open
    is decided by ``plan``, and ``layout.reason`` says how; ``drafts``: whether there is anything to
    draft with. ``progress`` is called with (stage, tensors loaded, tensors in all) while weights
    load, on the thread that loads them. Raises ConfigError, ModelError, InsufficientMemoryError
    before anything runs, RequestError when one request cannot go on, and PipelineError when a stage
    fails; after that the workers are gone, and every request raises the same error.

    An interrupt (KeyboardInterrupt, or what another signal handler raises) ends the request at
    work and no more. A forked child cannot use its parent's LLM. On a rank above 0 that torchrun
    started, making an LLM serves that rank's stage until rank 0 closes its own, and then exits.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        progress: Progress = lambda rank, done, total: None,
        drafter: Drafter | None = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(model=model, **settings)
        if serves_as(self.config) > 0:
            from ppsd.worker.process import serve_rank

            serve_rank(self.config.model, self.config.init_timeout)
            raise SystemExit(0)
        if drafter is not None and self.config.mode == "auto":
            self.config = self.config.replaced(mode="ppsd")
        files = resolve_model(self.config.model)
        self.config, self.layout, source = plan_layout(self.config, files)
        own = self.layout.head is not None or self.config.head == "lookup"
        self.drafts = own or drafter is not None
        self._check_head(self.config)
        self.memory_needed = check_memory(self.config, self.layout, source)
        self.tokenizer = Tokenizer.load(
            files.path, self.config.chat_template, escape_special=self.config.escape_special
        )
        self.layout = replace(self.layout, spec=self.tokenizer.fit(self.layout.spec))
        self.defaults = sampling_defaults(files)
        self.trace = TraceLog()
        running = RunningPipeline(self.config, self.layout, source)
        self._running = running
        self._thread = thread = EngineThread(running.close)
        weakref.finalize(self, thread.close)
        try:
            self._pipeline = thread.call(lambda: running.open(progress, thread.check))
        except BaseException:  # Ctrl-C while loading, too: workers must not stay behind
            thread.close()
            raise
        self._head = self._pipeline.drafter
        if drafter is not None:
            self._pipeline.drafter = drafter
        self._rows: tuple[int, ...] = ()  # tokens whose rows every stage holds
        self._chunked = 0  # how many of them were computed in whole prompt chunks
        self._largest = self.config.schedule  # what buffers and links were sized for
        self._gates: dict[Schedule, Gate] = {}  # what they learn holds on the same workers
        self.use(self.config.mode, self.config.block, self.config.in_flight)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and free everything; may be called twice."""
        self._thread.close()

    @property
    def memory(self) -> list[int]:
        """Bytes that each stage's process uses now; ``memory_needed`` says how many they may."""
        return self._running.memory()

    def draft_with(self, drafter: Drafter | None) -> None:
        """Take the drafts of the next requests from ``drafter``; None: from the exit head again."""

        def change() -> None:
            self._pipeline.drafter = self._head if drafter is None else drafter
            self.drafts = self._pipeline.drafter is not None
            self._gates.clear()  # of other drafts they know nothing

        self._thread.call(change)
        self.use(self.config.mode, self.config.block, self.config.in_flight)

    def use(
        self,
        mode: str,
        block: int | None = None,
        in_flight: int | None = None,
        gate: bool | None = None,
    ) -> None:
        """Decode the next requests in another mode on the same workers; gate None: as before."""
        schedule_for(mode, self.layout.stages, block, in_flight)  # refuses ``auto``
        gate = self.config.gate if gate is None else gate
        config = self.config.replaced(mode=mode, block=block, in_flight=in_flight, gate=gate)
        schedule, largest = config.schedule, self._largest
        if schedule.block > largest.block or schedule.in_flight > max(
            largest.in_flight, self.layout.stages
        ):
            allowed = f"within block {largest.block} and in-flight {largest.in_flight} set at start"
            raise ConfigError("mode", mode, allowed)
        self._check_head(config)

        def change() -> None:
            self.config = config
            self._engine = Engine(
                self._pipeline,
                schedule,
                acceptance=config.acceptance,
                prefill_chunk=config.prefill_chunk,
                gate=self._gate(config),
            )
            self._rows, self._chunked = (), 0  # the head has no rows from plain decoding

        self._thread.call(change)

    def _gate(self, config: EngineConfig) -> Gate | None:
        schedule = config.schedule
        if not (config.gate and schedule.drafts):
            return None
        return self._gates.setdefault(schedule, Gate(schedule))

    def _check_head(self, config: EngineConfig) -> None:
        if config.schedule.drafts and not self.drafts:
            raise ConfigError("mode", config.mode, "autoregressive without anything to draft with")

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> list[Completion]:
        """Return ``params.n`` completions of a text, token ids, or chat messages.

        Without ``params`` the model's own ``defaults`` hold. Sample i has seed ``params.seed + i``.
        ``reuse`` continues from all rows that the last request left (a conversation) instead of
        those only that recomputing would repeat bit for bit. ``max_tokens`` is cut to the context.
        """
        params = params or SamplingParams(**self.defaults.values)
        if params.n > 1 and params.greedy:
            raise ConfigError("n", params.n, "1 at temperature 0, where all samples are equal")
        ids = self.encode(prompt)
        return [self.run(ids, params.sample(i), reuse=reuse) for i in range(params.n)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> Generator[Chunk, None, Completion]:
        """Yield one completion as it grows; the generator's return value is the Completion.

        Closing the generator ends the request; rows of what it yielded can be reused.
        """
        params = params or SamplingParams(**self.defaults.values)
        if params.n > 1:
            raise ConfigError("n", params.n, "1 in a stream")
        ids = self.encode(prompt)
        job: Job[Completion] = Job(lambda job: self._complete(job, ids, params, reuse))
        return (yield from self._thread.stream(job))

    def run(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse: bool = False,
        logits: LogitsSink | None = None,
    ) -> Completion:
        """Complete token ids; ``logits`` receives the target's logits (see engine.Request)."""
        job: Job[Completion] = Job(
            lambda job: self._complete(job, ids, params, reuse, logits, silent=True)
        )
        return self._thread.result(job)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, checked."""
        layout = self.layout
        return encode(prompt, self.tokenizer, layout.spec.num_tokens, layout.max_context)

    def _complete(
        self,
        job: Job[Completion],
        ids: Sequence[int],
        params: SamplingParams,
        reuse: bool,
        logits: LogitsSink | None = None,
        *,
        silent: bool = False,
    ) -> Completion:
        """Do a request on the engine's thread; put its chunks unless ``silent``."""
        request = self._request(ids, params, reuse, logits)
        transcript = Transcript(
            StreamDecoder(self.tokenizer), params.stop, request.params.min_tokens
        )
        answer = Answer(transcript)
        try:
            with closing(self._engine.decode(request, lambda: job.cancelled)) as emits:
                for emit in emits:
                    chunk = answer.take(emit)
                    if transcript.stopped:
                        self._engine.stop("stop")
                    if not silent:
                        job.put(chunk)
        except PipelineError:
            raise
        except BaseException:  # of this request alone: the next finds everything in order
            self._settle(request, answer)
            raise
        end = time.monotonic()
        if (rest := transcript.finish()) and not silent:
            job.put(Chunk(tuple(rest)))
        stats = self._settle(request, answer, end)
        return Completion(
            text=transcript.text,
            token_ids=tuple(answer.token_ids),
            accepted=tuple(answer.accepted),
            finish_reason="stop" if transcript.stopped else self._engine.finish_reason,
            stats=stats,
        )

    def _request(
        self, ids: Sequence[int], params: SamplingParams, reuse: bool, logits: LogitsSink | None
    ) -> Request:
        """Shape a request, with rows of the last one that may be taken over."""
        room = self.layout.max_context - len(ids)
        limited = min(params.max_tokens, room)
        least = min(params.min_tokens, limited)
        params = replace(params, max_tokens=limited, min_tokens=least, n=1)
        eos = () if params.ignore_eos else self.layout.spec.eos_ids
        cached = min(_common_prefix(self._rows, ids), len(ids) - 1)
        if not reuse:
            chunk = self.config.prefill_chunk
            cached = min(cached, self._chunked) // chunk * chunk
        self._rows = self._rows[:cached]
        self._chunked = min(self._chunked, cached)
        return Request(
            prompt=tuple(ids),
            params=params,
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            vocab_size=self.layout.spec.num_tokens,
            cached=cached,
            logits=logits,
        )

    def _settle(self, request: Request, answer: Answer, end: float | None = None) -> RequestStats:
        """After a request, also one left early: note what the stages hold, collect reports."""
        if answer.token_ids:
            self._remember(request, answer.token_ids)
        reports = self._pipeline.report()
        end = end or time.monotonic()
        switches = None if self._engine.gate is None else self._engine.gate.switches
        self.trace.add(reports, switches.pauses_until(end) if switches else [])
        first = answer.first or end
        return RequestStats(
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached,
            new_tokens=len(answer.token_ids),
            counts=self._engine.policy.counts,
            prefill_seconds=first - answer.start,
            decode_seconds=end - first,
            stages=stage_stats(reports, self.layout.bounds, end - answer.start),
            gate=switches,
        )

    def _remember(self, request: Request, tokens: Sequence[int]) -> None:
        """Note which rows all stages hold now: every committed token but the last was fed."""
        if self._chunked == request.cached:
            chunk = self.config.prefill_chunk
            self._chunked = len(request.prompt) // chunk * chunk
        self._rows = (*request.prompt, *tokens)[: len(request.prompt) + len(tokens) - 1]

    def write_trace(self, path: Path) -> None:
        """Write the Chrome trace of all requests so far (needs ``trace=True``)."""
        self.trace.write(path, self.layout.bounds)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def collect_logits() -> tuple[LogitsSink, dict[int, torch.Tensor]]:
    """A sink and the dictionary it fills: the final target logits by position."""
    rows: dict[int, torch.Tensor] = {}
    return rows.__setitem__, rows
