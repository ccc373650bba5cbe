"""The bodies that clients send, checked by pydantic, and how one is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ppsd.errors import shortened
from ppsd.serve.refusals import RefusedError, refusal_of_body

MAX_BODY = 8 << 20  # bytes
SMALL_BODY = 1 << 16  # bytes that are read in less than a millisecond
MAX_CHOICES = 128  # of one prompt
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
MAX_NAMES = 4096  # of one object
MAX_NESTED = 1 << 16  # lists and objects of a body
MAX_TOKENS = 1 << 20  # of a text that is asked for
MAX_LOGPROBS = 20
MAX_TIMEOUT = 86400.0  # seconds
RESERVED = {  # names that chat templates know already, or that transformers has a meaning for
    *("messages", "conversation", "conversations", "tools", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "self", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens"),
    *("bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now"),
    *("processor_kwargs", "template_kwargs"),
}
PLAIN = re.compile("0|-?[1-9][0-9]{,18}")
# A text, or what begins a list or an object. A text that does not end reaches to the body's end, so
# that none is read twice.
PIECE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]', re.DOTALL)
Json = dict[str, Any]
# Of a list with millions of wrong values pydantic would make an error of each.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("ppsd", "{message}", {"message": message})


def _only(*neutral: object) -> BeforeValidator:
    """Accept only values that ask for nothing, of a field that is not supported."""

    def check(value: object) -> object:
        if value is not None and not any(
            value == each and type(value) is type(each) for each in neutral
        ):
            among = " or ".join(["null", *map(repr, neutral)])
            raise _wrong(f"is not supported here; leave it out, or give {among}")
        return value

    return BeforeValidator(check)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined(value: object) -> object:
    """Return the text of a message's content parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _wrong("must be a text, or a list of parts of type text")
        if not isinstance(part.get("text"), str):
            raise _wrong("must have a text in each of its parts")
        texts.append(part["text"])
    return "".join(texts)


def _prompts(value: object) -> object:
    """Return a list of prompts, each a text or a list of token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS and isinstance(value[0], str | list):
        raise _wrong(f"must be at most {MAX_PROMPTS} prompts, got {len(value)}")
    if isinstance(value, list) and value and all(isinstance(p, str) or _is_ids(p) for p in value):
        return value
    raise _wrong("must be a text, a list of token ids, or a list of such prompts")


def _unreserved(value: Json) -> Json:
    """Refuse names that mean something else."""
    if wrong := sorted(RESERVED & value.keys()):
        raise _wrong(f"must not name {wrong[0]}, which is set already")
    return value


def _by_token(value: object) -> object:
    """Return a dict by token ids; refuse names such as 05, which say the same as another."""
    if not isinstance(value, dict):
        return value
    if odd := [name for name in value if not PLAIN.fullmatch(name)]:
        raise _wrong(f"must have integers as names, got {shortened(repr(odd[0]))}")
    return {int(name): bias for name, bias in value.items()}


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class Body(BaseModel):
    """A JSON object with no fields but the known ones, each of exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    _size: int = 0  # bytes it was read from

    @property
    def large(self) -> bool:
        """Return True if work on the texts of the body can take long."""
        return self._size > SMALL_BODY

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Parse a body; raises RefusedError naming the first field that is wrong."""
        _check_nested(data)
        # Of two fields with one name pydantic takes the last, and NaN in objects of any kind. It
        # makes an error of each unknown name, which of a million names takes seconds.
        with suppress(ValueError, RecursionError):  # no JSON: pydantic says where it ends
            json.loads(data, object_pairs_hook=_few, parse_constant=_refuse_constant)
        try:
            body = cls.model_validate_json(data)
        except ValidationError as error:
            raise refusal_of_body(error, cls.model_fields) from error
        body._size = len(data)
        return body


def _check_nested(data: bytes) -> None:
    """Refuse too many lists and objects: while a parser makes them, nothing else runs for long."""
    if data.count(b"[") + data.count(b"{") <= MAX_NESTED:  # with those that texts quote
        return
    begun = (piece for piece in PIECE.finditer(data) if piece[0] in b"[{")
    if sum(1 for _ in islice(begun, MAX_NESTED + 1)) > MAX_NESTED:
        raise RefusedError(400, f"the body must have at most {MAX_NESTED} lists and objects")


def _few(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object with too many names, or with one twice: one of the two would be ignored."""
    if len(pairs) > MAX_NAMES:
        told = f"the body: an object must have at most {MAX_NAMES} names, got {len(pairs)}"
        raise RefusedError(400, told)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise RefusedError(400, f"{shortened(twice)} must be given once", twice)


def _refuse_constant(name: str) -> None:
    raise RefusedError(400, f"the body is not valid JSON: {name} is no number there")


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise _wrong("must have include_usage beside continuous_usage_stats")
        return self


class JsonSchema(BaseModel):
    """A schema with its name; being exact, this server has no other way than ``strict``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    wanted: Annotated[Json | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    """Says which texts may be an answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _wrong("must have json_schema if, and only if, its type is json_schema")
        return self

    @property
    def schema_wanted(self) -> Json | None:
        """Return the schema that the answer has to follow, None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.wanted is None:
            return {"type": "object"}
        return self.json_schema.wanted


class Sampled(Body):
    """The fields that both kinds of completion share. Ranges are those of SamplingParams."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_by_token)] = None
    seed: int | None = None
    stop: Annotated[Texts | None, BeforeValidator(_listed)] = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    # Accepted, and without effect.
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options must be left out unless stream is true")
        if self.ignore_eos and self.schema_wanted is not None:
            raise _wrong("ignore_eos must be left out where response_format sets an end")
        return self

    @property
    def schema_wanted(self) -> Json | None:
        """Return the JSON schema that the answer has to follow, if any."""
        return None if self.response_format is None else self.response_format.schema_wanted

    @property
    def tops(self) -> int | None:
        """Return how many log-probabilities a token gets beside its own; None: none at all."""
        raise NotImplementedError

    @property
    def only_echoes(self) -> bool:
        return False

    @property
    def prompt_scored(self) -> bool:
        """Return True if log-probabilities of the prompt's tokens are asked for."""
        return False

    @property
    def usage_streamed(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_in_each(self) -> bool:
        """Return True if each event of a stream is to tell the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class Message(BaseModel):
    """A message of a conversation; fields that ppsd does not know are left to their senders."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: str
    content: Annotated[str, BeforeValidator(_joined)]
    tool_calls: Annotated[Any, _only([])] = None


class ChatBody(Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    chat_template_kwargs: Annotated[Json, AfterValidator(_unreserved)] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[Any, _only(["text"])] = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs must be left out unless logprobs is true")
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            raise _wrong("max_tokens must be left out beside another max_completion_tokens")
        return self

    @property
    def tops(self) -> int | None:
        """Return how many log-probabilities a token gets beside its own; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(Sampled):
    """The body of /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: Annotated[Any, _only("")] = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise _wrong("best_of must be left out, or equal to n")
        return self

    @property
    def only_echoes(self) -> bool:
        """Return True if nothing new is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def prompt_scored(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def tops(self) -> int | None:
        """Return how many log-probabilities a token gets beside its own; None: none at all."""
        return self.logprobs


class TokenizeBody(Body):
    """The body of /tokenize: a text, as ``prompt`` or ``content``, or a conversation."""

    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    chat_template_kwargs: Annotated[Json, AfterValidator(_unreserved)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        given = [each for each in (self.prompt, self.content, self.messages) if each is not None]
        if len(given) != 1:
            raise _wrong("prompt must be given, or content, or messages, and only one of them")
        if self.chat_template_kwargs is not None and self.messages is None:
            raise _wrong("chat_template_kwargs must be left out without messages")
        if self.add_special_tokens is not None and self.messages is not None:
            raise _wrong("add_special_tokens must be left out beside messages, whose template adds")
        return self


class DetokenizeBody(Body):
    """The body of /detokenize."""

    tokens: Annotated[Ids, Field(max_length=MAX_TOKENS)]
