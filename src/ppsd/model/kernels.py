"""A decoder layer for a few bfloat16 rows on CPUs: kernels.c and products.h.

A library of them comes with the package, or this machine's C compiler makes one (kernel_build.py).
Without either, or with ``PPSD_KERNELS=torch``, PyTorch's operations are used instead. A process
chooses once, and rank 0 for all stages: the choice decides the bits of a result.

A row has the same bits whatever rows come with it. Shapes are as in layers.py. Which weights and
sizes the functions take, ``supports`` says; they take at most MAX_ROWS bfloat16 rows on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch

from ppsd.errors import ConfigError, KernelError
from ppsd.model import kernel_build

MAX_ROWS = 16  # above, widening all weights once costs no more than doing it for every 4 rows
STEP = 32  # sizes are multiples of it
PYTORCH = "PyTorch"
STANDARD_STREAMS = 3  # descriptors below it are not for files
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float

LOG = logging.getLogger(__name__)


SIGNATURES = {
    "product": (
        [POINTER] * 2 + [FLOAT, POINTER, INT] + [POINTER] * 2 + [LONG] * 3 + [INT],
        INT,
    ),
    "unpack": ([POINTER, INT, POINTER] + [LONG] * 2 + [INT], None),
    "packs": ([], INT),
    "rms_norm": ([POINTER] * 3 + [LONG] * 2 + [FLOAT], None),
    "all_finite": ([POINTER, LONG], INT),
    "largest": ([POINTER, LONG], LONG),
    "decoder_layers": ([POINTER] * 3 + [LONG] * 2 + [POINTER] * 6 + [LONG], LONG),
}


class Kind(IntEnum):
    """The format of a weight, as in products.h."""

    NUMBERS = 0  # a tensor
    CODES_4 = 1  # of 4 bits, with float16 scales and offsets
    CODES_4_WIDE = 2  # of 4 bits, with float32 scales and offsets
    CODES_8 = 3  # of 8 bits, with float16 scales


@dataclass(frozen=True)
class PackedWeight:
    """A weight of ``shape`` (out, in) as products.h reads it: uint8 [out / 4, bytes of a tile]."""

    data: torch.Tensor
    shape: tuple[int, int]
    kind: Kind
    dtype: torch.dtype = torch.bfloat16
    requires_grad: bool = False

    def whole(self) -> torch.Tensor:
        """Return the bfloat16 numbers, [out, in]."""
        return unpack(self.data, self.shape, self.kind)


Weight = torch.Tensor | PackedWeight


def supports(weight: Weight, *sizes: int) -> bool:
    """Return True if kernels are in use, and take ``weight`` and layers of these ``sizes``.

    To be asked once for a weight, when it is loaded. The first answer may compile the kernels.
    """
    data = weight if isinstance(weight, torch.Tensor) else weight.data
    return (
        weight.dtype == torch.bfloat16
        and data.is_cpu
        and not weight.requires_grad
        and not any(size % STEP for size in sizes)
        and loaded() is not None
    )


class Product:
    """Rows times a weight [out, in] transposed, plus a bias; normed first if there is a ``norm``.

    Called with rows [n, in]. Made once for a weight that is used again and again: between two
    passes little of Python's code is in the caches, and all that can be is looked up here. By the
    library ``kernels`` where it is not the one that is loaded.
    """

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        kernels: ctypes.CDLL | None = None,
    ) -> None:
        kernels = kernels or loaded()
        assert kernels is not None
        self._product = kernels.product
        data, kind = _stored(weight)
        parts = [part if part is None else part.contiguous() for part in (norm, data, bias)]
        self._held = parts  # by address alone below
        norm_at, data_at, self._bias = (part if part is None else part.data_ptr() for part in parts)
        self._weight = norm_at, eps, data_at, kind
        self._out, self._size = weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, [n, out]."""
        assert x.dtype == torch.bfloat16  # others would be misread
        x = x.contiguous()
        rows = x.shape[0]
        y = x.new_empty((rows, self._out))
        sizes = rows, self._size, self._out, torch.get_num_threads()
        if self._product(x.data_ptr(), *self._weight, self._bias, y.data_ptr(), *sizes):
            raise MemoryError("no memory for normed rows")
        return y


def _stored(weight: Weight) -> tuple[torch.Tensor, Kind]:
    """Return the tensor that kernels.c reads for a weight, and its kind."""
    if isinstance(weight, torch.Tensor):
        return weight, Kind.NUMBERS
    return weight.data, weight.kind


def packs() -> bool:
    """Return True if products with packed weights are faster here than with whole ones."""
    kernels = loaded()
    return kernels is not None and bool(kernels.packs())


def unpack(data: torch.Tensor, shape: tuple[int, int], kind: Kind) -> torch.Tensor:
    """Return the numbers [out, in] of a packed weight's contiguous ``data``."""
    kernels = loaded()
    assert kernels is not None
    y = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    kernels.unpack(data.data_ptr(), kind, y.data_ptr(), *shape[::-1], torch.get_num_threads())
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the root-mean-square norm of ``x`` […, C] over its last dimension."""
    kernels = loaded()
    assert kernels is not None
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    kernels.rms_norm(*at, x.numel() // size, size, eps)
    return y


def all_finite(x: torch.Tensor) -> bool:
    """Return True if ``x`` is known to hold no NaN or infinity, which takes bfloat16 on a CPU."""
    if (kernels := reader(x)) is None:
        return False
    return bool(kernels.all_finite(x.data_ptr(), x.numel()))


def largest(x: torch.Tensor, among: int) -> tuple[int, ...] | None:
    """Return the index of the largest of the first ``among`` numbers of each row of ``x`` [n, V].

    Of equals the first counts. Returns None for rows other than bfloat16 on a CPU, if a number is
    NaN, or if the largest is not finite.
    """
    if (kernels := reader(x)) is None:
        return None
    rows, size = x.shape
    at = x.data_ptr()
    found = tuple([kernels.largest(at + 2 * size * row, among) for row in range(rows)])
    return None if -1 in found else found


def reader(x: torch.Tensor) -> ctypes.CDLL | None:
    """Return the library if it can read ``x``."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or not x.is_contiguous():
        return None
    return loaded()


Pointers = ctypes.Array[ctypes.c_void_p]


def pointers(weights: Sequence[Weight | None], matrices: Sequence[Weight]) -> Pointers:
    """Return the addresses of weights, which must outlive it, and the kinds of the ``matrices``."""
    places = [None if weight is None else _stored(weight)[0].data_ptr() for weight in weights]
    kinds = [_stored(matrix)[1] for matrix in matrices]
    return (POINTER * (len(places) + len(kinds)))(*places, *kinds)


@dataclass(frozen=True)
class Kernels:
    """A process's bfloat16 arithmetic: a compiled library, or PyTorch where there is none.

    Equal names are equal bits: ``name`` is PyTorch, or the kind of the library and the start of its
    digest. ``file`` is a descriptor of the library.
    """

    name: str = PYTORCH
    library: ctypes.CDLL | None = None
    file: int | None = None


_in_use: Kernels | None = None


def in_use() -> Kernels:
    """Return this process's kernels; the first call decides which, and may compile them.

    Raises KernelError when that fails in a way that may not repeat.
    """
    global _in_use
    if _in_use is None:
        _in_use = _decide()
    return _in_use


def use(name: str, file: int | None) -> None:
    """Take rank 0's kernels ``name``: from ``file``, which it handed down, or else made here.

    Raises KernelError if that fails, or if other kernels are found here.
    """
    global _in_use
    if name == PYTORCH:
        _in_use = Kernels()
        return
    try:
        here = in_use() if file is None else _load(Path(f"/proc/self/fd/{file}").read_bytes())
    except (ConfigError, KernelError, OSError, RuntimeError) as error:
        raise KernelError(f"this stage has not the kernels {name} of rank 0: {error}") from error
    if file is not None:
        os.close(file)
    if here.name != name:
        raise KernelError(
            f"this stage has the kernels {here.name}, and rank 0 has {name}: install the same "
            f"ppsd on every host, or {kernel_build.REMEDY}"
        )
    _in_use = here


def descriptor(name: str) -> int | None:
    """Return a file descriptor of this process's kernels ``name``, to hand down to a child."""
    return None if name == PYTORCH else in_use().file


def name(dtype: str, device: str = "cpu") -> str:
    """Return what computes a stage's few rows in ``dtype`` on ``device``; see Kernels."""
    on_cpu = device.partition(":")[0] == "cpu"
    return in_use().name if dtype == "bfloat16" and on_cpu else PYTORCH


def kind(dtype: str) -> str:
    """Return what computes in ``dtype`` on this CPU: ``compiled``, ``packed`` or ``PyTorch``.

    ``packed`` is compiled as well, and reads weights in the codes of their file.
    """
    return name(dtype).partition("-")[0]


def loaded() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where PyTorch's operations are to be used."""
    return (_in_use or in_use()).library


def _decide() -> Kernels:
    setting = os.environ.get("PPSD_KERNELS", "")
    if setting not in ("", "torch"):
        raise ConfigError("PPSD_KERNELS", setting, "torch, or not set")
    if setting or platform.system() != "Linux":
        return Kernels()
    target = kernel_build.target()
    with contextlib.suppress(OSError, RuntimeError):  # not for this machine: it makes its own
        if library := kernel_build.shipped(target):
            return _load(library)
    try:
        if isinstance(found := kernel_build.built(target, _load), bytes):
            return _load(found)
    except (OSError, RuntimeError) as error:
        found = str(error)
    LOG.warning("bfloat16 is left to PyTorch, which is slower than kernels.c: %s", found)
    return Kernels()


@functools.lru_cache(maxsize=2)  # a new library is checked first, and then used
def _load(content: bytes) -> Kernels:
    """Open a library. Raises OSError or RuntimeError for one that is not fit for use."""
    file = _in_memory(content)
    library = ctypes.CDLL(f"/proc/self/fd/{file}")
    for symbol, (arguments, result) in SIGNATURES.items():
        if not hasattr(library, symbol):
            raise RuntimeError(f"a library without {symbol} is not that of kernels.c")
        function = getattr(library, symbol)
        function.argtypes, function.restype = arguments, result
    _check(library)
    kind = "packed" if library.packs() else "compiled"
    return Kernels(f"{kind}-{hashlib.sha256(content).hexdigest()[:12]}", library, file)


def _in_memory(content: bytes) -> int:
    """Return a descriptor of ``content``, never to be closed: the linker knows a library by it."""
    file = os.memfd_create(kernel_build.BUILT)
    with open(file, "wb", closefd=False) as memory:
        memory.write(content)
    if file >= STANDARD_STREAMS:
        return file
    try:  # a standard stream was closed; workers have streams of their own in its place
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, STANDARD_STREAMS)
    finally:
        os.close(file)


def _check(kernels: ctypes.CDLL) -> None:
    """Raise RuntimeError unless this compiler kept what the bits of a row rest on."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3 * STEP, generator=generator).bfloat16() for n in (7, 5))
    product = Product(weight, kernels=kernels)
    alone = torch.cat([product(x[row : row + 1]) for row in range(7)])
    for rows in (2, 3, 7):  # blocks of 4 rows, and what may be left
        if not torch.equal(product(x[:rows]), alone[:rows]):
            raise RuntimeError("a row's result depends on other rows")
