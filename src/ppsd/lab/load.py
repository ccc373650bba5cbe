"""Many requests at once: waves against plain continuous batching, on the same workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ppsd.engine.answer import Completion
from ppsd.engine.events import Event, FedBlock, FedRows, Left, Made
from ppsd.engine.llm import LLM
from ppsd.lab.runner import PLAIN
from ppsd.lab.tasks import PPSD
from ppsd.types import SamplingParams


@dataclass(frozen=True)
class Load:
    """Some prompts, ``concurrent`` of them under way at once, in one variant.

    ``seconds`` for all ``tokens``, prompts included; ``speed`` is their quotient, ``ratio`` that
    over plain decoding's. ``full_speed`` and ``full_ratio`` are those of the time in which all
    ``concurrent`` were decoding or had just begun (None if they never were): the first prompts and
    the last, longest answers are no part of it. ``differing`` counts answers that are not those of
    plain decoding alone. ``longest`` is the longest time that any answer took.

    Stage 0 ran ``waves`` with ``rows`` on average, and ``pieces`` of prompts. Of the tokens,
    ``hits`` is the share that was in flight when its verdict came.
    """

    variant: str
    concurrent: int
    requests: int
    tokens: int
    seconds: float
    speed: float
    ratio: float
    full_speed: float | None
    full_ratio: float | None
    differing: int
    longest: float
    waves: int
    rows: float
    pieces: int
    hits: float


class Meter:
    """Watches an engine answer ``requests``, at most ``concurrent`` at once."""

    def __init__(self, requests: int, concurrent: int) -> None:
        self.waves = self.rows = self.pieces = 0
        self._waiting = requests  # that have made no token
        self._least = min(requests, concurrent)
        self._decoding: set[int] = set()  # slots
        self._made: list[tuple[int, int]] = []  # (nanoseconds, tokens), while all are under way
        self._full = False

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, FedRows):
            self.waves += 1
            self.rows += len(event.rows)
        elif isinstance(event, FedBlock):
            self.pieces += 1
        elif isinstance(event, Made):
            self._hear(event)
        elif isinstance(event, Left):
            self._decoding.discard(event.slot)
            if len(self._decoding) + self._waiting < self._least:
                self._full = False

    def _hear(self, made: Made) -> None:
        if made.slot not in self._decoding:
            self._decoding.add(made.slot)
            self._waiting -= 1
            if len(self._decoding) == self._least and not self._made:
                self._full = True
        if self._full:
            self._made.append((made.time, len(made.tokens)))

    @property
    def full_speed(self) -> float | None:
        """Return the tokens a second while all were under way, None if they never were."""
        if not self._made or self._made[-1][0] == self._made[0][0]:
            return None
        begun, ended = self._made[0][0], self._made[-1][0]
        return sum(tokens for time, tokens in self._made if time > begun) * 1e9 / (ended - begun)


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
        plain: Load | None = None
        for variant in (PLAIN, PPSD):
            llm.use("autoregressive" if variant == PLAIN else mode)
            meter = Meter(len(prompts), count)
            llm.observe(meter)
            start = llm.now()
            clients = ThreadPoolExecutor(count)  # each asks again once it is answered
            try:
                answers = list(clients.map(lambda ids: llm.run(ids, params), prompts))
            finally:  # an interrupt does not wait for what is under way
                clients.shutdown(wait=False, cancel_futures=True)
            seconds = llm.now() - start
            llm.observe(None)
            differing = sum(a.token_ids != b for a, b in zip(answers, alone, strict=True))
            found = _load(variant, count, answers, seconds, meter, differing, plain)
            plain = plain or found
            done(found)
            yield found


def _load(
    variant: str,
    count: int,
    answers: Sequence[Completion],
    seconds: float,
    meter: Meter,
    differing: int,
    plain: Load | None,
) -> Load:
    tokens = sum(len(answer.token_ids) for answer in answers)
    speed, full = tokens / seconds, meter.full_speed
    beside = plain.full_speed if plain else full
    accepted = sum(sum(answer.accepted) for answer in answers)
    return Load(
        variant=variant,
        concurrent=count,
        requests=len(answers),
        tokens=tokens,
        seconds=seconds,
        speed=speed,
        ratio=speed / plain.speed if plain else 1.0,
        full_speed=full,
        full_ratio=full / beside if full and beside else None,
        differing=differing,
        longest=max(a.stats.prefill_seconds + a.stats.decode_seconds for a in answers),
        waves=meter.waves,
        rows=meter.rows / meter.waves if meter.waves else 0.0,
        pieces=meter.pieces,
        hits=accepted / tokens if tokens else 0.0,
    )
