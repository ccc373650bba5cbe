"""Many requests at once: waves against plain continuous batching, on the same workers.

Used by ``ppsd-lab load``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ppsd.engine.llm import LLM
from ppsd.lab.runner import PLAIN
from ppsd.lab.tasks import PPSD
from ppsd.types import SamplingParams


@dataclass(frozen=True)
class Load:
    """Some prompts, ``concurrent`` of them under way at once, in one variant.

    ``seconds`` for all ``tokens``, prompts included; ``speed`` is their quotient, ``ratio`` that
    over plain decoding's. ``differing`` counts answers that are not those of plain decoding alone.
    ``longest`` is the longest time that any answer took.
    """

    variant: str
    concurrent: int
    requests: int
    tokens: int
    seconds: float
    speed: float
    ratio: float
    differing: int
    longest: float


def measure(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    counts: Sequence[int],
    done: Callable[[Load], None],
) -> Iterator[Load]:
    """Decode the prompts with so many at once, plain and by PPSD in turn."""
    mode = llm.config.mode
    llm.use("autoregressive")
    alone = [llm.run(ids, params).token_ids for ids in prompts]
    for count in counts:
        speeds: dict[str, float] = {}
        for variant in (PLAIN, PPSD):
            llm.use("autoregressive" if variant == PLAIN else mode)
            start = llm.now()
            with ThreadPoolExecutor(count) as clients:  # each asks again once it is answered
                answers = list(clients.map(lambda ids: llm.run(ids, params), prompts))
            seconds = llm.now() - start
            tokens = sum(len(answer.token_ids) for answer in answers)
            speeds[variant] = tokens / seconds
            found = Load(
                variant=variant,
                concurrent=count,
                requests=len(prompts),
                tokens=tokens,
                seconds=seconds,
                speed=speeds[variant],
                ratio=speeds[variant] / speeds[PLAIN],
                differing=sum(a.token_ids != b for a, b in zip(answers, alone, strict=True)),
                longest=max(a.stats.prefill_seconds + a.stats.decode_seconds for a in answers),
            )
            done(found)
            yield found
