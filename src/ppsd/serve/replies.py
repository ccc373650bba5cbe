"""What a request asks of the engine, and its answer as OpenAI's JSON, whole or in chunks."""

from __future__ import annotations

import math
import secrets
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, TypeVar

from ppsd.engine.answer import Chunk, Completion
from ppsd.engine.grammar import Grammar
from ppsd.engine.logprobs import TokenLogprob
from ppsd.engine.prompt import Prompt
from ppsd.errors import ConfigError
from ppsd.model.tokenizer import BYTE_TOKEN, REPLACEMENT, StreamDecoder, Tokenizer
from ppsd.serve.figures import speculation, timings, usage
from ppsd.serve.refusals import RefusedError, refusal_of
from ppsd.serve.schema import ChatBody, Message, Sampled, TextBody
from ppsd.types import SamplingParams

COMPLETION_TOKENS = 16  # OpenAI's default for completions; in a chat the context is the limit
SEED_BITS = 53  # so many are exact where all numbers are floats, as in JavaScript
LEAST_LOGPROB = -9999.0  # JSON has no infinity
FEW_TOKENS = 256  # are spelled in a millisecond or two
COMMON = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("max_tokens", "min_tokens", "n"),
)
Json = dict[str, Any]
T = TypeVar("T")
Parts = AsyncGenerator[tuple[int, Chunk | Completion], None]


def sampling(body: Sampled, defaults: Mapping[str, Any], vocab_size: int) -> SamplingParams:
    """Return what a body asks for, else the model's own ``defaults``; raises RefusedError."""
    given = {name: v for name in COMMON if (v := getattr(body, name)) is not None}
    limits: Json = {"max_tokens": None if isinstance(body, ChatBody) else COMPLETION_TOKENS}
    name = "max_tokens"
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        limits, name = {"max_tokens": body.max_completion_tokens}, "max_completion_tokens"
    if body.only_echoes:
        given["max_tokens"] = 1  # which is dropped: see silenced
    seed = {"seed": secrets.randbits(SEED_BITS)}
    try:
        params = SamplingParams(**{**defaults, **seed, **limits, **given})
    except ConfigError as error:
        raise refusal_of(error, lambda field: name if field == "max_tokens" else field) from error
    if params.n > 1 and params.greedy:
        raise RefusedError(400, "n must be 1 at temperature 0, where all choices are equal", "n")
    for told, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if wrong := [token for token in ids if token >= vocab_size]:
            allowed = f"token ids in [0, {vocab_size - 1}], the model's vocabulary"
            raise refusal_of(ConfigError(told, wrong[0], allowed))
    return params


def silenced(part: Chunk | Completion) -> Chunk | Completion:
    """Return a part of an answer without what is new in it."""
    if isinstance(part, Chunk):
        return replace(part, pieces=(), token_ids=(), accepted=(), logprobs=())
    stats = replace(part.stats, new_tokens=0)
    return Completion("", (), (), finish_reason="length", stats=stats)


def conversation(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Return messages as chat templates know them."""
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.content} for m in messages]


@dataclass
class Reply:
    """The answer to one request, in one of OpenAI's two shapes; subclasses are the shapes.

    Choice i is of prompt i // n. ``prompts`` are token ids. ``completed`` are the choices that the
    engine is through with, ``done`` those of them that were read; ``held`` is how many hold room.
    ``begun`` is when it was asked for, ``submitted`` True once the engine has been.
    ``apart`` calls a function that takes long off the event loop.
    """

    model: str
    tokenizer: Tokenizer
    body: Any
    params: SamplingParams
    apart: Callable[[Callable[[], Any]], Awaitable[Any]]
    prompts: Sequence[Sequence[int]] = ()
    grammar: Grammar | None = None
    request_id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    done: dict[int, Completion] = field(default_factory=dict)
    completed: dict[int, Completion] = field(default_factory=dict)
    held: int = 0
    submitted: bool = False
    begun: float = field(default_factory=time.monotonic)
    refused: bool = False

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]
    prompt_field: ClassVar[str]

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._spelt: dict[int, tuple[str, bool]] = {}  # the likeliest tokens come again and again

    @property
    def asked(self) -> list[Prompt]:
        """Return the prompts of the body."""
        raise NotImplementedError

    @property
    def template_kwargs(self) -> Json | None:
        """Return what the chat template finds by name."""
        return None

    @property
    def choices(self) -> int:
        """Return how many completions the request asks for."""
        return len(self.asked) * self.params.n

    async def whole(self, parts: Parts, render: Callable[[Json], T]) -> T:
        """Return the answer, rendered, once all of it is there."""
        logprobs: dict[int, list[TokenLogprob]] = {i: [] for i in range(self.choices)}
        async for index, part in parts:
            if isinstance(part, Chunk):
                logprobs[index] += self._before(index, part)
                logprobs[index] += part.logprobs
            else:
                self.done[index] = part
        count = sum(map(len, logprobs.values()))
        return await self._made(count, lambda: render(self._whole(logprobs)))

    def _whole(self, logprobs: Mapping[int, Sequence[TokenLogprob]]) -> Json:
        choices = [
            self._choice(
                index, self._message(self._echo(index) + self.done[index].text), logprobs[index]
            )
            | {"finish_reason": self.done[index].finish_reason}
            | self._ids(index, self.done[index].token_ids, first=True)
            for index in range(self.choices)
        ]
        return self._head(self.kind) | {"choices": choices, "usage": self._usage()} | self._about()

    async def _made(self, entries: int, make: Callable[[], T]) -> T:
        """Call what spells tokens for so many log-probabilities, many of them off the loop."""
        many = self.body.tops is not None and entries * (1 + self.body.tops) > FEW_TOKENS
        made: T = await self.apart(make) if many else make()
        return made

    async def chunks(self, parts: Parts) -> AsyncIterator[Json]:
        """Yield the objects of a stream."""
        head = self._head(self.chunk_kind)
        first, new = self._first(), 0
        for index in range(self.choices) if first else ():
            yield head | {"choices": [self._choice(index, first)]} | self._so_far(new)
        seen: set[int] = set()
        async for index, part in parts:
            if isinstance(part, Chunk):
                new += len(part.token_ids)
                first_part = index not in seen
                seen.add(index)
                ids = self._ids(index, part.token_ids, first=first_part)
                text = (self._echo(index) if first_part else "") + part.text
                logprobs = (*self._before(index, part), *part.logprobs)
                if text or logprobs or ids:
                    make = partial(self._choice, index, self._piece(text), logprobs)
                    choice = await self._made(len(logprobs), make) | ids
                    yield head | {"choices": [choice]} | self._so_far(new)
                continue
            self.done[index] = part
            choice = self._choice(index, self._end()) | {"finish_reason": part.finish_reason}
            about = self._about() if len(self.done) == self.choices else {}
            yield head | {"choices": [choice]} | self._so_far(new) | about
        if self.body.usage_streamed:
            yield head | {"choices": [], "usage": self._usage()}

    def _echo(self, index: int) -> str:
        """Return the text that an answer begins with."""
        return ""

    def _before(self, index: int, part: Chunk) -> Sequence[TokenLogprob]:
        """Return log-probabilities that stand before a part's own."""
        return ()

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"ppsd-{version('ppsd-llm')}",
        }

    def _about(self) -> Json:
        """Return what OpenAI's answers do not have: the seed, and times as llama-server tells."""
        about: Json = {"seed": self.params.seed}
        if len(self.done) == 1:
            about["timings"] = timings(self.done[0])
        about["metrics"] = {"speculative_decoding": speculation(self.done.values()).to_json()}
        return about

    def _so_far(self, new: int) -> Json:
        """Return what an event of a stream tells of the usage, with so many new tokens."""
        if not self.body.usage_in_each:
            return {"usage": None} if self.body.usage_streamed else {}
        prompt = sum(map(len, self.prompts))
        told = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {"usage": told}

    def _usage(self) -> Json:
        return usage([self.done[i] for i in range(self.choices)], self.params.n)

    def _ids(self, index: int, ids: Sequence[int], *, first: bool) -> Json:
        """Return the token ids that a choice tells if asked, at first the prompt's as well."""
        if not self.body.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": list(self.prompts[index // self.params.n])} if first else {}
        return prompt | {"token_ids": list(ids)}

    def _choice(self, index: int, said: Json, logprobs: Sequence[TokenLogprob] = ()) -> Json:
        told = self._logprobs(index, logprobs) if self.body.tops is not None and logprobs else None
        return {"index": index, **said, "logprobs": told, "finish_reason": None}

    def _message(self, text: str) -> Json:
        raise NotImplementedError

    def _piece(self, text: str) -> Json:
        raise NotImplementedError

    def _first(self) -> Json:
        """Return what a stream says before anything is computed, if anything."""
        raise NotImplementedError

    def _end(self) -> Json:
        raise NotImplementedError

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json:
        raise NotImplementedError

    def _spell(self, token: int) -> str:
        """Return the text of a token by itself, or its name if it has none of its own."""
        return self._spelled(token)[0]

    def _spelled(self, token: int) -> tuple[str, bool]:
        """Return what tells a token, and False if it is a part of a character.

        Parts of characters have the same text, U+FFFD, and different names.
        """
        if (known := self._spelt.get(token)) is None:
            text = self.tokenizer.piece(token)
            whole = REPLACEMENT not in text
            told = text if text and whole else self.tokenizer.spelling(token) or text
            known = self._spelt[token] = (told, whole)
        return known


class ChatReply(Reply):
    """Answers /v1/chat/completions."""

    body: ChatBody
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    prompt_field = "messages"

    @property
    def asked(self) -> list[Prompt]:
        """Return the prompts of the body."""
        return [conversation(self.body.messages)]

    @property
    def template_kwargs(self) -> Json | None:
        return self.body.chat_template_kwargs

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _first(self) -> Json:
        return {"delta": {"role": "assistant", "content": ""}}

    def _end(self) -> Json:
        return {"delta": {}}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json:
        content = [
            self._entry(e.token, e.logprob) | {"top_logprobs": [self._entry(*t) for t in e.top]}
            for e in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text, whole = self._spelled(token)
        known = list(text.encode()) if whole else None  # a part of a character
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}


class TextReply(Reply):
    """Answers /v1/completions."""

    body: TextBody
    kind = chunk_kind = "text_completion"
    prefix, prompt_field = "cmpl", "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offsets = [0] * self.choices  # of the next token in its choice's text
        self._begun: set[int] = set()
        self._decoders: dict[int, StreamDecoder] = {}

    @property
    def asked(self) -> list[Prompt]:
        """Return the prompts of the body."""
        return self.body.prompt

    def _echo(self, index: int) -> str:
        if not self.body.echo:
            return ""
        at = index // self.params.n
        prompt = self.body.prompt[at]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(self.prompts[at])

    def _before(self, index: int, part: Chunk) -> Sequence[TokenLogprob]:
        """Return those of an echoed prompt; its first token has none, as nothing precedes it."""
        if not self.body.prompt_scored or index in self._begun:
            return ()
        self._begun.add(index)
        first = TokenLogprob(self.prompts[index // self.params.n][0], math.nan, ())
        return (first, *part.prompt_logprobs)

    def _message(self, text: str) -> Json:
        return {"text": text}

    _piece = _message

    def _first(self) -> Json:
        return {}

    def _end(self) -> Json:
        return {"text": ""}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json:
        offsets = [self._place(index, e.token) for e in entries]
        return {
            "tokens": [self._spell(e.token) for e in entries],
            "token_logprobs": [_told(e.logprob) for e in entries],
            "top_logprobs": [None if math.isnan(e.logprob) else self._top(e) for e in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float | None]:
        """Return the likeliest tokens by name, the best last; of those of one name it has it."""
        told: dict[str, float | None] = {}
        for token, value in entry.top:
            name = self._spell(token)
            told[f"token_id:{token}" if name in told else name] = _told(value)
        return dict(reversed(told.items()))

    def _place(self, index: int, token: int) -> int:
        """Return where in the text a choice's next token begins.

        Text that is echoed as it was given holds special tokens, too, which no answer shows.
        """
        decoder, at = self._decoder(index), self._offsets[index]
        visible = self.tokenizer.visible(token)
        held = "" if visible and BYTE_TOKEN.fullmatch(visible) else decoder.held
        shown = decoder.push([token])
        if visible is None:
            shown = self._spell(token)
            if not self._echo(index).startswith(shown, at + len(held)):
                return at
        self._offsets[index] += len(shown)
        # What was held back is of tokens before this one, unless it has made a character of it.
        return at + len(held) * (visible is None or shown.startswith(held))

    def _decoder(self, index: int) -> StreamDecoder:
        """Return a choice's decoder, made when used: making thousands takes seconds."""
        if index not in self._decoders:
            prompt = () if self.body.prompt_scored else self.prompts[index // self.params.n]
            self._decoders[index] = StreamDecoder(self.tokenizer, prompt)
        return self._decoders[index]


def _told(logprob: float) -> float | None:
    """Return a log-probability as JSON has it, None for one that there is not."""
    return None if math.isnan(logprob) else max(logprob, LEAST_LOGPROB)
