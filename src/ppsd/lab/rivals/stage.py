"""A stage that works for rivals: passes that begin, end or skip anywhere, and a voice at any layer.

It has the weights of a pipeline's stage and a cache of its own, so that rows which the pipeline
keeps between two requests stay what they are. A row that is verified has the bits of plain
decoding: it goes through the project's own runners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ppsd.lab.rivals.dynamic import Shadow
from ppsd.lab.rivals.exits import Exits, OwnExits, likeliest, load_exits
from ppsd.lab.rivals.jobs import Job, Reply
from ppsd.lab.rivals.layers import Layers
from ppsd.lab.rivals.skips import ATTENTION, kept_halves
from ppsd.lab.rivals.timers import Timer
from ppsd.model.identity import Identity
from ppsd.model.stage import Stage
from ppsd.model.weights import TensorSource


@dataclass(frozen=True)
class Price:
    """Seconds of an emulated device for parts of a model, however many rows there are."""

    layer: float
    attention: float
    lm_head: float

    @classmethod
    def of(cls, stage: Stage, pace: float) -> Price:
        """Return the prices on a stage that plain decoding passes in ``pace`` seconds."""
        spec = stage.spec
        lm_head = spec.head_parameters / spec.layer_parameters  # in layers
        mlp = 3 * spec.hidden_size * spec.intermediate_size / spec.layer_parameters
        layer = pace / (len(stage.layers) + lm_head * stage.is_last)
        return cls(layer, layer * (1 - mlp), layer * lm_head)


class RivalStage:
    """Layers of a model as rivals use them: jobs in, answers and jobs for the next stage out."""

    def __init__(
        self,
        stage: Stage,
        source: TensorSource,
        identity: Identity,
        timer: Timer,
        pace: float = 0.0,
    ) -> None:
        self.rank, self.timer = 0, timer
        self._stage, self._source, self._identity = stage, source, identity
        self._first, self.end = stage.plan.first, stage.plan.last
        self._layers = Layers(stage)
        self._price = Price.of(stage, pace)
        self._exits: Exits | None = None
        self._kept: dict[int, list[torch.Tensor]] = {}  # a round's rows behind each exit
        self._given: list[int] = []  # of a prompt
        self._sum = torch.empty(0)  # [C], of the last layer's rows of a prompt
        self._recent = torch.empty(0)  # [n, C], the newest of them

    def handle(self, job: Job) -> Iterator[Job | Reply]:
        """Do what a job asks; a job for the next stage is yielded before what can wait."""
        asked = {
            "setup": self._set_up,
            "prompt": self._prompt,
            "draft": self._draft,
            "verify": self._verify,
        }
        return asked[job.ask](job)

    def _set_up(self, job: Job) -> Iterator[Job | Reply]:
        here = sorted(e for e in job.exits if self._first < e <= self.end)
        given = self._stage, self._source, self._identity
        self._exits = load_exits(*given, here, job.heads) if here else None
        self._kept = {e: [] for e in here}
        if not self._stage.is_last:
            yield job
        yield Reply(self.rank)

    def _prompt(self, job: Job) -> Iterator[Job | Reply]:
        """Run a chunk of a prompt, as plain decoding does; behind the last say the first token."""
        if not job.position:
            self._forget()
            self._given.clear()
        self._given += job.tokens
        rows = self._run(self._entered(job), job.position, self._first, self.end)
        self._observe(job.position)
        if not self._stage.is_last:
            yield replace(job, rows=rows)
        else:
            self._note(rows, job)
        if not job.last:
            return
        if self._exits is not None:
            self._exits.begin(self._given)
        shadows = self._shadows(job, slice(-job.shadows, None))
        if self._stage.is_last:
            yield self._first_token(job.position + len(rows), shadows)
        elif shadows:
            yield Reply(self.rank, shadows=shadows)
        self._forget()

    def _note(self, rows: torch.Tensor, job: Job) -> None:
        """Keep of a prompt's last rows what is asked for at its end."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(0)
        self._sum = self._sum + wide if job.position else wide
        recent = torch.cat([self._recent, rows]) if job.position else rows
        self._recent = recent[-max(1, job.shadows) :]

    def _first_token(self, length: int, shadows: dict[int, list[Shadow]]) -> Reply:
        """Return the target's tokens at a prompt's end, its mean row and its newest."""
        before, newest = self._recent[:-1], self._recent[-1:]
        tokens = self._tokens(self._stage.row_logits(before)) if len(before) else ()
        tokens += self._tokens(self._stage.logits(newest))  # as plain decoding computes them
        self.timer.spend(self._price.lm_head)
        mean = self._sum / length
        return Reply(
            self.rank, tokens, shadows=shadows, rows=torch.stack([mean, newest[0].to(mean)])
        )

    def _draft(self, job: Job) -> Iterator[Job | Reply]:
        """Run the newest row as far as the exit, without what is to be skipped."""
        rows, position = self._entered(job), job.position
        if job.skip:
            halves = kept_halves(job.skip, self._first, self.end)
            rows = self._layers.skipping(rows, position, halves)
            attention, layer = self._price.attention, self._price.layer
            times = (attention if half == ATTENTION else layer - attention for _, half in halves)
            self.timer.spend(sum(times))
        else:
            rows = self._run(rows, position, self._first, min(self.end, job.exit))
        if job.exit > self.end:
            yield replace(job, rows=rows)
        else:
            token, confidence = self._drafted(job, rows)
            yield Reply(self.rank, (token,), (confidence,))

    def _drafted(self, job: Job, row: torch.Tensor) -> Shadow:
        """Return the token behind a row, from an exit or, without layers left, from the end."""
        if self._exits is None or job.exit not in self._exits.layers:
            self.timer.spend(self._price.lm_head)
            return likeliest(self._stage.row_logits(row), self._stage.spec)[0]
        said = self._exits.draft(job.exit, row, job.position, job.matches[0], job.verified)
        self.timer.spend(self._exits.layers[job.exit] * self._price.layer)
        return said

    def _verify(self, job: Job) -> Iterator[Job | Reply]:
        """Run the rows that are to be verified, then let the exits say what they would have."""
        rows = self._verified(job)
        count = len(job.tokens)
        if not self._stage.is_last:
            yield replace(job, rows=rows)
        tokens: tuple[int, ...] = ()
        if self._stage.is_last:
            tokens = self._tokens(self._stage.row_logits(rows))
            self.timer.spend(self._price.lm_head)
            count = 1 + agreed(job.tokens[1:], tokens)
        shadows: dict[int, list[Shadow]] = {}
        if job.shadows:
            self._observe(job.position)
            shadows = self._shadows(job, slice(0, count))
        if self._stage.is_last:
            yield Reply(self.rank, tokens, shadows=shadows, rows=rows[count - 1 : count])
        elif shadows:
            yield Reply(self.rank, shadows=shadows)
        if not job.shadows:  # nobody waits for what only later drafts need
            self._observe(job.position)
        self._forget()

    def _verified(self, job: Job) -> torch.Tensor:
        """Return the rows to verify [n, C] behind this stage, or the newest while others wait.

        The rows of drafts wait behind the exit that they came from.
        """
        rows, root, first = self._entered(job), job.position, self._first
        drafted = len(job.tokens) - 1 if job.exit else 0
        if drafted and job.exit > first:
            end = min(job.exit, self.end)
            rows = self._run(rows[-1:], root + drafted, first, end)
            if job.exit > self.end:
                return rows
            rows, first = torch.cat(self._kept[job.exit]), end
        return self._run(rows, root, first, self.end, apart=True)

    def _run(
        self, rows: torch.Tensor, position: int, first: int, last: int, *, apart: bool = False
    ) -> torch.Tensor:
        """Run rows through layers [first, last), and keep what they are behind each exit."""
        stops = [e for e in self._kept if first < e < last] + [last] * (first < last)
        run = self._layers.run_apart if apart else self._layers.run
        for stop in stops:
            rows = run(rows, position, first, stop)
            self.timer.spend((stop - first) * self._price.layer)
            if stop in self._kept:
                self._kept[stop].append(rows)
            first = stop
        return rows

    def _entered(self, job: Job) -> torch.Tensor:
        """Return the rows [n, C] that enter this stage."""
        plan, embedding = self._stage.plan, self._stage.embedding
        if embedding is not None:
            return embedding.index_select(0, torch.tensor(job.tokens, device=plan.device))
        assert job.rows is not None
        return job.rows.to(plan.device)

    def _observe(self, position: int) -> None:
        """Let the exits see all rows since the last time."""
        if self._exits is not None:
            kept = {e: torch.cat(rows) for e, rows in self._kept.items()}
            self._exits.observe(kept, position)
            for rows in self._kept.values():
                rows.clear()

    def _shadows(self, job: Job, rows: slice) -> dict[int, list[Shadow]]:
        """Return what the exits would have drafted behind some of the rows that they saw."""
        if self._exits is None or not job.shadows:
            return {}
        times = [layers * self._price.layer for layers in self._exits.layers.values()]
        if not isinstance(self._exits, OwnExits):
            self.timer.spend(sum(times))
        elif not self._stage.is_last:  # where one product with the target's LM head says it
            self.timer.spend(max(times))
        return self._exits.shadows(rows, job.matches[rows], job.verified)

    def _tokens(self, logits: torch.Tensor) -> tuple[int, ...]:
        return tuple(token for token, _ in likeliest(logits, self._stage.spec))

    def _forget(self) -> None:
        """Begin a round anew."""
        if self._exits is not None:
            self._exits.forget()
        for rows in self._kept.values():
            rows.clear()


def agreed(drafts: Sequence[int], truth: Sequence[int]) -> int:
    """Return how many drafts are the target's tokens before the first that is not."""
    for count, (draft, true) in enumerate(zip(drafts, truth, strict=False)):
        if draft != true:
            return count
    return len(drafts)
