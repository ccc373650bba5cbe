"""The cost of HTTP over ``LLM.stream`` on the same pipeline. A program, not a test.

    python -m tests.stress.overhead --out docs/results/serve/overhead.json

Loads the embedded model once. One stream through HTTP and one without take turns: the ratio of
their speeds, and how much later the first token comes. Then many streams run at once, and the CPU
time of the threads that speak HTTP is set against that of engine and stages. Half a minute to
three where nothing else runs; anything else that runs spoils it. One turn says little: on two
cores ratios of single turns spread over a tenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from ppsd import LLM, SamplingParams
from ppsd.provenance import provenance
from tests.stress.client import Client
from tests.support.http_server import serving

MESSAGES = [{"role": "user", "content": "Write a short story about a lighthouse keeper."}]
SETTINGS: dict[str, Any] = {"stages": 2, "mode": "autoregressive", "max_context": 512}


def direct(llm: LLM, tokens: int) -> dict[str, Any]:
    """Return when the pieces of a stream without HTTP came."""
    begun, times = time.monotonic(), []
    for chunk in llm.stream(MESSAGES, SamplingParams(max_tokens=tokens, ignore_eos=True)):
        if chunk.text:
            times.append(time.monotonic() - begun)
    return {"times": times, "tokens": tokens}


def speed(found: dict[str, Any]) -> float:
    """Return tokens per second after the first piece."""
    times: list[float] = found["times"]
    return float((found["tokens"] - 1) / (times[-1] - times[0]))


def cpu(llm: LLM, http: set[int]) -> tuple[float, float]:
    """Return the CPU seconds so far of the threads ``http``, and of all others that compute."""
    process, main = psutil.Process(), threading.main_thread().native_id
    threads = {each.id: each.user_time + each.system_time for each in process.threads()}
    workers = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in llm.pids)
    engine = sum(seconds for id, seconds in threads.items() if id not in http and id != main)
    return sum(threads[id] for id in http & threads.keys()), engine + workers


def measure(llm: LLM, client: Client, repeats: int, tokens: int, many: int) -> dict[str, Any]:
    """Return the figures of one stream and of many."""
    ask = {"messages": MESSAGES, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    before = {thread.native_id for thread in threading.enumerate()}
    with serving(llm, max_queue=many) as served:
        port = int(served.url.rsplit(":", 1)[1])
        client.ask(port, [ask])
        http = {t.native_id for t in threading.enumerate()} - before - {None}
        plain, through = [], []
        for index in range(repeats):
            turns = [plain, through] if index % 2 else [through, plain]
            for turn in turns:
                turn.append(direct(llm, tokens) if turn is plain else client.ask(port, [ask])[0])
        start = cpu(llm, http)  # type: ignore[arg-type]  # threads under way have ids
        streams = client.ask(port, [ask | {"max_tokens": tokens // 2}] * many)
        end = cpu(llm, http)  # type: ignore[arg-type]  # as above
    pairs = list(zip(through, plain, strict=True))
    ratios = [speed(a) / speed(b) for a, b in pairs]
    return {
        "one_stream": {
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "first_token_later_ms": 1e3
            * statistics.median(a["times"][0] - b["times"][0] for a, b in pairs),
            "tokens_per_second": [[speed(a), speed(b)] for a, b in pairs],
        },
        "many_streams": {
            "streams": many,
            "tokens": sum(stream["tokens"] for stream in streams),
            "http_cpu_seconds": end[0] - start[0],
            "engine_cpu_seconds": end[1] - start[1],
            "share": (end[0] - start[0]) / (end[1] - start[1]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--model", help="the embedded one if left out")
    asked = parser.parse_args()
    with Client() as client, LLM(asked.model, concurrent=asked.streams, **SETTINGS) as llm:
        result = measure(llm, client, asked.repeats, asked.tokens, asked.streams)
    result |= {"settings": SETTINGS, "provenance": provenance()}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["one_stream"] | result["many_streams"]))


if __name__ == "__main__":
    main()
