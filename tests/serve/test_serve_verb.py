"""``ppsd serve`` as a process: how it starts, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.conftest import TEMPLATE
from tests.support.command import ppsd

FLAGS = (
    "--split 4 --dtype float64 --mode autoregressive --threads-per-stage 1 --port 0 "
    "--served-model-name tiny"
)
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "ignore_eos": True}


@contextmanager
def started(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; give the process and its address."""
    command = [sys.executable, "-m", "ppsd", "serve", "--model", str(model), *FLAGS.split(), *flags]
    command += ["--chat-template", TEMPLATE]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = []
        while not (found := re.search(r"serving tiny at (http\S+)/v1, ", "".join(lines[-1:]))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_a_signal_ends_the_server_once_its_requests_are_answered(tiny_model) -> None:
    with (
        started(tiny_model(), "--transport", "inprocess") as (process, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
        assert events.pop() == "data: [DONE]"
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0


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
        ("--max-queue -1", "max_queue must be an integer in [0, "),
        ("--host no.such.host.invalid --insecure", "cannot listen on no.such.host.invalid:8000"),
    ],
)
def test_a_wrong_flag_is_refused_before_the_model_is_loaded(flags, told) -> None:
    error = str(ppsd("serve", "--model", "/no/such", *flags.split()).exception)
    assert told in error


def test_an_address_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = str(ppsd("serve", "--model", "/no/such", "--port", port).exception)
    assert error == f"cannot listen on 127.0.0.1:{port}: Address already in use"
