"""``ppsd serve``: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Annotated

import typer

from ppsd.cli.display import notice
from ppsd.cli.session import advise, open_llm
from ppsd.cli.settings import Origins, as_toml, named
from ppsd.config import EngineConfig
from ppsd.errors import PpsdError
from ppsd.serve.config import ServerConfig
from ppsd.serve.signals import leaving

NEEDED = ("prometheus_client", "pydantic", "starlette", "uvicorn")


def serve(
    config: EngineConfig,
    server: ServerConfig,
    origins: Origins,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Show all settings and where each is set, and end."),
    ] = False,
) -> None:
    """Answer OpenAI's clients over HTTP: exactly, and many at once with --concurrent."""
    if print_config:
        print(as_toml([config, server], origins))
        return
    with leaving():  # also while PyTorch is imported and the model is loaded
        from ppsd.engine.choose import serves_as

        if serves_as(config) == 0:
            _serve(config, server, origins)
            return
    with open_llm(config):  # which serves this rank's stage to the end: clients ask rank 0
        pass


def _serve(config: EngineConfig, server: ServerConfig, origins: Origins) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise PpsdError(f"ppsd serve needs {', '.join(missing)}: pip install 'ppsd-llm[serve]'")
    from ppsd.serve.logs import log_notice, set_up
    from ppsd.serve.run import bind, check_tls, excused, serve

    with named(origins):
        server = server.with_key()
        check_tls(server)
        bound = bind(server)  # before the model is loaded: an address in use is told at once
    set_up(server.log_format)
    tell = log_notice if server.log_format == "json" else notice
    with bound, ExitStack() as stack:
        with excused(bound, server):
            llm = stack.enter_context(open_llm(config, tell))

        def ready() -> None:
            scheme = "http" if server.ssl_certfile is None else "https"
            host = f"[{server.host}]" if ":" in server.host else server.host
            names = ", ".join(server.served_model_name or (llm.layout.spec.name,))
            address = f"{scheme}://{host}:{bound.getsockname()[1]}/v1"
            at_once = config.concurrent
            many = "1 request" if at_once == 1 else f"{at_once} requests"
            tell(f"serving {names} at {address}, {many} at once", None)
            advise(config, llm, tell)

        serve(llm, server, bound, ready)
