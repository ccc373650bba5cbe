"""Interrupts at random instants, and forks, against an LLM at work. A program, not a test.

    python -m tests.stress.lifecycle --out docs/results/lifecycle/stress.json

Each interrupt is followed by a request that must give the tokens of the undisturbed one; each
forked child uses, reads, drops or closes the LLM, or exits, while the parent decodes, and the
parent's answer must be right. Exits with 1 if anything was not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch

from ppsd import LLM, SamplingParams
from ppsd.errors import PpsdError
from ppsd.provenance import provenance
from tests.support.tiny_models import save_tiny

TRANSPORTS = ("shared-memory", "inprocess", "distributed")
PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
CHILD_S = 60.0  # what a child may take to end
ENDINGS = ("exit", "drop", "close", "use", "read")


class Alarm(KeyboardInterrupt):
    """An interrupt that was planted here."""


def open_llm(model: Path, transport: str) -> LLM:
    settings: dict[str, Any] = {"head": "untrained", "plan": "off", "dtype": "float32"}
    return LLM(str(model), split=(2, 4), transport=transport, threads_per_stage=1, **settings)


@contextmanager
def interrupted_within(seconds: float) -> Iterator[None]:
    """Raise Alarm in this thread at a random instant of the next ``seconds``, if still inside."""

    def strike(number: int, frame: FrameType | None) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, seconds))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupts(model: Path, transport: str, times: int) -> Counter[str]:
    """Interrupt ``generate`` and ``stream`` in turn; what became of the request after each."""
    seen: Counter[str] = Counter()
    with open_llm(model, transport) as llm:
        want, seconds = timed(llm)
        while seen["interrupts"] < times:
            try:
                with interrupted_within(seconds):
                    if seen["interrupts"] % 2:
                        llm.generate(PROMPT, PARAMS)
                    else:
                        for _ in llm.stream(PROMPT, PARAMS):
                            pass
                continue  # it was over before
            except Alarm:
                seen["interrupts"] += 1
            seen[judged(llm, want)] += 1
    return seen


def timed(llm: LLM) -> tuple[tuple[int, ...], float]:
    """The right answer, and what it takes."""
    llm.generate(PROMPT, PARAMS)
    start = time.monotonic()
    return llm.generate(PROMPT, PARAMS)[0].token_ids, time.monotonic() - start


def judged(llm: LLM, want: tuple[int, ...]) -> str:
    try:
        return "right" if llm.generate(PROMPT, PARAMS)[0].token_ids == want else "wrong"
    except PpsdError as error:
        print(f"dead: {error}", file=sys.stderr)
        return "dead"


def forks(
    model: Path, transport: str, times: int, endings: Sequence[str] = ENDINGS
) -> Counter[str]:
    """Fork in the middle of a stream; what became of the stream, and how the children ended."""
    seen: Counter[str] = Counter()
    holder = [open_llm(model, transport)]
    want, _ = timed(holder[0])
    for turn in range(times):
        stream, tokens = holder[0].stream(PROMPT, PARAMS), []
        fork_after = random.randrange(30)
        for count, chunk in enumerate(stream):
            tokens += chunk.token_ids
            if count == fork_after:
                pid = os.fork()
                if pid == 0:
                    be_child(endings[turn % len(endings)], holder, stream)
        seen["forks"] += 1
        seen["right" if tuple(tokens) == want else "wrong"] += 1
        seen["children in order" if ended_well(pid) else "children astray"] += 1
        seen[judged(holder[0], want)] += 1
    holder.pop().close()
    return seen


def be_child(how: str, holder: list[LLM], stream: Any) -> NoReturn:
    """Do to the parent's LLM what a child may do; end with 0 if all went as it should."""
    code = 1
    try:
        if how == "drop":
            del stream
            holder.clear()
            gc.collect()
        elif how == "close":
            holder[0].close()
        elif how in ("use", "read"):
            act: Callable[[], Any] = (
                (lambda: next(stream)) if how == "read" else (lambda: holder[0].generate([5]))
            )
            try:
                act()
            except PpsdError as error:
                code = 0 if "forked child" in str(error) else 1
            os._exit(code)
        code = 0
    finally:
        if how == "exit":  # as the interpreter ends a program: unwinding, handlers, destructors
            sys.exit(code)
        os._exit(code)


def ended_well(pid: int) -> bool:
    deadline = time.monotonic() + CHILD_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> int:
    """Run all; print and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--interrupts", type=int, default=200)
    parser.add_argument("--forks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"interrupts": {}, "forks": {}}
    origin = provenance()  # of the code that has been loaded, whatever is committed meanwhile
    place, owner = Path(tempfile.mkdtemp()), os.getpid()
    try:
        model = save_tiny(place / "model")
        for i, transport in enumerate(TRANSPORTS):
            for name, run, total in (
                ("interrupts", interrupts, options.interrupts),
                ("forks", forks, options.forks),
            ):
                share = total // len(TRANSPORTS) + (i < total % len(TRANSPORTS))
                seen = run(model, transport, share)
                result[name][transport] = dict(sorted(seen.items()))
                print(name, transport, result[name][transport], flush=True)
    finally:
        if os.getpid() == owner:  # children that exit come by here, too
            shutil.rmtree(place)
    left = [child.pid for child in psutil.Process().children(recursive=True)]
    result["processes left"] = len(left)
    bad = [c for by in (result["interrupts"], result["forks"]) for c in by.values()]
    failed = any(c.get(k) for c in bad for k in ("wrong", "dead", "children astray"))
    result |= {"passed": not (failed or left), "seed": options.seed, "provenance": origin}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
