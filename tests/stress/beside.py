"""``ppsd serve`` beside llama.cpp's own server, on the same file and cores. A program, not a test.

    pip install xllamacpp==2026.10.11549     # llama-server as a library: nothing to compile
    python -m tests.stress.beside --out docs/results/serve/beside-llama.json --guidellm guidellm

Both serve the embedded model's GGUF file to as many requests at once, with defaults otherwise, and
take turns: each prompt alone, then all prompts at once, round after round. Counts also how many
answers change when others run beside them, and what a server costs while the other one works. At
last guidellm, where its command is given, measures either (``pip install guidellm==0.8.1``, in an
environment of its own: it brings its own PyTorch).
Four minutes where nothing else runs; anything else that runs spoils the times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ppsd.model.source import resolve_model
from ppsd.provenance import provenance
from tests.stress.client import at_once

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds an old map.",
    "List five uses of a brick.",
    "Explain what a hash table is to a child.",
    "Translate to French: the weather is fine today.",
    "Write a Python function that reverses a string.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Give me a recipe for pancakes.",
)
RIVAL = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames = sys.argv[1], ["127.0.0.1"]
params.port, params.n_parallel, threads = map(int, sys.argv[2:])
params.n_ctx = 2048 * params.n_parallel
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print(f"serving at {server.listening_address}", file=sys.stderr, flush=True)
threading.Event().wait()
"""


class Server(NamedTuple):
    """A server under way."""

    name: str
    process: psutil.Process
    port: int


@contextmanager
def started(name: str, command: list[str]) -> Iterator[Server]:
    """Start a server and wait until it says where it listens."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        try:
            while True:
                log.seek(0)
                text = log.read()
                if found := re.search(r"serving .*http://127\.0\.0\.1:(\d+)", text):
                    break
                assert process.poll() is None, text
                time.sleep(0.1)
            yield Server(name, psutil.Process(process.pid), int(found[1]))
        finally:
            process.terminate()
            process.wait(60)


def cpu(server: Server) -> float:
    """Return the CPU seconds of a server and its workers so far."""
    family = [server.process, *server.process.children(recursive=True)]
    return float(sum(sum(each.cpu_times()[:2]) for each in family))


def summary(alone: list[dict[str, Any]], together: list[Any], idle: list[float]) -> dict[str, Any]:
    """Return what one server did in all rounds; ``together``: (seconds, streams) of each."""
    count = len(PROMPTS)
    speeds = [(s["tokens"] - 1) / (s["times"][-1] - s["times"][0]) for s in alone]
    texts = [stream["text"] for stream in alone]
    beside = [stream["text"] for _, streams in together for stream in streams]
    return {
        "alone_tokens_per_second": statistics.median(speeds),
        "alone_first_token_ms": 1e3 * statistics.median(s["times"][0] for s in alone),
        "together_tokens_per_second": statistics.median(
            sum(stream["tokens"] for stream in streams) / seconds for seconds, streams in together
        ),
        "together_first_token_ms": 1e3
        * statistics.median(s["times"][0] for _, streams in together for s in streams),
        "answers_that_change_together": sum(a != b for a, b in zip(texts, beside, strict=True)),
        "answers_that_change_alone": sum(
            a != b for a, b in zip(texts, texts[count:], strict=False)
        ),
        "answers": len(texts),
        "idle_cpu_share": statistics.median(idle),
    }


def measure(servers: list[Server], rounds: int, tokens: int) -> dict[str, Any]:
    """Return the figures of each server."""
    bodies = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for prompt in PROMPTS
    ]
    found: dict[str, Any] = {server.name: ([], [], []) for server in servers}
    for server in servers:  # warm
        at_once(server.port, bodies)
    for index in range(rounds):
        for server in servers if index % 2 else servers[::-1]:
            [other] = [each for each in servers if each is not server]
            alone, together, _ = found[server.name]
            begun, spent = time.monotonic(), cpu(other)
            alone += [at_once(server.port, [body])[0] for body in bodies]
            start = time.monotonic()
            streams = at_once(server.port, bodies)
            end = time.monotonic()
            together.append((end - start, streams))
            found[other.name][2].append((cpu(other) - spent) / (end - begun))
    return {name: summary(*figures) for name, figures in found.items()}


def guided(command: str, server: Server, tokens: int) -> dict[str, Any]:
    """Return what guidellm says of a server, asked three times by as many clients as prompts."""
    with tempfile.TemporaryDirectory() as place:
        prompts, out = Path(place, "prompts.txt"), Path(place, "out.json")
        prompts.write_text("\n".join(PROMPTS * 3) + "\n")
        url = f"http://127.0.0.1:{server.port}"
        flags = {
            "--backend": f"kind=openai_http,target={url},max_tokens={tokens}",
            "--profile": f"kind=concurrent,streams={len(PROMPTS)}",
            "--constraint": f"kind=max_requests,count={len(PROMPTS) * 3}",
            "--data": f"kind=text_file,path={prompts}",
            "--output": f"kind=json,path={out}",
        }
        words = [word for flag in flags.items() for word in flag]
        subprocess.run([command, "run", *words, "--disable-console"], check=True)
        [benchmark] = json.loads(out.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    names = ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")
    return {
        "requests": metrics["request_totals"],
        "output_tokens_per_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "medians": {name: metrics[name]["successful"]["median"] for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--guidellm", metavar="COMMAND")
    parser.add_argument("--flags", default="", help="more flags of ppsd serve")
    asked = parser.parse_args()
    many, cores = str(len(PROMPTS)), str(len(os.sched_getaffinity(0)))
    file = str(resolve_model(None).path)
    ours = [sys.executable, "-m", "ppsd", "serve", "--port", "0", "--concurrent", many]
    ours += ["--max-context", "2048", *asked.flags.split()]
    rival = [sys.executable, "-c", RIVAL, file, "0", many, cores]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(started("llama.cpp", rival)),
            stack.enter_context(started("ppsd", ours)),
        ]
        result = measure(servers, asked.rounds, asked.tokens)
        if asked.guidellm:
            for server in servers:
                found = guided(asked.guidellm, server, asked.tokens)
                result[server.name]["guidellm"] = found
    result |= {
        "file": Path(file).name,
        "at_once": len(PROMPTS),
        "tokens": asked.tokens,
        "rounds": asked.rounds,
        "flags": ours[3:],
        "xllamacpp": version("xllamacpp"),
        "provenance": provenance(),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("llama.cpp", "ppsd")}, indent=1))


if __name__ == "__main__":
    main()
