"""Begin a head as another ended, or as the best linear guess, found without any descent.

For the guess, the last layer's rows are fitted by least squares with a small ridge to the rows that
a head reads. Fits weigh rows by the length of what is to be fitted, as the norm that follows takes
it out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

RIDGE = 1e-4  # of the mean square of the inputs


@dataclass(frozen=True)
class Beginning:
    """A trained head to go on from: its weights by name, and how many tokens trained it.

    ``digest`` is that of its file, ``prompts`` are those of what it was trained on.
    """

    weights: Mapping[str, torch.Tensor]
    tokens: int
    digest: str
    prompts: Sequence[str]


class LeastSquares:
    """Normal equations that grow row by row: [k, k] and [k, C] float64, whatever the data."""

    def __init__(self) -> None:
        self._squares = torch.zeros(())
        self._products = torch.zeros(())

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Take rows ``inputs`` [n, k], what they should become [n, C], and weights [n]."""
        scale = (weights[:, None] / outputs.float().square().mean(-1, keepdim=True)).sqrt()
        scaled, wanted = inputs.float() * scale, outputs.float() * scale
        self._squares = self._squares.to(inputs.device) + (scaled.T @ scaled).double()
        self._products = self._products.to(inputs.device) + (scaled.T @ wanted).double()

    def solve(self) -> torch.Tensor:
        """Return the matrix [k, C] that inputs are to be multiplied by."""
        ridge = (
            RIDGE
            * self._squares.diagonal().mean()
            * torch.eye(len(self._squares), dtype=torch.float64, device=self._squares.device)
        )
        solution: torch.Tensor = torch.linalg.solve(self._squares + ridge, self._products)
        return solution
