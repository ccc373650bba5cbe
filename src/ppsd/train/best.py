"""Keep the best validated state of each head while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from ppsd.train.evaluate import Agreement
from ppsd.train.student import Student

PREFIX = "best/"
PATIENCE = 3  # validations


@dataclass(frozen=True)
class Kept:
    """A head's state after ``step`` steps and its held-out α there; ``start`` is α before any.

    In so many validations ``behind``, the newest ones, all of α's interval lay below the start.
    """

    step: int
    alpha: float
    start: float
    behind: int = 0


class Best:
    """Candidates are the start and every validated state, so that training never makes worse."""

    def __init__(self, students: Sequence[Student]) -> None:
        self.kept: dict[int, Kept] = {}  # by exit layer
        self._students = students
        self._tensors: dict[str, torch.Tensor] = {}

    def consider(self, step: int, agreement: Mapping[int, Agreement]) -> None:
        """Keep the heads as they are now where that is better than before."""
        for student in self._students:
            layer = student.exit_layer
            found = agreement[layer]
            before = self.kept.get(layer)
            start = found.alpha if before is None else before.start
            if before is None or found.alpha > before.alpha:
                self.kept[layer] = Kept(step, found.alpha, start)
                self._tensors |= {n: p.detach().clone() for n, p in student.parameters()}
            else:
                is_behind = found.between is not None and found.between[1] < start
                behind = (before.behind + 1) * is_behind
                self.kept[layer] = replace(before, behind=behind)

    @property
    def hopeless(self) -> bool:
        """Tell if all heads have long been worse than at the start."""
        return all(kept.behind >= PATIENCE for kept in self.kept.values())

    def start(self, student: Student) -> float:
        """Return the held-out α of a head before any step."""
        return self.kept[student.exit_layer].start

    @torch.no_grad()
    def restore(self) -> None:
        """Put the heads back to what was best, rounded as saving does."""
        for student in self._students:
            for name, parameter in student.parameters():
                parameter.copy_(self._tensors[name])
            student.round()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return what a checkpoint keeps: figures by exit layer, and tensors."""
        figures = {str(layer): list(astuple(kept)) for layer, kept in self.kept.items()}
        return figures, {PREFIX + name: tensor for name, tensor in self._tensors.items()}

    def load(self, figures: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what ``state`` returned."""
        self.kept = {int(layer): Kept(*values) for layer, values in figures.items()}
        kept = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        self._tensors = kept
