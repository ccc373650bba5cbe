"""Requests in a row against ``ppsd serve``, some of whose clients vanish. A program, not a test.

    python -m tests.stress.serving --out docs/results/serve/disconnects.json

The model is a tiny random one in two stages, both in the server's process: HTTP is on trial here,
and ``tests.stress.lifecycle`` tries processes. Memory, descriptors and threads are noted on the
way. Exits with 1 if a request was answered wrongly or anything still grows in the second half. Two
minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ppsd.provenance import provenance
from tests.support.tiny_models import save_tiny

FLAGS = (
    "--split 3 --head untrained --mode ppsd --rows 2 --concurrent 4 --dtype float32 --plan off "
    "--threads-per-stage 1 --prefill-chunk 16 --transport inprocess --port 0 "
    "--served-model-name tiny"
)
PATH = "/v1/completions"
FIRST = {"prompt": list(range(3, 60)), "max_tokens": 40, "ignore_eos": True, "seed": 1}
GROWTH = 4 << 20  # bytes of memory in the second half that count as flat


@contextmanager
def server(model: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Start the server; give its process and port."""
    command = [sys.executable, "-m", "ppsd", "serve", "--model", str(model), *FLAGS.split()]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, text=True)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", _read(log))):
                assert process.poll() is None, _read(log)
                time.sleep(0.1)
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.terminate()
            process.wait(60)


def _read(log: Any) -> str:
    log.seek(0)
    text: str = log.read()
    return text


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[int, bytes]:
    """Send a request and return status and answer."""
    connection.request("POST", PATH, json.dumps(body))
    response = connection.getresponse()
    return response.status, response.read()


def vanish(port: int, body: dict[str, Any], rng: random.Random) -> None:
    """Send a request and go away: at once, in its prompt, or in its answer."""
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    request = head.encode() + data
    cut = rng.randrange(len(request)) if rng.random() < 0.2 else len(request)
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(request[:cut])
        time.sleep(rng.choice((0.0, 0.0, 0.002, 0.01)))
        if rng.random() < 0.3 and cut == len(request):
            connection.recv(rng.randrange(1, 4096))


def body_of(rng: random.Random) -> dict[str, Any]:
    """Return a request of any kind."""
    body = {
        "prompt": [rng.randrange(3, 290) for _ in range(rng.randrange(1, 24))],
        "max_tokens": rng.randrange(1, 5),
        "ignore_eos": True,
        "stream": rng.random() < 0.5,
        "seed": rng.randrange(1000),
        "temperature": rng.choice((0.0, 0.8)),
    }
    if rng.random() < 0.2:
        body |= {"logprobs": 2, "echo": True}
    return body


def resources(process: psutil.Process) -> dict[str, int]:
    """Return what the server and its workers hold, in all."""
    family = [process, *process.children(recursive=True)]
    return {
        "memory": sum(each.memory_full_info().uss for each in family),
        "descriptors": sum(each.num_fds() for each in family),
        "threads": sum(each.num_threads() for each in family),
    }


def run(count: int, seed: int) -> dict[str, Any]:
    """Return what happened to so many requests."""
    rng, told = random.Random(seed), Counter[str]()
    samples: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as place, server(save_tiny(Path(place))) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        said = []  # to the same request before each sample, so that samples are alike
        for index in range(count + 1):
            if index % max(1, count // 20) == 0:
                said.append(json.loads(ask(connection, FIRST)[1])["choices"])
                time.sleep(1.0)
                samples.append({"requests": index, **resources(process)})
            if index == count:
                break
            body = body_of(rng)
            if rng.random() < 0.3:
                vanish(port, body, rng)
                told["vanished"] += 1
                continue
            status, answer = ask(connection, body)
            whole = answer.endswith(b"data: [DONE]\n\n") if body["stream"] else answer[:1] == b"{"
            told[f"{status}" if whole else "broken"] += 1
    same = all(choices == said[0] for choices in said)
    return {"outcomes": dict(told), "same_answer": same, "samples": samples}


def flat(samples: list[dict[str, int]]) -> bool:
    """Return True if nothing grows in the second half."""
    middle, last = samples[len(samples) // 2], samples[-1]
    held = all(last[name] <= middle[name] + 2 for name in ("descriptors", "threads"))
    return held and last["memory"] <= middle["memory"] + GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    begun = time.monotonic()
    result = run(asked.requests, asked.seed)
    result |= {
        "model": "tiny random Llama of 6 layers",
        "flags": FLAGS,
        "requests": asked.requests,
        "seconds": round(time.monotonic() - begun, 1),
        "flat": flat(result["samples"]),
        "provenance": provenance(),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("outcomes", "same_answer", "flat")}))
    answered = set(result["outcomes"]) <= {"200", "vanished"}
    return 0 if answered and result["same_answer"] and result["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
