"""The model as clients find it: its names, room for requests, and whether it still works."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TypeVar

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.async_llm import begun
from ppsd.engine.grammar import Grammar
from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError, ModelError, PipelineError, PpsdError, RequestError
from ppsd.serve.config import ServerConfig
from ppsd.serve.figures import speculation
from ppsd.serve.logs import log_request
from ppsd.serve.metrics import Metrics, Watch
from ppsd.serve.pulse import Pulse
from ppsd.serve.refusals import RefusedError, refusal_of
from ppsd.serve.replies import Parts, Reply, conversation, sampling, silenced
from ppsd.serve.schema import ChatBody, Sampled, TokenizeBody

NO_TEMPLATE = (
    "messages need a chat template, and this model has none: the server can be given one by "
    "--chat-template; /v1/completions needs none"
)
T = TypeVar("T")


class Service:
    """Answers requests with an LLM, on an event loop.

    ``on_broken`` is called once the pipeline is lost; nothing can be answered from then on.
    """

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.names = config.served_model_name or (llm.layout.spec.name,)
        self.created = int(time.time())
        self.active = 0  # choices under way or waiting
        self._submitted = 0  # those of them that the engine has
        self.capacity = llm.config.concurrent + config.max_queue
        self.metrics = Metrics(config.metrics_prefix, self.running, self.waiting, llm.totals)
        self.pulse = Pulse()
        self.ending = False
        self.on_broken: Callable[[], object] = lambda: None
        # One thread each: long texts take no more than one core from the engine, and short ones
        # do not wait for them.
        self._short_text = ThreadPoolExecutor(1, "ppsd-text")
        self._long_text = ThreadPoolExecutor(1, "ppsd-long-text")

    def end(self) -> None:
        """Let streams end that have no end of their own: the server is about to wait for them."""
        self.ending = True

    def close(self) -> None:
        """End the threads that turn text into tokens."""
        for texts in (self._short_text, self._long_text):
            texts.shutdown(wait=False, cancel_futures=True)

    @property
    def broken(self) -> PipelineError | None:
        """Return what broke the pipeline, None while it works."""
        return self.llm.ended

    @asynccontextmanager
    async def watching(self, app: object = None) -> AsyncIterator[None]:
        """Notice the end of a worker process at once, also while there is no request.

        Where the system has no such descriptors, or none left, the next request finds out.
        """
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            for pid in self.llm.pids if hasattr(os, "pidfd_open") else ():
                with suppress(OSError):  # then the next request finds out
                    ended = os.pidfd_open(pid)
                    stack.callback(os.close, ended)
                    stack.callback(loop.remove_reader, ended)
                    loop.add_reader(ended, self._look, loop, ended)
            yield

    def _look(self, loop: asyncio.AbstractEventLoop, ended: int) -> None:
        """Let the engine find out that a process has ended."""
        loop.remove_reader(ended)
        loop.run_in_executor(None, self._check)

    def _check(self) -> None:
        try:
            self.llm.check()
        except PpsdError:
            self.on_broken()

    def check_model(self, name: str | None) -> str:
        """Return the name that an answer tells; raises RefusedError for that of another model."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            message = f"model {name!r} is not served here; there is {known}"
            raise RefusedError(404, message, "model", "model_not_found")
        return name or self.names[0]

    def reply(self, kind: type[Reply], body: Sampled) -> Reply:
        """Return the answer to begin with; raises RefusedError for what the engine would refuse."""
        model = self.check_model(body.model)
        params = sampling(body, self.llm.defaults.values, self.llm.layout.spec.num_tokens)
        return kind(model, self.llm.tokenizer, body, params, partial(self.apart, large=True))

    @property
    def full(self) -> bool:
        """Return True if one more choice would be refused."""
        return self.active >= self.capacity

    def running(self) -> int:
        return min(self._submitted, self.llm.config.concurrent)

    def waiting(self) -> int:
        return self.active - self.running()

    @contextmanager
    def room(self, reply: Reply) -> Iterator[None]:
        """Hold room for a reply's choices until each is complete; RefusedError if there is none."""
        choices = reply.choices
        if choices > self.capacity:
            name = "n" if reply.params.n > 1 else reply.prompt_field
            most = f"at most {self.capacity} choices of all prompts"
            raise RefusedError(400, f"{name} must ask for {most}, got {choices}", name)
        if self.active + choices > self.capacity:
            raise RefusedError(429, f"{self.active} choices are under way or wait; try again later")
        self.active += choices
        reply.held, reply.submitted = choices, False
        try:
            yield
        finally:
            self._free(reply)

    async def apart(self, function: Callable[[], T], *, large: bool = False) -> T:
        """Call a function that turns text into tokens, or back, off the event loop."""
        texts = self._long_text if large else self._short_text
        return await asyncio.get_running_loop().run_in_executor(texts, function)

    async def encode(self, reply: Reply) -> list[list[int]]:
        """Return the token ids of a reply's prompts; raises RefusedError naming their field."""
        encode, more = self.llm.encode, reply.template_kwargs
        prompts, large = reply.asked, reply.body.large
        return await self._told(
            lambda: [encode(prompt, more) for prompt in prompts], reply.prompt_field, large=large
        )

    async def tokens(self, body: TokenizeBody) -> list[int]:
        """Return the token ids of a text or a conversation of any length."""
        tokenizer = self.llm.tokenizer
        if body.messages is not None:
            messages, more = conversation(body.messages), body.chat_template_kwargs or {}
            encode = partial(tokenizer.encode_chat, messages, more)
            return await self._told(encode, "messages", large=body.large)
        name = "content" if body.prompt is None else "prompt"
        special = body.add_special_tokens is not False
        encode = partial(tokenizer.encode, getattr(body, name), special=special)
        return await self._told(encode, name, large=body.large)

    async def _told(self, encode: Callable[[], T], name: str, *, large: bool) -> T:
        """Call what encodes the field ``name``; raises RefusedError."""
        try:
            return await self.apart(encode, large=large)
        except ConfigError as error:
            raise refusal_of(error, lambda _: name) from error
        except ModelError as error:
            raise RefusedError(400, NO_TEMPLATE, name) from error

    async def grammar(self, body: Sampled) -> Grammar | None:
        """Return the grammar of the schema that a body asks for; raises RefusedError."""
        if (schema := body.schema_wanted) is None:
            return None
        try:
            return await self.apart(lambda: self.llm.json_grammar(schema), large=body.large)
        except ConfigError as error:
            raise refusal_of(error) from error

    @contextmanager
    def parts(self, reply: Reply) -> Iterator[Parts]:
        """Begin the choices of a reply, and yield what they bring; leaving ends them.

        The engine is at work before the first event of a stream is written. Raises RefusedError,
        also while the parts are read.
        """
        requests = [
            partial(
                self.llm.submit,
                ids,
                reply.params.sample(i),
                logprobs=reply.body.tops,
                prompt_logprobs=reply.body.prompt_scored,
                grammar=reply.grammar,
                chat=isinstance(reply.body, ChatBody),
            )
            for ids in reply.prompts
            for i in range(reply.params.n)
        ]
        with self.metrics.watch(reply.choices, reply.begun) as watch, ExitStack() as stack:
            with self._refusing():
                see = partial(self._see, reply, watch)
                over = partial(self._free, reply)
                arriving = stack.enter_context(begun(requests, see, over))
            reply.submitted = True
            self._submitted += reply.held
            yield self._read(arriving)

    def _see(
        self, reply: Reply, watch: Watch, index: int, given: Chunk | Completion
    ) -> Chunk | Completion:
        """Count a part as it comes, and return what the client is to have of it."""
        part = silenced(given) if reply.body.only_echoes else given
        watch.see(index, part, first=index % reply.params.n == 0)
        self.pulse.see(part)
        if isinstance(part, Completion):
            reply.completed[index] = part
            self._free(reply, 1)
        return part

    async def _read(self, arriving: Parts) -> Parts:
        with self._refusing():
            async for numbered in arriving:
                yield numbered

    def _free(self, reply: Reply, choices: int | None = None) -> None:
        """Give back the room of so many choices, by default of all that hold any."""
        choices = reply.held if choices is None else choices
        reply.held -= choices
        self.active -= choices
        self._submitted -= choices if reply.submitted else 0

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn the engine's errors into refusals."""
        try:
            yield
        except (RequestError, ConfigError) as error:
            raise RefusedError(400, str(error)) from error
        except PipelineError as error:
            self.on_broken()
            raise RefusedError(503, f"the pipeline is lost: {error}") from error

    @contextmanager
    def logged(self, reply: Reply) -> Iterator[None]:
        """Write a line about a request when it is over, however it ends."""
        try:
            yield
        except RefusedError:
            reply.refused = True
            raise
        finally:
            end = "refused" if reply.refused else "abort"
            complete = list(reply.completed.values())
            ends = [completion.finish_reason for completion in complete]
            drafts = speculation(complete)
            log_request(
                {
                    "id": reply.id,
                    "request_id": reply.request_id,
                    "prompt_tokens": sum(map(len, reply.prompts)),
                    "completion_tokens": sum(c.stats.new_tokens for c in complete),
                    "accepted_tokens": drafts.accepted,
                    "rejected_tokens": drafts.judged - drafts.accepted,
                    "prefill_seconds": sum(c.stats.prefill_seconds for c in complete),
                    "decode_seconds": sum(c.stats.decode_seconds for c in complete),
                    "seconds": time.monotonic() - reply.begun,
                    "finish": ",".join(ends) if len(ends) == reply.choices else end,
                }
            )
