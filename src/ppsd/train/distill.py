"""Train heads: one frozen forward a batch teaches a head at each exit layer.

The only randomness is the order of the data, a function of the seed. So a run that is killed while
it trains and continued ends with the same weights on the same CPU and thread count, unless its
length was set in minutes; what it was still writing may differ by rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ppsd.errors import PpsdError
from ppsd.model.packed import whole
from ppsd.model.stage import Stage
from ppsd.train.batched import Features, teacher_rows, whole_sequences
from ppsd.train.best import Best
from ppsd.train.checkpoint import Checkpoint, RunDirectory
from ppsd.train.copies import NONE as NO_COPY
from ppsd.train.copies import copies_of, no_copies
from ppsd.train.data import OUTSIDE, Batch, Example, Vocabulary, make_batch, plan_epoch
from ppsd.train.evaluate import Agreement, evaluate, lookup_alone, prepare
from ppsd.train.features import FeatureSource
from ppsd.train.feedback import sample_verified, take_verified
from ppsd.train.gain import expected_gain
from ppsd.train.losses import LossWeights, Mixture, chunked_losses
from ppsd.train.settings import BETAS, DistillConfig
from ppsd.train.start import Beginning, LeastSquares
from ppsd.train.student import Options, Student

MOMENTS = ("exp_avg", "exp_avg_sq")
LEAST_VALIDATIONS = 10  # of a run, however short
START_TOKENS = 200_000  # of the training data, for where training begins
GIVE_UP_AFTER = 0.5  # of a run; before, the rate is high, and heads fall behind for a while


@dataclass(frozen=True)
class StepReport:
    """The state of a run: ``alpha`` holds the newest validation, by exit layer."""

    step: int
    steps: int
    tokens: int
    total_tokens: int
    loss: dict[int, float]
    alpha: dict[int, float]


@dataclass(frozen=True)
class Cadence:
    """Most steps between validations, the best of which is kept, and between checkpoints."""

    validate: int = 100
    checkpoint: int = 50


@dataclass(frozen=True)
class Lesson:
    """Data to train on: examples, their rows, and the draft vocabulary [Vd] (None for all).

    ``starts`` are heads to go on from, by exit layer.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    draft_ids: torch.Tensor | None
    features: FeatureSource
    starts: Mapping[int, Beginning] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecast:
    """Expected seconds and tokens of the rest of a run, and held-out α at its end by exit layer."""

    seconds: float
    tokens: int
    alpha: dict[int, float]


class Trainer:
    """Heads, optimizer and data of one run; ``run`` trains from wherever the directory stands.

    ``lookup`` is the held-out α of prompt lookup alone.
    """

    def __init__(
        self,
        model: Stage,
        config: DistillConfig,
        lesson: Lesson,
        directory: RunDirectory,
        cadence: Cadence,
    ) -> None:
        assert model.lm_head is not None, "the teacher holds all layers"
        self.config = config
        self.starts = lesson.starts
        self.directory = directory
        self.step = self.tokens = self._saved = 0
        self._began = time.monotonic()
        self._model = model
        self._lesson = lesson
        self._cadence = cadence
        device, spec = model.plan.device, model.spec
        self.draft_ids = None if lesson.draft_ids is None else lesson.draft_ids.to(device)
        self._vocabulary = Vocabulary(self.draft_ids, whole(model.lm_head))
        self.students = [
            Student(
                model,
                layer,
                config.layers,
                config.first_copied(layer, spec.num_layers),
                Options(config.mlp, config.feedback, config.copy_gate),
            )
            for layer in config.exit_layers
        ]
        self._parameters = {n: p for s in self.students for n, p in s.parameters()}
        self.best = Best(self.students)
        self.last: dict[int, Agreement] = {}  # of the heads after the last step, kept or not
        groups = [{"params": [p for _, p in s.parameters()]} for s in self.students]
        decay = config.weight_decay
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=decay)
        lengths = [len(e.tokens) for e in lesson.train]
        self._plan = [
            batch
            for epoch in range(config.epochs)
            for batch in plan_epoch(lengths, config.batch_tokens, config.seed, epoch)
        ]
        self.total_tokens = sum(lengths) * config.epochs
        self._expected = self.steps  # that the time allows
        self._held = prepare(model, lesson.held_out, lesson.features, config.batch_tokens)
        self.lookup = lookup_alone(self._held)

    @property
    def prompts(self) -> set[str]:
        """Return digests of what heads are trained on: not of what is held out."""
        return {digest for example in self._lesson.train for digest in example.said}

    @property
    def steps(self) -> int:
        """Count the optimizer steps of the whole run."""
        return len(self._plan)

    @property
    def _validate_every(self) -> int:
        return min(self._cadence.validate, max(1, self._expected // LEAST_VALIDATIONS))

    @property
    def _done(self) -> float:
        """Return the share of the run that is done, by steps or, where that says more, by time."""
        by_steps = self.step / self.steps
        if not self.config.minutes:
            return by_steps
        return max(by_steps, (time.monotonic() - self._began) / (60 * self.config.minutes))

    def _spent(self) -> float:
        """Return the seconds of training before the run was stopped and continued."""
        return math.fsum(r["seconds"] for r in self.directory.metrics() if "loss" in r)

    def run(self, report: Callable[[StepReport], None]) -> dict[int, Agreement]:
        """Train to the end and return the agreement of the best heads as rounded for saving.

        Ends early where all heads stay worse than at the start.
        """
        self._begin()
        self._began = time.monotonic() - self._spent()
        while not self.finished:
            losses = self._train_step()
            if self.step % self._cadence.checkpoint == 0 or self._done >= 1:
                self._save()
            if self.step % self._validate_every == 0:
                self._validated()
            alpha = {layer: a.alpha for layer, a in self.last.items()}
            report(StepReport(self.step, self.steps, self.tokens, self.total_tokens, losses, alpha))
        if self.step % self._validate_every:
            self._validated()
        if self._saved < self.step:
            self._save()  # should there be no room for the heads
        self.best.restore()
        return self._validate(final=True)

    def _begin(self) -> None:
        """Put the heads where the run stopped, or at its start, unless that is done."""
        if self.last:
            return
        if not self._resume():
            self._start()
        if self.config.minutes and self.step < self.steps:
            self._expected = min(self.steps, self.step + self._steps_left())
        if self.step % self._validate_every == 0:
            self._validated()
        else:
            self.last = self._validate()

    def _validated(self) -> None:
        self.last = self._validate()
        self.best.consider(self.step, self.last)

    def forecast(self) -> Forecast:
        """Time a step that changes nothing, and expect what other heads gained."""
        self._begin()
        if self.step == self.steps:
            return Forecast(0.0, 0, {})
        pace = self._pace
        tokens = self.total_tokens - self.tokens
        if self.config.minutes:
            left = max(0.0, 60 * self.config.minutes - self._spent())
            tokens = min(tokens, int(left / pace))
        alpha = {}
        for layer, kept in self.best.kept.items():
            begun = self.starts.get(layer)
            gained = expected_gain(self.tokens + tokens, begun.tokens if begun else 0)
            alpha[layer] = min(1.0, kept.start + gained)
        return Forecast(pace * tokens, tokens, alpha)

    @cached_property
    def _pace(self) -> float:
        """Return the seconds that training takes for a token, by a step that changes nothing."""
        for _ in range(2):  # the first may have to wait for memory, libraries and files
            started = time.perf_counter()
            batch = self._batch(self.step)
            losses, _ = self._losses(batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
            self._synchronize()
            pace = (time.perf_counter() - started) / batch.size
        self._optimizer.zero_grad(set_to_none=True)
        return pace

    def _steps_left(self) -> int:
        """Count the steps that the time allows, of the mean length."""
        left = 60 * self.config.minutes - self._spent()
        return max(1, int(left / self._pace * self.steps / self.total_tokens))

    @property
    def gave_up(self) -> bool:
        """Tell if training ends before its time."""
        return GIVE_UP_AFTER <= self._done < 1 and self.best.hopeless

    @property
    def finished(self) -> bool:
        """Tell if no step is left to do."""
        return self._done >= 1 or self.gave_up

    @torch.no_grad()
    def _start(self) -> None:
        """Put the heads where others ended, or where least squares over some of the data would."""
        starts = self.starts
        for student in self.students:
            if student.exit_layer in starts:
                student.go_on(starts[student.exit_layer].weights)
        students = [s for s in self.students if s.exit_layer not in starts]
        if not self.config.layers or not students:
            return
        fits = [LeastSquares() for _ in students]
        seen = 0
        for step in range(self.steps):
            batch = self._batch(step)
            features = self._lesson.features(batch)
            verified = self._verified(batch, features, step)
            weights = batch.shares * len(batch.rows)
            for student, fit in zip(students, fits, strict=True):
                inputs = student.reads(features.exits[student.exit_layer][batch.rows], verified)
                fit.add(inputs, features.last[batch.rows], weights)
            seen += batch.size
            if seen >= min(START_TOKENS, self.total_tokens // self.config.epochs):
                break
        for student, fit in zip(students, fits, strict=True):
            student.begin(fit.solve())

    def _batch(self, step: int) -> Batch:
        examples = [self._lesson.train[i] for i in self._plan[step]]
        return make_batch(examples, self._model.plan.device)

    def _verified(self, batch: Batch, features: Features, step: int) -> torch.Tensor:
        """Return the verified rows [len(batch.rows), C] that heads read in this step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return take_verified(features.last, sample_verified(batch, generator))

    def _train_step(self) -> dict[int, float]:
        started = time.perf_counter()
        batch = self._batch(self.step)
        losses, record = self._losses(batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        norms = [_clip(student, self.config.clip) for student in self.students]
        done = self._done + 0.5 / self.steps
        rates = [self.config.rate(done, self._expected, self._peak(s)) for s in self.students]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._check_finite(losses, norms)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.size
        by_exit = dict(zip(self.config.exit_layers, losses.tolist(), strict=True))
        seconds = time.perf_counter() - started
        self.directory.log(
            {"step": self.step, "tokens": self.tokens, "rates": rates, "loss": by_exit}
            | {"gradient_norm": norms, "seconds": round(seconds, 4), **record}
        )
        return by_exit

    def _peak(self, student: Student) -> float:
        width, begun = self._model.spec.hidden_size, student.exit_layer in self.starts
        return self.config.peak_rate(self._expected, width, self.best.start(student), begun)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the losses [exits], and what else is worth logging of the step."""
        started = time.perf_counter()
        sequences, length = batch.tokens.shape
        features = self._lesson.features(batch)
        teacher = teacher_rows(self._model, features, batch.rows)
        self._synchronize()
        forward_seconds = time.perf_counter() - started
        rope = whole_sequences(self._model.rope, sequences, length)
        verified = self._verified(batch, features, self.step)
        copies = copies_of(batch) if self.config.copy_gate else no_copies(batch)
        with self._precision():
            normed = [
                s.forward(features.exits[s.exit_layer], verified, rope, sequences, batch.rows)
                for s in self.students
            ]
            odds = [s.odds(x, copies.slots) for s, x in zip(self.students, normed, strict=True)]
        weights = LossWeights(self.config.kl_weight, self.config.ce_weight)
        scored = self._vocabulary.of(batch)
        labels = scored.labels[batch.targets]
        copied = scored.labels[copies.tokens.clamp(min=0)]
        copied = copied.masked_fill(copies.tokens == NO_COPY, OUTSIDE)
        mixture = Mixture(copied, torch.stack(odds))
        losses, kl, ce = chunked_losses(
            torch.stack(normed), teacher, scored.rows, labels, weights, mixture, batch.shares
        )
        record = {"kl": kl.tolist(), "ce": ce.tolist(), "targets": len(batch.targets)}
        return losses, record | {"forward_seconds": round(forward_seconds, 4)}

    def _synchronize(self) -> None:
        if self._model.plan.device.type == "cuda":
            torch.cuda.synchronize(self._model.plan.device)

    def _precision(self) -> AbstractContextManager[object]:
        """Take products in the model's dtype where it is narrower; parameters stay float32."""
        plan = self._model.plan
        if plan.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(plan.device.type, dtype=plan.dtype)

    def _check_finite(self, losses: torch.Tensor, norms: Sequence[float]) -> None:
        if not all(math.isfinite(x) for x in (*losses.tolist(), *norms)):
            rate = max(map(self._peak, self.students))
            raise PpsdError(
                f"training diverged at step {self.step + 1} (loss {losses.tolist()}); start again "
                f"with a learning_rate below {rate:g} in another directory"
            )

    def _validate(self, *, final: bool = False) -> dict[int, Agreement]:
        found = {
            s.exit_layer: evaluate(s, self._model, self._held, self._vocabulary, self._precision())
            for s in self.students
        }
        shown = {str(layer): agreement.to_json() for layer, agreement in found.items()}
        name = "final" if final else "validation"
        self.directory.log({"step": self.step, "tokens": self.tokens, name: shown})
        return found

    def _save(self) -> None:
        tensors = dict(self._parameters)
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS}
        best, kept = self.best.state()
        self.directory.save(Checkpoint(self.step, self.tokens, tensors | kept, best))
        self._saved = self.step

    @torch.no_grad()
    def _resume(self) -> bool:
        """Resume from the newest checkpoint, if there is one."""
        checkpoint = self.directory.load()
        if checkpoint is None:
            self.directory.rewind_metrics(-1)
            return False
        self.step = self._saved = checkpoint.step
        self.tokens = checkpoint.tokens
        for name, parameter in self._parameters.items():
            parameter.copy_(checkpoint.tensors[name])
            moments = {m: checkpoint.tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        self.best.load(checkpoint.best, checkpoint.tensors)
        self.directory.rewind_metrics(self.step)
        return True


def _clip(student: Student, limit: float) -> float:
    """Clip one head's gradients to a total norm, as if it were trained alone; return the norm."""
    parameters = [p for _, p in student.parameters()]
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
