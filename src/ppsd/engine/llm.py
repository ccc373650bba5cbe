"""``LLM``: a model running as a pipeline, text in and text out. The Python face of ppsd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from ppsd import checks
from ppsd.config import EngineConfig
from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.build import Progress, RunningPipeline
from ppsd.engine.choose import serves_as
from ppsd.engine.drafter import Drafter
from ppsd.engine.engine import Engine
from ppsd.engine.events import Event
from ppsd.engine.grammar import Grammar, Grammars
from ppsd.engine.layout import check_memory, plan_layout
from ppsd.engine.logprobs import Logprobs
from ppsd.engine.prompt import Prompt, check_ids, encode, is_chat, several
from ppsd.engine.sequence import LogitsSink, Request
from ppsd.engine.stats import Totals
from ppsd.engine.text_engine import TextEngine, Ticket
from ppsd.engine.thread import EngineThread, apart
from ppsd.engine.wave_engine import WaveEngine
from ppsd.errors import ConfigError, PipelineError
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import resolve_model
from ppsd.model.tokenizer import StreamDecoder, Tokenizer
from ppsd.speculation.gate import Gate
from ppsd.speculation.policy import Schedule, schedule_for
from ppsd.types import SamplingParams
from ppsd.worker.scores import MAX_TOP

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
        pipeline: type[RunningPipeline] = RunningPipeline,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(model=model, **settings)
        self.config.check_use()
        if serves_as(self.config) > 0:
            from ppsd.worker.process import serve_rank

            serve_rank(self.config.model, self.config.init_timeout)
            raise SystemExit(0)
        if drafter is not None and self.config.mode == "auto":
            self.config = self.config.replaced(mode="ppsd")
        files = resolve_model(self.config.model)
        self.config, self.layout, source = apart(lambda: plan_layout(self.config, files))
        own = self.layout.head is not None or self.config.head == "lookup"
        self.drafts = own or drafter is not None
        self._check_head(self.config)
        self.memory_needed = check_memory(self.config, self.layout, source)
        self.tokenizer = Tokenizer.load(
            files.path, self.config.chat_template, escape_special=self.config.escape_special
        )
        self.layout = replace(self.layout, spec=self.tokenizer.fit(self.layout.spec))
        self._sizes = self.layout.spec.num_tokens, self.layout.max_context
        self.defaults = sampling_defaults(files)
        self._running = running = pipeline(self.config, self.layout, source)
        self._engine = TextEngine(self.layout.bounds)
        self.trace = self._engine.trace
        self._thread = thread = EngineThread(self._engine, running.close)
        weakref.finalize(self, thread.close)
        try:
            thread.call(lambda: running.open(progress, thread.check))
        except BaseException:  # Ctrl-C while loading, too: workers must not stay behind
            thread.close()
            raise
        self._head = running.stage.drafter
        if drafter is not None:
            running.stage.drafter = drafter
        self._most_rows = self.config.most_rows
        self._largest = self.config.schedule  # what buffers and links were sized for
        self._gates: dict[tuple[Schedule, int | str], Gate] = {}  # learnt on the same workers
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
    def ended(self) -> PipelineError | None:
        """Return why no request can be answered any more, None while they can."""
        return self._thread.ended

    @property
    def pids(self) -> list[int]:
        """Return the ids of the worker processes on this host."""
        return self._running.pids()

    def check(self) -> None:
        """Raise PipelineError if a worker is lost, once no request is under way.

        From then on the LLM is ended, as by a request that finds out.
        """
        self._thread.call(self._running.check)

    @property
    def memory(self) -> list[int]:
        """Count the bytes each stage's process uses now; ``memory_needed`` says how many it may."""
        return self._running.memory()

    def totals(self) -> Totals:
        """Return what the stages did so far, and ask them for next time; needs no turn."""
        return self._engine.totals()

    def observe(self, observer: Callable[[Event], object] | None) -> None:
        """Let ``observer`` see what the engine does, on its thread; None, or an error, ends it."""
        self._running.stage.recorder.observer = observer

    def draft_with(self, drafter: Drafter | None) -> None:
        """Take the drafts of the next requests from ``drafter``; None: from the exit head again."""

        def change() -> None:
            self._running.stage.drafter = self._head if drafter is None else drafter
            self.drafts = self._running.stage.drafter is not None
            self._gates.clear()  # of other drafts they know nothing

        self._thread.call(change)
        self.use(self.config.mode, self.config.block, self.config.in_flight)

    def use(
        self,
        mode: str,
        block: int | None = None,
        in_flight: int | None = None,
        gate: bool | None = None,
        rows: int | str | None = None,
    ) -> None:
        """Decode the next requests in another mode on the same workers.

        ``gate`` and ``rows`` None: as before. More rows than at the start are refused.
        """
        schedule_for(mode, self.layout.stages, block, in_flight)  # refuses ``auto``
        gate = self.config.gate if gate is None else gate
        rows = self.config.rows if rows is None else rows
        config = self.config.replaced(
            mode=mode, block=block, in_flight=in_flight, gate=gate, rows=rows
        )
        if config.most_rows > self._most_rows:
            raise ConfigError("rows", rows, f"at most {self._most_rows}, as set at the start")
        schedule, largest = config.schedule, self._largest
        if schedule.block > max(largest.block, self._most_rows) or schedule.in_flight > max(
            largest.in_flight, self.layout.stages
        ):
            allowed = f"within block {largest.block} and in-flight {largest.in_flight} set at start"
            raise ConfigError("mode", mode, allowed)
        self._check_head(config)

        def change() -> None:
            self.config = config
            self._engine.engine = self._made(config)

        self._thread.call(change)

    def _made(self, config: EngineConfig) -> Engine:
        """Return an engine of chains, or of waves, on the running pipeline."""
        schedule, own = config.schedule, self._running.stage.drafter is self._head
        arguments = self._running.stage, self._running.links, schedule
        settings: dict[str, Any] = {
            "max_context": self.layout.max_context,
            "acceptance": config.acceptance,
            "prefill_chunk": config.prefill_chunk,
            "gate": self._gate(config),
        }
        drafts = schedule.drafts and own
        opinions = drafts and config.inner_heads and any(self.layout.inner)
        trees = drafts and (config.most_rows > 1 or opinions)
        if schedule.block > 1 or not (trees or config.concurrent > 1):
            return Engine(*arguments, **settings)
        return WaveEngine(
            *arguments,
            **settings,
            rows=config.most_rows if drafts else 0,
            costs=self.layout.costs,
            loose=self.layout.loose,
            lookup=config.lookup and drafts,
            opinions=opinions,
            slots=config.concurrent,
        )

    def _gate(self, config: EngineConfig) -> Gate | None:
        schedule = config.schedule
        if not (config.gate and schedule.drafts):
            return None
        return self._gates.setdefault((schedule, config.rows), Gate(schedule))

    def _check_head(self, config: EngineConfig) -> None:
        if config.schedule.drafts and not self.drafts:
            raise ConfigError("mode", config.mode, "autoregressive without a head or lookup")

    @overload
    def generate(  # type: ignore[overload-overlap]  # an empty list and a text are one prompt
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, *, reuse: bool = False
    ) -> list[list[Completion]]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        reuse: bool = False,
    ) -> list[Completion] | list[list[Completion]]:
        """Return ``params.n`` completions of a text, token ids, or chat messages.

        Of a list of prompts return a list for each; ``concurrent`` requests are under way at once.
        Without ``params`` the model's own ``defaults`` hold. Sample i has seed ``params.seed + i``.
        ``reuse`` continues from all rows that the last request left (a conversation) instead of
        those only that recomputing would repeat bit for bit. ``max_tokens`` is cut to the context.
        """
        params = self.defaults.params(params)
        if params.n > 1 and params.greedy:
            raise ConfigError("n", params.n, "1 at temperature 0, where all samples are equal")
        many = several(prompt)
        one: Sequence[Prompt] = many or [prompt]  # type: ignore[list-item]  # see several
        tickets = [
            self._ticket(self._request(ids, params.sample(i), reuse=reuse), silent=True, chat=chat)
            for ids, chat in [(self.encode(p), is_chat(p)) for p in one]
            for i in range(params.n)
        ]
        found = self._thread.results(tickets)
        if many is None:
            return found
        return [found[i : i + params.n] for i in range(0, len(found), params.n)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, reuse: bool = False
    ) -> Generator[Chunk, None, Completion]:
        """Yield one completion as it grows; the generator's return value is the Completion.

        Closing the generator ends the request; rows of what it yielded can be reused.
        """
        params = self.defaults.params(params, one=True)
        request = self._request(self.encode(prompt), params, reuse=reuse)
        return (yield from self._thread.stream(self._ticket(request, chat=is_chat(prompt))))

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        reuse: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
        chat: bool = False,
        notify: Callable[[], object],
    ) -> Ticket:
        """Begin one completion and return at once.

        ``notify`` is called, on the engine's thread, whenever the ticket has something to take.
        With ``logprobs`` its chunks have those of their tokens and of so many most likely ones, and
        with ``prompt_logprobs`` the first has them of the prompt, all of which is then computed.
        The answer follows ``grammar``. ``chat``: it begins a text, also after token ids.
        """
        params = self.defaults.params(params, one=True)
        request = self._request(self.encode(prompt), params, reuse=reuse, grammar=grammar)
        sink = None
        if logprobs is not None:
            most = MAX_TOP if prompt_logprobs else request.vocab_size
            top = checks.integer("logprobs", logprobs, 0, most)
            sink = Logprobs(request.prompt, request.vocab_size, top)
            request = replace(request, logits=sink)
            if prompt_logprobs:
                request = replace(request, scores=sink.hear, top=top)
        elif prompt_logprobs:
            raise ConfigError("prompt_logprobs", True, "used with logprobs")
        ticket = self._ticket(request, chat=chat or is_chat(prompt))
        ticket.answer.logprobs = sink
        ticket.notify = notify
        self._thread.submit(ticket)
        return ticket

    def run(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse: bool = False,
        logits: LogitsSink | None = None,
        grammar: Grammar | None = None,
    ) -> Completion:
        """Complete token ids; ``logits`` receives the target's logits (see engine.Request)."""
        ids, params = check_ids(ids, *self._sizes), self.defaults.params(params)
        request = self._request(ids, params, reuse=reuse, logits=logits, grammar=grammar)
        return self._thread.result(self._ticket(request, silent=True))

    def run_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        sinks: Sequence[LogitsSink | None] | None = None,
    ) -> list[Completion]:
        """Complete lists of token ids at once; ``sinks`` receive their logits, as in ``run``."""
        ids = [check_ids(prompt, *self._sizes) for prompt in prompts]
        params = self.defaults.params(params)
        sinks = [None] * len(ids) if sinks is None else sinks
        if len(sinks) != len(ids):
            raise ConfigError("sinks", len(sinks), f"as many as prompts, {len(ids)}")
        pairs = zip(ids, sinks, strict=True)
        requests = [self._request(one, params, reuse=False, logits=sink) for one, sink in pairs]
        return self._thread.results([self._ticket(request, silent=True) for request in requests])

    def encode(self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """Return the token ids of a prompt, checked; for a chat template see prompt.encode."""
        return encode(prompt, self.tokenizer, *self._sizes, template_kwargs)

    def on_pipeline(self, job: Callable[[RunningPipeline], Any]) -> Any:
        """Do something with the running pipeline on the engine's thread, between requests."""
        return self._thread.call(lambda: job(self._running))

    def now(self) -> float:
        """Return the time in seconds by the engine's clock, which statistics go by."""
        return self._engine.now()

    def json_grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of JSON that a schema allows; needs the extra ``structured``."""
        return self._grammars.json(schema)

    @cached_property
    def _grammars(self) -> Grammars:
        spec = self.layout.spec
        return Grammars(self.tokenizer.backend, spec.num_tokens, spec.eos_ids)

    def _ticket(self, request: Request, *, silent: bool = False, chat: bool = False) -> Ticket:
        decoder = StreamDecoder(self.tokenizer, () if chat else request.prompt)
        return Ticket(self._engine, request, decoder, silent=silent)

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        reuse: bool,
        logits: LogitsSink | None = None,
        grammar: Grammar | None = None,
    ) -> Request:
        """Shape a request: it ends where the context does."""
        if grammar is not None and self.config.acceptance == "rejection":
            raise ConfigError("acceptance", "rejection", "coupled where answers follow a grammar")
        limited = min(params.max_tokens, self.layout.max_context - len(ids))
        least = min(params.min_tokens, limited)
        eos = () if params.ignore_eos else self.layout.spec.eos_ids
        return Request(
            prompt=tuple(ids),
            params=replace(params, max_tokens=limited, min_tokens=least, n=1),
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            vocab_size=self.layout.spec.num_tokens,
            reuse=reuse,
            logits=logits,
            masks=None if grammar is None else grammar.start(),
        )

    def write_trace(self, path: Path) -> None:
        """Write the Chrome trace of all requests so far (needs ``trace=True``)."""
        self.trace.write(path, self.layout.bounds)
