"""DEL: the exit layer and draft length that promise most tokens per layer (arXiv 2504.05598).

Pure: counts in, choices out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

DECAY = 0.95  # of all counts, once a round
MOST_DRAFTS = 18
PROMPT_ROWS = 32  # rows at a prompt's end whose shadow tokens fill the counts

Shadow = tuple[int, float]  # a token that an exit would draft, and the exit's confidence in it


@dataclass
class Counts:
    """Decayed counts of an exit's right and wrong shadow tokens, and of its confidence in them."""

    right: float = 0.0
    wrong: float = 0.0
    sure_right: float = 0.0
    sure_wrong: float = 0.0

    def add(self, shadows: Iterable[Shadow], truth: Iterable[int]) -> None:
        """Take a round's shadow tokens, beside the target's own."""
        for (token, confidence), true in zip(shadows, truth, strict=False):
            if token == true:
                self.right += 1
                self.sure_right += confidence
            else:
                self.wrong += 1
                self.sure_wrong += confidence

    def decay(self) -> None:
        """Let a round pass."""
        self.right *= DECAY
        self.wrong *= DECAY
        self.sure_right *= DECAY
        self.sure_wrong *= DECAY

    @property
    def rate(self) -> float:
        """Return the share of right shadow tokens."""
        seen = self.right + self.wrong
        return self.right / seen if seen else 0.0

    @property
    def threshold(self) -> float:
        """Return the middle between the mean confidences in right and in wrong tokens.

        While there are none of one kind it is the other kind's mean.
        """
        sums = (self.sure_right, self.right), (self.sure_wrong, self.wrong)
        means = [total / count for total, count in sums if count]
        return sum(means) / len(means) if means else 0.0


class DynamicExit:
    """The state of DEL for one request.

    ``costs`` are the layers that a draft takes, by exit, and ``whole`` those of the model. The
    first round drafts one token at the first exit.
    """

    def __init__(self, costs: Mapping[int, float], whole: float) -> None:
        self._costs = dict(costs)
        self._whole = whole
        self.counts = {exit_layer: Counts() for exit_layer in costs}
        self.exit, self.length = min(costs), 1

    def fill(self, shadows: Mapping[int, Sequence[Shadow]], truth: Sequence[int]) -> None:
        """Fill the counts from the end of a prompt."""
        for exit_layer, counts in self.counts.items():
            counts.add(shadows[exit_layer], truth)

    def update(self, shadows: Mapping[int, Sequence[Shadow]], truth: Sequence[int]) -> None:
        """Take a round's shadow tokens, and choose for the next round."""
        for counts in self.counts.values():
            counts.decay()
        self.fill(shadows, truth)
        self.exit, self.length = self._best()

    @property
    def threshold(self) -> float:
        """Return the confidence below which a draft is the round's last."""
        return self.counts[self.exit].threshold

    def _best(self) -> tuple[int, int]:
        """Return exit and draft length with most tokens per layer; of equals the shortest."""
        choices = [(e, n) for n in range(MOST_DRAFTS + 1) for e in self._costs]
        return max(choices, key=lambda choice: self._tokens_per_layer(*choice))

    def _tokens_per_layer(self, exit_layer: int, length: int) -> float:
        rate = self.counts[exit_layer].rate
        tokens = sum(rate**i for i in range(length + 1))
        return tokens / (self._whole + length * self._costs[exit_layer])
