"""Does a mode say exactly what plain decoding says? The measurement behind ``ppsd verify``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppsd.engine.llm import LLM, Completion
from ppsd.engine.sequence import collect_logits
from ppsd.errors import PpsdError
from ppsd.measure.workload import Task
from ppsd.types import SamplingParams


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded plainly and in the mode under test.

    ``divergence`` is the index of the first differing token, None when all are equal; ``bitwise``
    whether all target logits up to there are equal bit for bit, ``max_logit_difference`` how far
    apart they are. ``margin`` is the smallest gap between the two best plain logits: where it is
    below the difference, rounding can turn a token. ``decided_by`` is the plain logits' gap
    between the two tokens at the divergence.
    """

    id: str
    tokens: int
    divergence: int | None
    bitwise: bool
    max_logit_difference: float
    margin: float
    decided_by: float | None
    accepted: int
    judged: int


@dataclass(frozen=True)
class Verification:
    """All comparisons of one run."""

    comparisons: tuple[Comparison, ...]

    @property
    def exact(self) -> int:
        """Count the prompts whose tokens are all equal."""
        return sum(c.divergence is None for c in self.comparisons)

    @property
    def bitwise(self) -> int:
        """Count the prompts whose logits are all equal bit for bit."""
        return sum(c.bitwise for c in self.comparisons)

    @property
    def judged(self) -> int:
        """Count the drafts that were compared with the target's own tokens."""
        return sum(c.judged for c in self.comparisons)

    @property
    def accepted(self) -> int:
        """Count the judged drafts that were right."""
        return sum(c.accepted for c in self.comparisons)

    @property
    def passed(self) -> bool:
        """Return True if every prompt came out exactly as in plain decoding."""
        return self.exact == len(self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Return the ``--json`` output."""
        return {
            "prompts": len(self.comparisons),
            "exact": self.exact,
            "bitwise_logits": self.bitwise,
            "passed": self.passed,
            "tokens": sum(c.tokens for c in self.comparisons),
            "judged": self.judged,
            "accepted": self.accepted,
            "comparisons": [asdict(c) for c in self.comparisons],
        }


def verify(
    llm: LLM,
    tasks: Sequence[Task],
    params: SamplingParams,
    done: Callable[[Comparison], None] = lambda comparison: None,
) -> Verification:
    """Decode every task plainly and in the mode ``llm`` is set to, on the same workers.

    Plainly each is alone; in the mode as many are under way at once as ``llm`` may have.
    Raises PpsdError naming the task, before any is decoded, when a prompt does not suit the model.
    """
    config = llm.config
    prompts = [_encode(llm, task) for task in tasks]
    comparisons = []
    for first in range(0, len(tasks), config.concurrent):
        several = prompts[first : first + config.concurrent]
        llm.use("autoregressive")
        plain = [decoded for ids in several for decoded in _decode(llm, [ids], params)]
        llm.use(config.mode, config.block, config.in_flight)
        fast = _decode(llm, several, params)
        for task, ids, one, other in zip(tasks[first:], several, plain, fast, strict=False):
            comparison = _compare(task.id, len(ids), *one, *other)
            comparisons.append(comparison)
            done(comparison)
    return Verification(tuple(comparisons))


def _encode(llm: LLM, task: Task) -> list[int]:
    try:
        return llm.encode(task.messages)
    except PpsdError as error:
        raise PpsdError(f"task {task.id}: {error}") from error


def _decode(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[tuple[Completion, dict[int, torch.Tensor]]]:
    collected = [collect_logits() for _ in prompts]
    completions = llm.run_all(prompts, params, [sink for sink, _ in collected])
    return [(c, rows) for c, (_, rows) in zip(completions, collected, strict=True)]


def _compare(
    name: str,
    prompt: int,
    plain: Completion,
    plain_logits: dict[int, torch.Tensor],
    fast: Completion,
    fast_logits: dict[int, torch.Tensor],
) -> Comparison:
    divergence = first_difference(plain.token_ids, fast.token_ids)
    shared = len(plain.token_ids) if divergence is None else divergence + 1
    positions = range(prompt, prompt + min(shared, len(plain.token_ids), len(fast.token_ids)))
    pairs = [(plain_logits[p], fast_logits[p]) for p in positions]
    differences = [_distance(a.double(), b.double()) for a, b in pairs]
    same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs]
    tops = [a.double().topk(2).values for a, _ in pairs]
    counts = fast.stats.counts
    return Comparison(
        id=name,
        tokens=len(plain.token_ids),
        divergence=divergence,
        bitwise=divergence is None and all(same),
        max_logit_difference=max(differences, default=0.0),
        margin=min((float(top[0] - top[1]) for top in tops), default=0.0),
        decided_by=_gap(divergence, prompt, plain, fast, plain_logits),
        accepted=counts.accepted,
        judged=counts.judged,
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference; equal infinities, of ids without a token, have none."""
    return float((a - b).abs().masked_fill(a == b, 0.0).max())


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the first index at which two sequences differ, None when they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _gap(
    divergence: int | None,
    prompt: int,
    plain: Completion,
    fast: Completion,
    logits: dict[int, torch.Tensor],
) -> float | None:
    if divergence is None or divergence >= min(len(plain.token_ids), len(fast.token_ids)):
        return None
    row = logits[prompt + divergence].double()
    return float(row[plain.token_ids[divergence]] - row[fast.token_ids[divergence]])
