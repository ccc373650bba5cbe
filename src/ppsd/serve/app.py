"""The routes, errors and doors of the server, as a Starlette application."""

from __future__ import annotations

import asyncio
import hmac
import re
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppsd.errors import shortened
from ppsd.serve.config import ServerConfig, is_loopback
from ppsd.serve.live import Live, TintedReply
from ppsd.serve.logs import LEFT, log_refusal
from ppsd.serve.metrics import TEXT_FORMAT
from ppsd.serve.protocol import PATIENCE_S
from ppsd.serve.refusals import RefusedError
from ppsd.serve.replies import ChatReply, Reply, TextReply
from ppsd.serve.schema import (
    MAX_BODY,
    SMALL_BODY,
    Body,
    ChatBody,
    DetokenizeBody,
    Sampled,
    TextBody,
    TokenizeBody,
)
from ppsd.serve.service import Service
from ppsd.serve.site import site
from ppsd.serve.stream import Limit, StreamEnd, ending, own_error, stream

B = TypeVar("B", bound=Body)
T = TypeVar("T")
OPEN = ("/health", "/ready", "/", "/docs", "/openapi.json")  # also without a key
RETRY_SECONDS = "1"
FOREIGN = (
    "the Host header names another machine: without a key the server answers this one alone; "
    "other names need --api-key or --insecure"
)
FOREIGN_PAGE = (
    "the request comes from a web page of another machine: without a key the server answers pages "
    "of this one alone; others need --api-key or --insecure"
)
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> Starlette:
    """Return the application that serves one model."""
    routes, live = Routes(service), Live(service)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route(
                "/v1/chat/completions", Completions(service, ChatBody, ChatReply), methods=["POST"]
            ),
            Route("/v1/completions", Completions(service, TextBody, TextReply), methods=["POST"]),
            Route("/v1/pipeline", live.pipeline),
            Route("/v1/pipeline/events", live.events),
            Route(
                "/v1/pipeline/chat", Completions(service, ChatBody, TintedReply), methods=["POST"]
            ),
            *site(),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
        ],
        lifespan=service.watching,
        middleware=[Middleware(Doors, config=service.config)],
        exception_handlers={
            RefusedError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _nobody,
            Exception: _fail,
        },
    )
    app.router.redirect_slashes = False  # what is not there is 404
    return app


async def still_loading(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, as an ASGI application, that the model is still being loaded."""
    refusal = RefusedError(503, "the model is still being loaded", code="loading")
    headers = {"retry-after": RETRY_SECONDS}
    await JSONResponse(refusal.to_json(), 503, headers)(scope, receive, _named(scope, send))


class Routes:
    """The routes that answer at once, or with a little work on text."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Say whether the engine can decode."""
        if error := self._service.broken:
            raise RefusedError(503, f"the pipeline is lost: {error}")
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether a request would find room now."""
        if self._service.full:
            raise RefusedError(503, "the queue is full")
        return await self.health(request)

    async def metrics(self, request: Request) -> Response:
        """Tell counts and times, as Prometheus reads them."""
        return Response(self._service.metrics.text(), media_type=TEXT_FORMAT)

    async def models(self, request: Request) -> Response:
        """List the names of the model."""
        data = [self._about(name) for name in self._service.names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Describe the model of a name."""
        return JSONResponse(self._about(self._service.check_model(request.path_params["name"])))

    def _about(self, name: str) -> dict[str, Any]:
        service = self._service
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "ppsd",
            "max_model_len": service.llm.layout.max_context,
        }

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text, or of a conversation by the chat template."""
        body = await _read(request, TokenizeBody, self._service)
        self._service.check_model(body.model)
        llm = self._service.llm
        ids = await self._service.tokens(body)

        def tell() -> Response:
            told = {"count": len(ids), "max_model_len": llm.layout.max_context, "tokens": ids}
            if body.return_token_strs:
                told["token_strs"] = [llm.tokenizer.spelling(token) for token in ids]
            return JSONResponse(told)

        return await self._service.apart(tell, large=body.large)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        body = await _read(request, DetokenizeBody, self._service)
        llm = self._service.llm
        self._service.check_model(body.model)
        most = llm.layout.spec.num_tokens - 1

        def tell() -> Response:
            if wrong := [token for token in body.tokens if not 0 <= token <= most]:
                message = f"tokens must be in [0, {most}], the model's vocabulary, got {wrong[0]}"
                raise RefusedError(400, message, "tokens")
            text = llm.tokenizer.decode(body.tokens)
            return JSONResponse({"prompt": text, "content": text})

        return await self._service.apart(tell, large=body.large)

    async def tokenizer_info(self, request: Request) -> Response:
        """Describe the tokenizer, as clients that count tokens themselves ask."""
        llm = self._service.llm
        about = await self._service.apart(lambda: llm.tokenizer.about)
        return JSONResponse(about | {"model_max_length": llm.layout.max_context})


class Completions:
    """A route that generates; it ends what it began once its client is gone."""

    def __init__(self, service: Service, body: type[Sampled], reply: type[Reply]) -> None:
        self._service = service
        self._body = body
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI application does."""
        request = Request(scope, receive)
        body = await _read(request, self._body, self._service)
        reply = self._service.reply(self._reply, body)
        reply.request_id = scope["state"]["request_id"]
        scope["state"]["logged"] = True
        rest, started = None, False

        async def begin(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        with self._service.logged(reply), self._service.room(reply):
            try:
                rest = await _while_there(receive, self._answer(reply, begin))
            except asyncio.CancelledError:  # by uvicorn, which waits for nobody any more
                if not started:
                    raise ending() from None
        if rest is not None:  # now there is room for what its client asks next
            await rest(scope, receive, send)

    async def _answer(self, reply: Reply, send: Send) -> ASGIApp:
        """Return what is still to be sent: all of an answer, or the end of a stream."""
        service = self._service
        limit = Limit(reply.body.timeout)
        async with limit.held():
            reply.prompts = await service.encode(reply)
            reply.grammar = await service.grammar(reply.body)
        with service.parts(reply) as parts:
            if reply.body.stream:
                return StreamEnd(await stream(reply, parts, limit, send))
            async with limit.held():
                return await reply.whole(parts, JSONResponse)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what work returns; it is cancelled once the client is gone."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _read(request: Request, kind: type[B], service: Service) -> B:
    """Return the checked body of a request, a large one read off the loop; raises RefusedError."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        told = f"Content-Encoding must be identity, or left out, got {shortened(repr(coding))}"
        raise RefusedError(415, told)
    data = await _received(request)
    if len(data) > SMALL_BODY:
        return await service.apart(lambda: kind.read(data), large=True)
    return kind.read(data)


async def _received(request: Request) -> bytes:
    """Return the body of a request; raises RefusedError where it is too long or does not come."""
    data, pieces = bytearray(), request.stream()
    while True:
        try:
            async with asyncio.timeout(PATIENCE_S):
                piece = await anext(pieces, b"")
        except TimeoutError:
            told = f"the body must come without a pause of {PATIENCE_S:g} seconds"
            raise RefusedError(408, told, code="timeout") from None
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > MAX_BODY:
            raise RefusedError(413, f"the body must have at most {MAX_BODY} bytes")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"retry-after": RETRY_SECONDS} if error.status == 429 else None
    return JSONResponse(error.to_json(), error.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses: unknown paths, and methods that a path does not take."""
    assert isinstance(error, HTTPException)
    told = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not allowed"}
    body = RefusedError(error.status_code, told.get(error.status_code, error.detail)).to_json()
    return JSONResponse(body, error.status_code, error.headers)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=LEFT)  # nobody reads this


async def _fail(request: Request, error: Exception) -> Response:
    """Answer, outside of the doors, that the server is at fault."""
    log_refusal(request.scope, 500)
    named = {"x-request-id": request.scope["state"]["request_id"]}
    return JSONResponse(own_error(error).to_json(), 500, named)


class Doors:
    """Lets in who has the key, and gives every answer the id of its request.

    Without a key it lets in who asks for this machine by a name of its own: a web page from
    elsewhere, whose name was made to lead here (DNS rebinding), asks for that name. One that asks
    for this machine itself cannot read the answer, but would let it work; its browser tells the
    page's origin.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._key = None if config.api_key is None else config.api_key.encode()
        self._only_local = config.only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; say so to one that the server's end cuts off."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def begin(message: Message) -> None:
            nonlocal started
            if not started:
                log_refusal(scope, message["status"])
            started = True
            await send(message)

        named = _named(scope, begin)
        try:
            await (self._refusal(scope) or self._app)(scope, receive, named)
        except asyncio.CancelledError:  # by uvicorn, which waits for nobody any more
            if started:
                raise
            await JSONResponse(ending().to_json(), 503)(scope, receive, named)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return what one is told who may not come in."""
        headers = dict(scope["headers"])
        host = _host(headers.get(b"host", b""))  # browsers, which are to be kept out, name it
        if self._only_local and host and not is_loopback(host):
            refusal = RefusedError(403, FOREIGN, code="foreign_host")
            return JSONResponse(refusal.to_json(), 403)
        origin = headers.get(b"origin", b"")
        if self._only_local and origin and not is_loopback(_host(origin.rpartition(b"/")[2])):
            refusal = RefusedError(403, FOREIGN_PAGE, code="foreign_origin")
            return JSONResponse(refusal.to_json(), 403)
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given, self._key or b"")
        if self._key and scope["path"] not in OPEN and not known:
            refusal = RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")
            return JSONResponse(refusal.to_json(), 401, {"www-authenticate": "Bearer"})
        return None


def _named(scope: Scope, send: Send) -> Send:
    """Choose the id of a request, and return a ``send`` that tells it with the answer."""
    asked = dict(scope["headers"]).get(b"x-request-id", b"")
    name = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex.encode()
    scope.setdefault("state", {})["request_id"] = name.decode()

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", name)]
        await send(message)

    return named


def _host(header: bytes) -> str:
    """Return the name or address of a Host header, without port and brackets."""
    name = header.decode("latin-1").strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name if name.count(":") > 1 else name.partition(":")[0]
