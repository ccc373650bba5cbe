"""Read single rows of a matrix from its file: for what a stage needs a few rows of, and late."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ppsd.errors import ModelError, cause_of


class RowFile:
    """Rows of a matrix in the file ``path``: ``width`` bytes each, the first at ``offset``.

    ``decode`` makes [k, in] of their bytes [k, width]; ``order`` says where each row lies in the
    file, if not in its own place. The file stays open, so it may be moved
    away; it is not mapped, as pages of mapped files count as memory in use.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        width: int,
        decode: Callable[[np.ndarray], torch.Tensor],
        order: torch.Tensor | None = None,
    ) -> None:
        self._path, self._offset, self._width, self._decode = path, offset, width, decode
        self._order = order
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({cause_of(error)})") from error

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` [k]; raises ModelError if the file has been cut short since."""
        data, rows = bytearray(), rows if self._order is None else self._order[rows]
        for row in rows.tolist():
            data += os.pread(self._file.fileno(), self._width, self._offset + row * self._width)
        if len(data) != len(rows) * self._width:
            raise ModelError(f"{self._path}: was cut short after it had been loaded")
        return self._decode(np.frombuffer(data, np.uint8).reshape(len(rows), -1))
