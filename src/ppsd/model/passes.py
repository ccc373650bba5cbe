"""Passes of rows through compiled decoder layers, and what may make one pointless on its way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from ppsd.model.kernels import FLOAT, INT, LONG, POINTER, Pointers, loaded
from ppsd.model.spec import ModelSpec

Interrupted = Callable[[], bool]
NOTHING = (None, None, 0)


class Shape(ctypes.Structure):
    """What a layer computes on: Shape of kernels.c."""

    _fields_ = [
        *((name, LONG) for name in ("rows", "position", "hidden", "heads", "groups", "size")),
        ("inner", LONG),
        ("capacity", LONG),
        ("eps", FLOAT),
        ("threads", INT),
    ]


class Watch:
    """A question that can be answered anew only once one of some 64-bit ``words`` has changed.

    So it need not be asked before every layer, in Python. ``words`` are addresses that others write
    to; without any the question has to be asked again and again.
    """

    def __init__(self, ask: Interrupted, words: Sequence[int]) -> None:
        self.words = tuple(words)
        self._ask = ask
        self._words = (POINTER * len(words))(*words)
        self._sources = [ctypes.c_int64.from_address(word) for word in words]
        self._seen = (ctypes.c_int64 * len(words))()
        self._places = ctypes.addressof(self._words), ctypes.addressof(self._seen), len(words)

    def __call__(self) -> bool:
        """The answer."""
        return self._ask()

    def look(self) -> tuple[int, int, int]:
        """Note what the words are; to be called before asking. Returns what kernels.c wants."""
        for i, source in enumerate(self._sources):
            self._seen[i] = source.value
        return self._places


class Layers:
    """Consecutive decoder layers, whose ``weights`` are in the order of LayerWeights.

    Rotated by ``cos`` and signed ``sin`` [T, 1, D]; ``keys``, ``values`` [K, cap, D] of each layer.
    A pass reads more weights than caches hold and so finds none of Python's own code there: what
    does not change from pass to pass is laid out here.
    """

    def __init__(
        self,
        weights: Sequence[Pointers],
        spec: ModelSpec,
        tables: tuple[torch.Tensor, torch.Tensor],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> None:
        kernels = loaded()
        assert kernels is not None
        self._run = kernels.decoder_layers
        self._held = weights, tables, keys, values  # by address alone below
        places = zip(map(ctypes.addressof, weights), _places(keys), _places(values), strict=True)
        flat = [place for layer in places for place in layer]
        self._layers = (POINTER * len(flat))(*flat)
        self._layers_at, self._count = ctypes.addressof(self._layers), len(weights)
        self._tables = _places(tables)
        self._turn = spec.head_dim * tables[0].itemsize
        self._end = min(keys[0].shape[1], tables[0].shape[0])
        sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size
        fixed = *sizes, keys[0].shape[1], spec.rms_norm_eps
        self._shape = Shape(0, 0, spec.hidden_size, *fixed)
        self._shape_at = ctypes.addressof(self._shape)

    def run(self, x: torch.Tensor, position: int, interrupted: Interrupted) -> torch.Tensor | None:
        """Rows ``x`` [n, C] at ``position`` after all layers; None once ``interrupted`` is true."""
        rows = x.shape[0]
        assert position + rows <= self._end
        x = x.contiguous()
        y = torch.empty_like(x)
        shape, at = self._shape, self._shape_at
        shape.rows, shape.position, shape.threads = rows, position, torch.get_num_threads()
        cos, sin = (table + position * self._turn for table in self._tables)
        places = x.data_ptr(), y.data_ptr(), self._layers_at
        watch = interrupted if isinstance(interrupted, Watch) and interrupted.words else None
        done = 0
        while done < self._count:
            seen = watch.look() if watch else NOTHING
            if interrupted():
                return None
            end = self._count if watch else done + 1
            done = self._run(*places, done, end, at, cos, sin, *seen)
            if done < 0:
                raise MemoryError("no memory for the work space of a decoder layer")
        return y


def _places(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
