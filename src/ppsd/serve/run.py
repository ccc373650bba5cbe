"""Run the application under uvicorn, and end it in order."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError, PpsdError, cause_of
from ppsd.serve.app import create_app, still_loading
from ppsd.serve.config import ServerConfig, is_loopback
from ppsd.serve.protocol import HTTP
from ppsd.serve.service import Service
from ppsd.serve.signals import handled

LOOPBACK = "a loopback address such as 127.0.0.1, or used with --api-key or --insecure"
KEEP_ALIVE_S = 75  # longer than proxies keep an idle connection, so that they end it


class _Server(uvicorn.Server):
    """A server that a signal ends without an error: uvicorn's own would raise it again."""

    on_shutdown: Callable[[], object]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with handled(self.handle_exit):
            yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.on_shutdown()
        await super().shutdown(sockets)
        if self.force_exit:  # else it is cancelled, with a traceback
            await self.lifespan.shutdown()


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket at the address, which does not listen yet; raises PpsdError.

    Others may reach it only if they need a key, or if that is asked for.
    """
    if config.only_local and not is_loopback(config.host):
        raise ConfigError("host", config.host, LOOPBACK)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        place = f"{config.host}:{config.port}"
        raise PpsdError(f"cannot listen on {place}: {cause_of(error)}") from error
    return bound


def check_tls(config: ServerConfig) -> None:
    """Raise ConfigError unless certificate and key can be used."""
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(name, path, "a file that exists")
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:  # an encrypted key is refused: nobody may be there to type its password
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # of OpenSSL, too
        reason = getattr(error, "reason", None) or error
        allowed = f"a certificate in PEM, with its unencrypted key ({reason})"
        raise ConfigError("ssl_certfile", config.ssl_certfile, allowed) from error


@contextmanager
def excused(bound: socket.socket, config: ServerConfig) -> Iterator[None]:
    """Answer meanwhile that the model is still being loaded."""
    more = {"lifespan": "off", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(_settings(still_loading, config, **more))
    sockets = {"sockets": [bound.dup()]}  # which the server closes
    thread = threading.Thread(target=server.run, kwargs=sockets, name="ppsd-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def _settings(app: ASGIApp, config: ServerConfig, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=HTTP,
        ws="none",
        log_config=None,  # uvicorn's lines go where set_up sends all
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        **more,
    )


def serve(
    llm: LLM, config: ServerConfig, bound: socket.socket, ready: Callable[[], object]
) -> None:
    """Serve until a signal comes; raises PipelineError when the pipeline is lost."""
    service = Service(llm, config)
    drain = {"timeout_graceful_shutdown": config.drain_timeout}
    settings = _settings(create_app(service), config, lifespan="on", **drain)
    server = _Server(settings)
    server.on_shutdown = service.end

    def end() -> None:
        server.should_exit = True

    service.on_broken = end
    bound.listen(settings.backlog)  # who hears that it is ready may come before uvicorn looks
    ready()
    try:
        server.run(sockets=[bound])
    finally:
        service.close()
    if service.broken is not None:
        raise service.broken
