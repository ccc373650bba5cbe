"""The files of docs/deploy fit the server: flags, paths and metrics exist."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ppsd.serve.schema import MAX_BODY
from tests.support.command import ppsd
from tests.support.http_server import Served

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
SECONDS = {"s": 1, "m": 60}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # keys keep their case
    parser.read(DEPLOY / "ppsd.service")
    return parser["Service"]


def commands() -> dict[str, list[str]]:
    """Return the flags of each file that starts the server."""
    start = shlex.split(unit()["ExecStart"])
    assert start[:2] == ["/opt/ppsd/bin/ppsd", "serve"]
    return {"compose": shlex.split(compose()["services"]["ppsd"]["command"]), "unit": start[2:]}


@pytest.mark.parametrize("name", ["compose", "unit"])
def test_the_server_takes_the_flags(name, tmp_path) -> None:
    """It refuses nothing but the model, which comes last."""
    flags = commands()[name]
    key = tmp_path / "key"
    key.write_text("k")
    flags[flags.index("--api-key-file") + 1] = str(key)
    if "--port" in flags:
        flags[flags.index("--port") + 1] = "0"
    else:
        flags += ["--port", "0"]
    assert "/no/such" in str(ppsd("serve", *flags, "--model", "/no/such").exception)


def test_supervisors_wait_longer_than_the_server() -> None:
    drain = {
        name: float(flags[flags.index("--drain-timeout") + 1]) for name, flags in commands().items()
    }
    grace = compose()["services"]["ppsd"]["stop_grace_period"]
    assert int(grace[:-1]) * SECONDS[grace[-1]] > drain["compose"]
    assert int(unit()["TimeoutStopSec"]) > drain["unit"]
    assert unit()["KillMode"] == "mixed"


def test_compose_names_what_is_there(server) -> None:
    services = compose()["services"]
    build = services["ppsd"]["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert (root / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert (root / "pyproject.toml").exists()
    for service in services.values():
        for secret in service.get("secrets", ()):
            assert secret in compose()["secrets"]
    [check] = re.findall(
        r'"http://127.0.0.1:8000(/\w+)"', services["ppsd"]["healthcheck"]["test"][3]
    )
    assert server.client.get(check).status_code == 200
    compile(services["ppsd"]["healthcheck"]["test"][3], "healthcheck", "exec")


def test_prometheus_asks_the_service_of_compose() -> None:
    loaded = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    [job] = loaded["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    flags = commands()["compose"]
    assert name in compose()["services"]
    assert port == flags[flags.index("--port") + 1]
    assert job["authorization"]["credentials_file"] == flags[flags.index("--api-key-file") + 1]


def test_the_dashboard_names_only_metrics_that_exist(server) -> None:
    """Labels and quantiles, too."""
    server.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "ignore_eos": True})
    samples = server.client.get("/metrics").text
    known = {re.split("[ {]", line)[0] for line in samples.splitlines() if line[0] != "#"}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"ppsd:\w+", expression)}
    assert len(asked) > 8
    assert asked <= known
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        for label in re.findall(r"by \((\w+)\)", expression):
            [name] = re.findall(r"ppsd:\w+", expression)
            assert re.search(rf"^{name}{{[^}}]*\b{label}=", samples, re.MULTILINE)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_nginx_takes_as_much_as_the_server() -> None:
    [megabytes] = re.findall(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx.conf").read_text())
    assert int(megabytes) << 20 == MAX_BODY


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_a_stream_comes_through_nginx_piece_by_piece(server: Served, tmp_path) -> None:
    """The file itself, but for the addresses and TLS."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (DEPLOY / "nginx.conf").read_text()
    text = text.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    text = text.replace("443 ssl", f"127.0.0.1:{port}")
    text = re.sub(r"\n *ssl_certificate.*", "", text)
    places = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = tmp_path / "nginx.conf"
    file.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {places}\n{text}\n}}\n"
    )
    process = subprocess.Popen(["nginx", "-c", file, "-p", tmp_path, "-e", "stderr"])
    try:
        times = _streamed(f"http://127.0.0.1:{port}")
        assert len(times) > 20
        assert times[-1] - times[0] > 0.05
        assert len({round(each, 3) for each in times}) > 10
    finally:
        process.terminate()
        process.wait(20)


def _streamed(url: str) -> list[float]:
    """Return when each event of a stream came."""
    body = {"prompt": "pack my box", "max_tokens": 60, "ignore_eos": True, "stream": True}
    end = time.monotonic() + 20
    while True:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                assert response.status_code == 200
                return [time.monotonic() for line in response.iter_lines() if line]
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.1)
