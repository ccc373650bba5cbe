"""The description of the server's paths as an OpenAPI document, from the bodies' own models."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, NamedTuple

from pydantic.json_schema import models_json_schema

from ppsd.serve.schema import Body, ChatBody, DetokenizeBody, TextBody, TokenizeBody

Json = dict[str, Any]
SCHEMAS = "#/components/schemas/"
JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"


class Operation(NamedTuple):
    """A path, what it takes, and the media types that it answers in; ``open``: without a key."""

    path: str
    summary: str
    answers: tuple[str, ...] = (JSON,)
    body: type[Body] | None = None
    open: bool = False


OPERATIONS = (
    Operation("/v1/chat/completions", "Answer a conversation", (JSON, EVENTS), ChatBody),
    Operation("/v1/completions", "Continue texts", (JSON, EVENTS), TextBody),
    Operation("/v1/models", "List the names of the model"),
    Operation("/v1/models/{name}", "Describe the model of a name"),
    Operation("/tokenize", "Return the token ids of a text or a conversation", body=TokenizeBody),
    Operation("/detokenize", "Return the text of token ids", body=DetokenizeBody),
    Operation("/tokenizer_info", "Tell special tokens and the chat template"),
    Operation("/v1/pipeline", "Describe the pipeline and what it does now"),
    Operation("/v1/pipeline/events", "Stream what the pipeline does, as it does it", (EVENTS,)),
    Operation(
        "/v1/pipeline/chat",
        "Answer a conversation, and tell of each piece of a stream if it was a right draft",
        (JSON, EVENTS),
        ChatBody,
    ),
    Operation("/metrics", "Tell counts and times, as Prometheus reads them", ("text/plain",)),
    Operation("/health", "Say whether the engine can decode: 200 or 503", open=True),
    Operation("/ready", "Say whether one more request would be taken: 200 or 503", open=True),
    Operation("/", "Show the pipeline at work", (HTML,), open=True),
    Operation("/docs", "Show this description", (HTML,), open=True),
    Operation("/openapi.json", "Return this description", open=True),
)


def document() -> Json:
    """Return the OpenAPI document."""
    bodies = {each.body for each in OPERATIONS if each.body is not None}
    models = [(body, "validation") for body in sorted(bodies, key=lambda body: body.__name__)]
    _, schemas = models_json_schema(models, ref_template=SCHEMAS + "{model}")  # type: ignore[arg-type]  # a list of literals
    components = {
        "schemas": schemas["$defs"] | {"Error": ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    paths: Json = {}
    for each in OPERATIONS:
        method = "get" if each.body is None else "post"
        paths[each.path] = {method: _operation(each)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ppsd", "version": version("ppsd-llm")},
        "security": [{"key": []}],
        "paths": paths,
        "components": components,
    }


def _operation(each: Operation) -> Json:
    content: Json = {media: {} for media in each.answers}
    error = {JSON: {"schema": {"$ref": SCHEMAS + "Error"}}}
    told: Json = {
        "summary": each.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "default": {"description": "a refusal", "content": error},
        },
    }
    if each.body is not None:
        schema = {"$ref": SCHEMAS + each.body.__name__}
        told["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if "{name}" in each.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        told["parameters"] = [name]
    if each.open:
        told["security"] = []
    return told


ERROR: Json = {
    "type": "object",
    "description": "What every refusal is, in OpenAI's shape.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
