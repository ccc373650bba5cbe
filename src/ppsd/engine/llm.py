"""``LLM``: a model running as a pipeline, text in and text out. The Python face of ppsd."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ppsd.config import EngineConfig
from ppsd.engine.build import Progress, RunningPipeline, check_memory, plan_layout
from ppsd.engine.drafter import Drafter
from ppsd.engine.engine import Engine, LogitsSink, Request
from ppsd.engine.sequence import Piece, Transcript
from ppsd.engine.stats import RequestStats, stage_stats
from ppsd.engine.trace import TraceLog
from ppsd.errors import ConfigError, PipelineError, PpsdError
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import resolve_model
from ppsd.model.tokenizer import StreamDecoder, Tokenizer
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Emit, Schedule, schedule_for
from ppsd.types import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Chunk:
    """A step of a streamed completion: tokens now final, and the text they release.

    ``accepted[i]`` says whether token i was an accepted draft. ``pieces`` is the text cut by the
    tokens it comes from, which may be earlier ones: text lags behind the tokens while a character
    or a stop string is incomplete.
    """

    pieces: tuple[Piece, ...]
    token_ids: tuple[int, ...] = ()
    accepted: tuple[bool, ...] = ()

    @property
    def text(self) -> str:
        """The released text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Completion:
    """A finished completion; ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    token_ids: tuple[int, ...]
    accepted: tuple[bool, ...]
    finish_reason: str
    stats: RequestStats


@dataclass
class _Answer:
    """A completion while it grows; times in seconds of the monotonic clock."""

    transcript: Transcript
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    first: float | None = None

    def take(self, emit: Emit) -> Chunk:
        """Add tokens until a stop string is complete; what comes after it is dropped."""
        self.first = self.first or time.monotonic()
        pieces: list[Piece] = []
        taken = 0
        for token in emit.tokens:
            pieces += self.transcript.push(token, taken < emit.accepted)
            taken += 1
            if self.transcript.stopped:
                break
        accepted = tuple(i < emit.accepted for i in range(taken))
        chunk = Chunk(tuple(pieces), emit.tokens[:taken], accepted)
        self.token_ids += chunk.token_ids
        self.accepted += chunk.accepted
        return chunk


class LLM:
    """A model cut into stages and ready to decode; use as a context manager or ``close`` it.

    ``LLM(model, stages=2, mode="ppsd", …)`` takes the fields of EngineConfig; what they leave open
    is decided by ``plan``, and ``layout.reason`` says how; ``drafts``: whether there is anything to
    draft with. ``progress`` is called with (stage, tensors loaded, tensors in all) while weights
    load. Raises ConfigError, ModelError, InsufficientMemoryError before anything runs, and
    PipelineError when a stage fails; after that the workers are gone, and every request raises the
    same error.
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
        if drafter is not None and self.config.mode == "auto":
            self.config = self.config.replaced(mode="ppsd")
        files = resolve_model(model)
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
        self._running = RunningPipeline(self.config, self.layout, source)
        self._finalizer = weakref.finalize(self, self._running.close)
        self._pipeline = self._running.open(progress)
        self._head = self._pipeline.drafter
        if drafter is not None:
            self._pipeline.drafter = drafter
        self._rows: tuple[int, ...] = ()  # tokens whose rows every stage holds
        self._chunked = 0  # how many of them were computed in whole prompt chunks
        self._broken: PipelineError | None = None
        self._largest = self.config.schedule  # what buffers and links were sized for
        self._busy = False
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
        self._broken = self._broken or PipelineError("this LLM is closed")
        self._finalizer()

    @property
    def memory(self) -> list[int]:
        """Bytes that each stage's process uses now; ``memory_needed`` says how many they may."""
        return self._running.memory()

    def draft_with(self, drafter: Drafter | None) -> None:
        """Take the drafts of the next requests from ``drafter``; None: from the exit head again."""
        self._check_idle()
        self._pipeline.drafter = self._head if drafter is None else drafter
        self.drafts = self._pipeline.drafter is not None
        self._gates.clear()  # of other drafts they know nothing
        self.use(self.config.mode, self.config.block, self.config.in_flight)

    def use(
        self,
        mode: str,
        block: int | None = None,
        in_flight: int | None = None,
        gate: bool | None = None,
    ) -> None:
        """Decode the next requests in another mode on the same workers; gate None: as before."""
        self._check_idle()
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
        self.config = config
        self._engine = Engine(
            self._pipeline,
            schedule,
            acceptance=config.acceptance,
            prefill_chunk=config.prefill_chunk,
            gate=self._gate(config),
        )
        self._rows, self._chunked = (), 0  # the head has no rows from plain decoding

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
        one = [replace(params, n=1, seed=params.seed + i) for i in range(params.n)]
        return [self.run(ids, each, reuse=reuse) for each in one]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> Generator[Chunk, None, Completion]:
        """Yield one completion as it grows; the generator's return value is the Completion.

        Closing the generator ends the request; rows of what it yielded can be reused.
        """
        params = params or SamplingParams(**self.defaults.values)
        if params.n > 1:
            raise ConfigError("n", params.n, "1 in a stream")
        return (yield from self._stream(self.encode(prompt), params, reuse))

    def run(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse: bool = False,
        logits: LogitsSink | None = None,
    ) -> Completion:
        """Complete token ids; ``logits`` receives the target's logits (see engine.Request)."""
        stream = self._stream(ids, params, reuse, logits)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                completion: Completion = end.value
                return completion

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as it is, ids checked, messages by the chat template."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif not isinstance(prompt, Sequence):
            raise ConfigError("prompt", prompt, "a text, token ids or chat messages")
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat([_checked_message(m) for m in prompt])
        else:
            ids = [self._checked_id(token) for token in prompt]
        limit = self.layout.max_context
        if not 0 < len(ids) < limit:
            allowed = f"of 1 to {limit - 1} tokens (the context holds {limit})"
            raise ConfigError("prompt", f"{len(ids)} tokens", allowed)
        return ids

    def _checked_id(self, token: object) -> int:
        size = self.layout.spec.num_tokens
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise ConfigError("prompt token id", token, f"an integer in [0, {size - 1}]")
        return token

    def _stream(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        reuse: bool,
        logits: LogitsSink | None = None,
    ) -> Generator[Chunk, None, Completion]:
        with self._working():
            request = self._request(ids, params, reuse, logits)
            decoder = StreamDecoder(self.tokenizer)
            transcript = Transcript(decoder, params.stop, request.params.min_tokens)
            answer = _Answer(transcript)
            try:
                yield from self._chunks(request, answer)
            except GeneratorExit:
                if self._finalizer.alive:
                    self._settle(request, answer)
                raise
            end = time.monotonic()
            if rest := transcript.finish():
                yield Chunk(tuple(rest))
            stats = self._settle(request, answer, end)
        return Completion(
            text=transcript.text,
            token_ids=tuple(answer.token_ids),
            accepted=tuple(answer.accepted),
            finish_reason="stop" if transcript.stopped else self._engine.finish_reason,
            stats=stats,
        )

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the pipeline for one request; once broken it stays broken."""
        if self._broken is not None:
            raise self._broken
        self._check_idle()
        self._busy = True
        try:
            yield
        except PipelineError as error:
            self._broken = error
            self.close()
            raise
        finally:
            self._busy = False

    def _check_idle(self) -> None:
        if self._busy:
            raise PpsdError("this LLM is at work on another request; finish or close its stream")

    def _chunks(self, request: Request, answer: _Answer) -> Iterator[Chunk]:
        with closing(self._engine.decode(request)) as emits:
            for emit in emits:
                chunk = answer.take(emit)
                if answer.transcript.stopped:
                    self._engine.stop("stop")
                yield chunk

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

    def _settle(self, request: Request, answer: _Answer, end: float | None = None) -> RequestStats:
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


def _checked_message(message: object) -> dict[str, str]:
    if not isinstance(message, Mapping) or not all(isinstance(v, str) for v in message.values()):
        raise ConfigError("message", message, "a mapping such as {'role': 'user', 'content': …}")
    return dict(message)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def collect_logits() -> tuple[LogitsSink, dict[int, torch.Tensor]]:
    """A sink and the dictionary it fills: the final target logits by position."""
    rows: dict[int, torch.Tensor] = {}
    return rows.__setitem__, rows
