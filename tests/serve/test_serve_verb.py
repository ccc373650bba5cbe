"""``ppsd serve`` as a process: how it starts, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ppsd.serve.logs import LOG, JsonFormatter
from tests.serve.conftest import TEMPLATE
from tests.support.command import ppsd
from tests.support.ports import free_port

FLAGS = (
    "--split 4 --dtype float64 --mode autoregressive --threads-per-stage 1 --port 0 "
    "--served-model-name tiny"
)
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "ignore_eos": True}


@contextmanager
def launched(model: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command; give the process."""
    command = [sys.executable, "-m", "ppsd", "serve", "--model", str(model), *FLAGS.split(), *flags]
    command += ["--chat-template", TEMPLATE]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def started(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; give the process and its address once it serves."""
    with launched(model, *flags) as process:
        assert process.stderr is not None
        lines = []
        while not (found := re.search(r"serving tiny at (http\S+)/v1, ", "".join(lines[-1:]))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield process, found[1]


def read(line: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return event


def test_a_signal_lets_requests_end_and_a_second_one_does_not(tiny_model) -> None:
    """One is under way, another waits; its client hears why it gets no answer."""
    long = {**BODY, "max_tokens": 450, "stream": True}
    with started(tiny_model(), "--transport", "inprocess") as (process, url):
        path = f"{url}/v1/chat/completions"
        with (
            httpx.stream("POST", path, json={**BODY, "stream": True}, timeout=60) as first,
            httpx.stream("POST", path, json=long, timeout=60) as second,
        ):
            lines, others = first.iter_lines(), second.iter_lines()
            assert next(lines).startswith("data: ")
            assert next(others).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
            assert events.pop() == "data: [DONE]"
            assert read(events[-1])["choices"][0]["finish_reason"] == "length"
            process.send_signal(signal.SIGINT)
            error = read([line for line in others if line][-1])["error"]
            assert error["message"] == "the server is ending"
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_it_says_that_it_loads_and_a_closed_terminal_lets_requests_end(tiny_model) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
        url = f"http://[::1]:{free.getsockname()[1]}"
    flags = ("--transport", "inprocess", "--host", "::1", "--port", url.rsplit(":", 1)[1])
    with (
        launched(tiny_model(), *flags) as process,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        seen: list[httpx.Response] = []
        while process.poll() is None and (not seen or seen[-1].status_code != 200):
            with suppress(httpx.TransportError):  # nobody listens yet, or has just stopped to
                seen.append(client.get("/health", headers={"connection": "close"}))
            time.sleep(0.02)
        assert seen[0].status_code == 503
        assert seen[0].json()["error"]["code"] == "loading"
        assert seen[0].headers["retry-after"] == "1"
        assert len(seen[0].headers["x-request-id"]) == 32
        path = "/v1/chat/completions"
        with client.stream("POST", path, json={**BODY, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGHUP)
            assert [line for line in lines if line].pop() == "data: [DONE]"
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_model_is_loaded_ends_it_without_an_error(tiny_model, number) -> None:
    port = free_port()
    with launched(tiny_model(), "--port", str(port)) as process:
        told = None
        while told is None:
            with suppress(httpx.TransportError):  # nobody listens yet
                told = httpx.get(f"http://127.0.0.1:{port}/health")
        assert told.json()["error"]["code"] == "loading"
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert psutil.wait_procs(workers, 10)[1] == []


def test_a_lost_worker_ends_the_server_though_nobody_asks(tiny_model) -> None:
    with started(tiny_model()) as (process, _):
        [worker] = psutil.Process(process.pid).children()
        worker.kill()
        assert process.stderr is not None
        assert f"stage 1 (pid {worker.pid}) was killed" in process.stderr.read()
        assert process.wait(30) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--host 0.0.0.0", "host must be a loopback address"),
        ("--api-key-file /no/such", "api_key_file must be a readable file (No such file"),
        ("--ssl-keyfile /no/such", "ssl_keyfile must be used with --ssl-certfile"),
        ("--port 70000", "port must be an integer in [0, 65535]"),
        ("--log-format xml", "log_format must be one of text, json"),
        ("--max-queue -1", "max_queue must be an integer in [0, "),
        ("--host no.such.host.invalid --insecure", "cannot listen on no.such.host.invalid:8000"),
    ],
)
def test_a_wrong_flag_is_refused_before_the_model_is_loaded(flags, told) -> None:
    error = str(ppsd("serve", "--model", "/no/such", *flags.split()).exception)
    assert told in error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port = '1'", "port must be an integer"),
        ("api_key = 3", "api_key must be a text, got 3"),
        ("insecure = 1", "insecure must be True or False"),
        ("served_model_name = [1]", "served_model_name must be a text, got 1"),
        ("host = '0.0.0.0'\napi_key = 'k'\nmetrics_prefix = ' '", "metrics_prefix must be letters"),
        ("hots = 'x'", "unknown setting 'hots'; did you mean host?"),
    ],
)
def test_a_file_sets_the_server_too(text, told, tmp_path) -> None:
    file = tmp_path / "ppsd.toml"
    file.write_text(text)
    assert told in str(ppsd("serve", "--config", file).exception)


def test_a_variable_holds_the_key(monkeypatch) -> None:
    monkeypatch.setenv("PPSD_API_KEY", "k")
    error = str(ppsd("serve", "--host", "192.0.2.1", "--model", "/no/such").exception)
    assert error.startswith("cannot listen on 192.0.2.1:8000")  # which a key had to allow


def test_a_bug_report_does_not_tell_the_key(monkeypatch) -> None:
    monkeypatch.setenv("PPSD_API_KEY", "hush-hush")
    for flags in ((), ("--json",)):
        said = ppsd("env", *flags).stdout
        assert "PPSD_API_KEY" in said
        assert "hush-hush" not in said


def test_the_settings_are_shown_with_their_origins(monkeypatch, tmp_path) -> None:
    """As a file that sets the same, and without the key."""
    file = tmp_path / "ppsd.toml"
    file.write_text("max_queue = 7\nport = 1\nserved_model_name = ['a', 'b']\nmode = 'ppsd'")
    monkeypatch.setenv("PPSD_PORT", "2")
    monkeypatch.setenv("PPSD_API_KEY", "hush-hush")
    said = ppsd("serve", "--config", file, "--print-config", "--drain-timeout", 3).stdout
    assert "hush-hush" not in said
    lines = said.splitlines()
    for line in [
        f"max_queue = 7  # {file}",
        f'served_model_name = ["a", "b"]  # {file}',
        "port = 2  # PPSD_PORT",
        "# api_key  # PPSD_API_KEY",
        "drain_timeout = 3.0  # flag",
        'host = "127.0.0.1"',
        "# ssl_certfile",
    ]:
        assert line in lines
    shown = tomllib.loads(said)
    file.write_text(said)
    monkeypatch.delenv("PPSD_PORT")
    monkeypatch.delenv("PPSD_API_KEY")
    again = ppsd("serve", "--config", file, "--print-config").stdout
    assert tomllib.loads(again) == shown


def test_a_line_of_the_log_may_be_json() -> None:
    record = LOG.makeRecord(LOG.name, logging.INFO, "", 0, "a b=1", (), None)
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["message"]) == ("INFO", "a b=1")
    record.request = {"id": "chatcmpl-1", "prompt_tokens": 3}
    line = json.loads(JsonFormatter().format(record))
    assert (line["id"], line["prompt_tokens"], "message" in line) == ("chatcmpl-1", 3, False)


def test_every_line_of_the_log_is_json_if_asked(tiny_model) -> None:
    """Notices and uvicorn's own lines, too."""
    flags = ("--transport", "inprocess", "--log-format", "json")
    with started(tiny_model(), *flags) as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b"400" in connection.recv(1 << 16)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    told = {line["message"]: line["level"] for line in lines}
    assert told["Invalid HTTP request received."] == "WARNING"
    assert any(text.startswith("no trained exit head") for text in told)


def test_a_certificate_that_is_none_is_told_before_the_model_is_loaded(tmp_path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("no certificate")
    error = str(ppsd("serve", "--model", "/no/such", "--port", 0, "--ssl-certfile", file).exception)
    assert error.startswith("ssl_certfile must be a certificate in PEM")


def test_a_rank_above_0_serves_its_stage_alone(tiny_model, monkeypatch) -> None:
    """It listens to no client, so it needs neither a free port nor key and certificate."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = str(free.getsockname()[1])
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_PORT", meeting)
    seen = []
    monkeypatch.setattr("ppsd.worker.process.serve_rank", lambda model, _: seen.append(model))
    flags = "--host 0.0.0.0 --ssl-certfile /no/such --transport distributed --stages 2"
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        done = ppsd("serve", *flags.split(), "--port", port, "--model", tiny_model())
        key = ppsd("serve", *flags.split(), "--api-key-file", "/no/such", "--model", tiny_model())
    assert (done.exception, done.exit_code, key.exit_code) == (None, 0, 0)
    assert seen == [str(tiny_model())] * 2


def test_a_setting_that_this_machine_cannot_have_says_who_set_it(monkeypatch) -> None:
    monkeypatch.setenv("PPSD_HOST", "0.0.0.0")
    refused = ppsd("serve", "--model", "/no/such").exception
    assert getattr(refused, "__notes__", None) == ["host is set by PPSD_HOST"]


def test_an_address_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = str(ppsd("serve", "--model", "/no/such", "--port", port).exception)
    assert error == f"cannot listen on 127.0.0.1:{port}: Address already in use"
