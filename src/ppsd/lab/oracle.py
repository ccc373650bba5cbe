"""Requests timed on one pipeline in several modes, with drafts by an oracle of chosen acceptance.

An oracle peeks at the plain output, so figures show the pipeline apart from the quality of a head;
all of them say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppsd.engine.drafter import DraftState, Given
from ppsd.engine.llm import LLM, Completion
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.runner import PLAIN, Cell, Measurement
from ppsd.lab.timeline import Timeline, block_times
from ppsd.measure.workload import Task
from ppsd.speculation.sampling import Stream, uniform
from ppsd.types import SamplingParams

WINDOW = 64  # tokens at either end of a long request


class OracleDrafter:
    """Knows the plain output and is right with probability ``alpha``, decided by position.

    For measuring the pipeline apart from the quality of a head; figures made with it say so.
    ``plain`` is the whole plain sequence, prompt included.
    """

    feedback = False

    def __init__(self, plain: Sequence[int], alpha: float, vocab_size: int, seed: int = 0) -> None:
        self._vocab = vocab_size
        self._guesses = [  # made beforehand, as they would delay the pipeline
            token if uniform(seed, at, Stream.ACCEPT) < alpha else (token + 1) % vocab_size
            for at, token in enumerate(plain)
        ]

    def observe(self, state: DraftState, position: int, hidden: torch.Tensor) -> None:
        """Need nothing."""

    def draft(self, state: DraftState, given: Given) -> int:
        position = given.history.numel()
        return self._guesses[position] if position < len(self._guesses) else 0


@dataclass(frozen=True)
class Variant:
    """A mode, the acceptance rate of its oracle's drafts, and whether the gate may pause it."""

    mode: str
    block: int | None = None
    in_flight: int | None = None
    alpha: float | None = None
    gate: bool = False

    @property
    def name(self) -> str:
        """Return what measurements of it are called."""
        gated = " gated" if self.gate else ""
        return PLAIN if self.alpha is None else f"{self.mode}{gated} α={self.alpha:g}"


def placeholder() -> OracleDrafter:
    """Return a drafter to open a pipeline with, that has no exit head of its own."""
    return OracleDrafter([], 0.0, 2)


def end_times(arrivals: Sequence[int]) -> tuple[float, float] | None:
    """Return the seconds per token of the first and the last WINDOW tokens.

    ``arrivals`` in nanoseconds; None for fewer than two windows.
    """
    if len(arrivals) <= 2 * WINDOW:
        return None
    first, last = arrivals[WINDOW] - arrivals[0], arrivals[-1] - arrivals[-1 - WINDOW]
    return first / WINDOW / 1e9, last / WINDOW / 1e9


class OracleBench:
    """Measures variants on a pipeline opened with ``trace=True`` and at least two stages.

    Every request makes exactly ``tokens`` tokens after the first. Raises PpsdError when a mode with
    blocks of one token says anything but what plain decoding says. ``plain`` holds plain outputs by
    task, and is added to.
    """

    def __init__(
        self,
        llm: LLM,
        variants: Sequence[Variant],
        tasks: Sequence[Task],
        tokens: int,
        plain: dict[str, list[int]] | None = None,
    ) -> None:
        self._llm = llm
        self._variants = {variant.name: variant for variant in variants}
        self._prompts = {task.id: llm.encode(task.messages) for task in tasks}
        self._plain = {} if plain is None else plain
        longest = max(len(prompt) for prompt in self._prompts.values())
        room = llm.layout.max_context - longest - 1
        if not 1 <= tokens <= room:
            raise ConfigError("tokens", tokens, f"in [1, {room}] for these prompts")
        self._params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True)

    def measure(self, cell: Cell) -> Measurement:
        """Run one request and time it."""
        prompt, variant = self._prompts[cell.task], self._variants[cell.variant]
        if cell.task not in self._plain:  # also warms up
            self._plain[cell.task] = self._timed(prompt, Variant("autoregressive"))[0]
        plain = self._plain[cell.task]
        if variant.alpha is not None:
            vocabulary = self._llm.layout.spec.vocab_size
            self._llm.draft_with(OracleDrafter([*prompt, *plain], variant.alpha, vocabulary))
        self._llm.trace.take()
        tokens, arrivals, completion = self._timed(prompt, variant)
        first, end = arrivals[0], arrivals[-1]
        equal = tokens == plain
        if not equal and self._llm.config.schedule.block == 1:
            raise PpsdError(f"{cell.variant} on task {cell.task} differs from plain decoding")
        stats = completion.stats
        details: dict[str, Any] = {"equal": equal, "overruns": stats.overruns}
        details |= {"blocks": stats.decode_blocks, "pauses": stats.gate and stats.gate.pauses}
        details |= {"ends": end_times(arrivals)}
        return Measurement(
            *cell,
            tokens=len(tokens) - 1,
            seconds=(end - first) / 1e9,
            first_seconds=stats.prefill_seconds,
            counts=asdict(stats.counts),
            hits="".join("01"[accepted] for accepted in completion.accepted),
            details=details | self._timeline(first, end),
        )

    def _timed(
        self, prompt: list[int], variant: Variant
    ) -> tuple[list[int], list[int], Completion]:
        """Return the tokens, and when the engine had each of them (ns)."""
        self._llm.use(variant.mode, variant.block, variant.in_flight, variant.gate)
        stream = self._llm.stream(prompt, self._params)
        arrivals: list[int] = []
        while True:
            try:
                chunk = next(stream)
            except StopIteration as stop:
                completion: Completion = stop.value
                return list(completion.token_ids), arrivals, completion
            arrivals += [round(chunk.time * 1e9)] * len(chunk.token_ids)

    def _timeline(self, first: int, end: int) -> dict[str, object]:
        lanes = self._llm.trace.take()
        timeline = Timeline(lanes, self._llm.config.schedule.in_flight)
        return {
            "stages": [
                {str(rows): asdict(times) for rows, times in stage.items()}
                for stage in block_times(lanes, first)
            ],
            "path": asdict(timeline.path(first, end)),
            "gaps": timeline.gaps(first).means(),
        }
