"""A decoder in a process of its own, asked over standard input and output.

``python -m ppsd.lab.outsider`` reads one JSON line that says what to load, answers ``{}`` once it
is loaded, then reads requests ``{"ids", "max_tokens"}`` and answers with token ids and times.
Decoding is greedy and ends at the model's end tokens.

PyTorch is imported once the cores are known. Its OpenMP counts them when it is loaded, and with
fewer cores than threads, as a pinned parent passes on, these sleep between any two products.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROMPT_LOOKUP_TOKENS = 10  # drafts a lookup may give; what transformers' own documentation uses


@dataclass
class Clock:
    """When tokens came: seconds of the monotonic clock, and how many at each of these times."""

    start: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def take(self, tokens: Sequence[int]) -> None:
        """Note tokens that came just now."""
        self.times.append(time.monotonic())
        self.tokens.append(list(tokens))

    def answer(self) -> dict[str, Any]:
        """Return token ids, and the time of those after the first batch of them (one, if plain)."""
        return {
            "ids": [token for part in self.tokens for token in part],
            "first_seconds": self.times[0] - self.start,
            "timed_tokens": sum(len(part) for part in self.tokens[1:]),
            "seconds": self.times[-1] - self.times[0],
        }


Answer = Callable[[list[int], int], dict[str, Any]]


class _Streamer:
    """What transformers calls with the prompt, and then with every new token."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt or new tokens."""
        if self._prompt_came:
            self.clock.take(value.reshape(-1).tolist())
        self._prompt_came = True

    def end(self) -> None:
        """Need nothing."""


def transformers(path: Path, dtype: str, options: dict[str, Any]) -> Answer:
    """Answer by ``generate`` of the transformers library with ``options``."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = {"gguf_file": path.name} if path.is_file() else {}
    place = path.parent if gguf else path
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **gguf)
    model.eval()

    def answer(ids: list[int], max_tokens: int) -> dict[str, Any]:
        streamer = _Streamer()
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
                streamer=streamer,
                **options,
            )
        return streamer.clock.answer()

    return answer


def one_process(path: Path, dtype: str, threads: int) -> Answer:
    """Answer by our own plain decoding, unsplit: every layer's products share all threads."""
    from ppsd.engine.llm import LLM
    from ppsd.types import SamplingParams

    llm = LLM(
        str(path), stages=1, mode="autoregressive", head="none", dtype=dtype,
        threads_per_stage=threads,
    )  # fmt: skip

    def answer(ids: list[int], max_tokens: int) -> dict[str, Any]:
        clock = Clock()
        for chunk in llm.stream(ids, SamplingParams(max_tokens=max_tokens)):
            if chunk.token_ids:
                clock.take(chunk.token_ids)
        return clock.answer()

    return answer


def rival(path: Path, dtype: str, threads: int, name: str) -> Answer:
    """Answer by a rival over all layers in this process, on our own kernels and cache."""
    from ppsd.engine.llm import LLM
    from ppsd.lab.rivals.rivals import Rivals
    from ppsd.types import SamplingParams

    llm = LLM(
        str(path), stages=1, mode="autoregressive", head="none", dtype=dtype,
        threads_per_stage=threads,
    )  # fmt: skip
    rivals = Rivals(llm)

    def answer(ids: list[int], max_tokens: int) -> dict[str, Any]:
        clock = Clock()
        rivals.run(name, ids, SamplingParams(max_tokens=max_tokens), clock.take)
        return clock.answer()

    return answer


def linears(path: Path, dtype: str) -> Answer:
    """Compute just the products of one row with all weights: what plain decoding costs at least.

    There is no text, so ``ids`` of its answers is None.
    """
    import torch

    from ppsd.model.layers import Product
    from ppsd.model.source import describe, resolve_model
    from ppsd.model.stage import Stage, StagePlan
    from ppsd.model.weights import open_source

    spec = describe(resolve_model(str(path)))
    place = getattr(torch, dtype), torch.device("cpu")
    plan = StagePlan(0, spec.num_layers, 2, *place, packed=True)
    stage = Stage(spec, plan, open_source(path))
    fused = operator.attrgetter("qkv", "o", "gate_up", "down")
    parts = [part for layer in stage.layers for part in fused(layer)]
    assert stage.lm_head is not None
    weights = (*parts, stage.lm_head)
    pairs = [(torch.ones(1, w.shape[1], dtype=w.dtype), Product(w)) for w in weights]

    def answer(ids: list[int], max_tokens: int) -> dict[str, Any]:
        clock = Clock()
        with torch.inference_mode():
            for _ in range(max_tokens):
                for x, product in pairs:
                    product(x)
                clock.take([0])
        return clock.answer() | {"ids": None}

    return answer


def llama_cpp(path: Path, threads: int) -> Answer:
    """Answer by llama.cpp on the same file, in the file's own quantisation."""
    model = importlib.import_module("llama_cpp").Llama(
        str(path), n_ctx=4096, n_threads=threads, verbose=False
    )

    def answer(ids: list[int], max_tokens: int) -> dict[str, Any]:
        clock = Clock()
        model.reset()
        for token in model.generate(ids, temp=0.0, top_k=1):
            clock.take([token])
            if len(clock.tokens) == max_tokens or token == model.token_eos():
                return clock.answer()
        return clock.answer()

    return answer


def load(record: dict[str, Any]) -> Answer:
    """Load what the first line asks for, on its cores."""
    if record["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, record["cores"])
    import torch

    torch.set_num_threads(record["threads"])
    path = Path(record["path"])
    if record["kind"] == "llama.cpp":
        return llama_cpp(path, record["threads"])
    if record["kind"] == "ppsd":
        return one_process(path, record["dtype"], record["threads"])
    if record["kind"] == "rival":
        return rival(path, record["dtype"], record["threads"], record["name"])
    if record["kind"] == "linears":
        return linears(path, record["dtype"])
    return transformers(path, record["dtype"], record["options"])


def main() -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for answers
    answer = load(json.loads(sys.stdin.readline()))
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = answer(request["ids"], request["max_tokens"])
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
