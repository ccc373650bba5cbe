"""The files of docs/deploy fit the server: flags, paths and metrics exist."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ppsd.serve.schema import MAX_BODY
from tests.support.command import ppsd
from tests.support.http_server import Served
from tests.support.ports import free_port

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
SECONDS = {"s": 1, "m": 60}
OUTSIDE = {"host": "llm.example.org", "x-forwarded-for": "127.0.0.1"}
STREAM = {"prompt": "pack my box", "max_tokens": 60, "ignore_eos": True, "stream": True}


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


def test_the_page_of_the_server_names_all_metrics(server) -> None:
    text = (DEPLOY.parent / "serve.md").read_text().split("\n## Metrics\n")[1]
    listed = set(re.findall(r"`(\w+_\w+)(?:\{\w+\})?`", text))
    told = server.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE ppsd:(\w+) (\w+)", told, re.MULTILINE))
    known = {name for name in kinds if not name.endswith("_created")}
    assert known <= listed
    assert listed - known == {"hop_seconds", "recoveries_total"}


def test_nginx_takes_as_much_as_the_server() -> None:
    [megabytes] = re.findall(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx.conf").read_text())
    assert int(megabytes) << 20 == MAX_BODY


@pytest.fixture(scope="module")
def behind(server: Served, tmp_path_factory) -> Iterator[httpx.Client]:
    """Give a client of nginx with the file itself, but for the addresses and TLS."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    place = tmp_path_factory.mktemp("nginx")
    port = free_port()
    text = (DEPLOY / "nginx.conf").read_text()
    text = text.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    text = text.replace("443 ssl", f"127.0.0.1:{port}")
    text = re.sub(r"\n *ssl_certificate.*", "", text)
    places = "".join(
        f"{kind}_temp_path {place}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # whose workers could not write here
    file = place / "nginx.conf"
    file.write_text(
        f"{user} daemon off; pid {place}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {places}\n{text}\n}}\n"
    )
    process = subprocess.Popen(["nginx", "-c", file, "-p", place, "-e", "stderr"])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_for(client)
            yield client
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_stream_comes_through_nginx_piece_by_piece(behind: httpx.Client) -> None:
    with behind.stream("POST", "/v1/completions", json=STREAM) as response:
        assert response.status_code == 200
        times = [time.monotonic() for line in response.iter_lines() if line]
    assert len(times) > 20
    assert times[-1] - times[0] > 0.05
    assert len({round(each, 3) for each in times}) > 10


def test_who_leaves_nginx_leaves_the_server(behind: httpx.Client, server: Served) -> None:
    body = STREAM | {"prompt": list(range(3, 250)), "max_tokens": 250}
    body |= {"n": 8, "temperature": 1.0}
    with behind.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # its end would be the end of the connection
        next(lines)
        assert server.service.active == 8
    end = time.monotonic() + 30
    before = server.service.metrics.ends.labels("length")._value.get()
    while server.service.active and time.monotonic() < end:
        time.sleep(0.01)
    assert server.service.active == 0
    assert server.service.metrics.ends.labels("length")._value.get() == before


def test_nginx_lets_through_what_it_should(behind: httpx.Client) -> None:
    """Bodies as large as the server takes, and the id that nginx gives; not the live page."""
    assert behind.get("/v1/pipeline/events").status_code == 403
    for size, status in [(MAX_BODY - 99, 400), (MAX_BODY + 1, 413)]:
        content = b'{"wrong": "' + b" " * (size - 13) + b'"}'
        assert behind.post("/v1/completions", content=content).status_code == status
    assert re.fullmatch("[0-9a-f]{32}", behind.get("/v1/models").headers["x-request-id"])


def test_without_a_key_the_server_refuses_the_host_that_nginx_names(behind: httpx.Client) -> None:
    response = behind.get("/v1/models", headers={"host": "llm.example.org"})
    assert response.json()["error"]["code"] == "foreign_host"
    response = behind.get("/v1/models", headers={"x-forwarded-host": "localhost"} | OUTSIDE)
    assert response.json()["error"]["code"] == "foreign_host"
