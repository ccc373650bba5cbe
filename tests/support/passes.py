"""Passes that tests change: what happens between layers, and what comes out at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ppsd.model.passes import Pass, Watch


class ChangedPass:
    """Gives what ``change`` makes of another pass's rows; ``between`` is called after each stop."""

    def __init__(
        self,
        work: Pass,
        change: Callable[[Any], Any] = lambda hidden: hidden,
        between: Callable[[], None] | None = None,
    ) -> None:
        self._work = work
        self._change = change
        self._between = between
        self.hidden: torch.Tensor

    def advance(self, watch: Watch | None = None) -> bool:
        if self._work.advance(watch if self._between is None else Watch()):
            self.hidden = self._change(self._work.hidden)
            return True
        if self._between is not None:
            self._between()
        return False
