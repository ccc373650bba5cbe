"""A decoder layer for a few bfloat16 rows on CPUs: kernels.c and products.h.

The machine's C compiler builds it when a stage is loaded, for this very CPU; the result is kept in
ppsd's cache directory. Without a compiler, or with ``PPSD_KERNELS=torch``, PyTorch's operations are
used instead.

A row has the same bits whatever rows come with it. Shapes are as in layers.py; arguments have to
satisfy ``fits``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import operator
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import torch

from ppsd.model.sidecar import cached

SOURCE, PRODUCTS = (Path(__file__).with_name(name) for name in ("kernels.c", "products.h"))
BUILT = "kernels.so"
FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp"),
    *("-shared", "-fPIC", "-fno-semantic-interposition"),
)
COMPILE_S = 20.0
MAX_ROWS = 16  # above, widening all weights once costs no more than doing it for every 4 rows
STEP = 32  # sizes are multiples of it
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


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
    "decoder_layers": ([POINTER] * 3 + [LONG] * 2 + [POINTER] * 5 + [LONG], LONG),
}


class Kind(IntEnum):
    """What a weight is made of, as in products.h."""

    NUMBERS = 0  # a tensor
    CODES_4 = 1  # of 4 bits, with float16 scales and offsets
    CODES_4_WIDE = 2  # of 4 bits, with float32 scales and offsets
    CODES_8 = 3  # of 8 bits, with float16 scales


class Packed(Protocol):
    """A weight of codes, PackedWeight of packed.py."""

    @property
    def data(self) -> torch.Tensor:
        """The codes, scales and offsets."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    @property
    def kind(self) -> Kind:
        """What they are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""

    @property
    def requires_grad(self) -> bool:
        """No."""


def fits(x: torch.Tensor, weight: torch.Tensor | Packed, *sizes: int) -> bool:
    """Whether to use the functions here for rows ``x`` [n, …, in], a weight and further sizes."""
    return takes(x) and suits(weight, x.shape[-1], *sizes)


def takes(x: torch.Tensor) -> bool:
    """Whether rows ``x`` [n, …] are of a kind and number for the functions here."""
    few = x.dtype == torch.bfloat16 and x.is_cpu and x.shape[0] <= MAX_ROWS
    return few and not x.requires_grad


def suits(weight: torch.Tensor | Packed, *sizes: int) -> bool:
    """Whether a weight and ``sizes`` are for the functions here, and they can be had."""
    return (
        weight.dtype == torch.bfloat16
        and not functools.reduce(operator.or_, sizes) % STEP
        and not weight.requires_grad
        and loaded() is not None
    )


class Product:
    """Rows times a weight [out, in] transposed, plus a bias; before that normed, with a ``norm``.

    Called with rows [n, in]. Made once for a weight that is used again and again: between two
    passes little of Python's code is in the caches, and all that can be is looked up here. By the
    library ``kernels`` where it is not the one that is loaded.
    """

    def __init__(
        self,
        weight: torch.Tensor | Packed,
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
        """See above; [n, out]."""
        x = x.contiguous()
        rows = x.shape[0]
        y = x.new_empty((rows, self._out))
        sizes = rows, self._size, self._out, torch.get_num_threads()
        if self._product(x.data_ptr(), *self._weight, self._bias, y.data_ptr(), *sizes):
            raise MemoryError("no memory for normed rows")
        return y


def _stored(weight: torch.Tensor | Packed) -> tuple[torch.Tensor, Kind]:
    """What kernels.c reads, and what it is made of."""
    if isinstance(weight, torch.Tensor):
        return weight, Kind.NUMBERS
    return weight.data, weight.kind


def packs() -> bool:
    """Whether products with packed weights are faster here than with whole ones."""
    kernels = loaded()
    return kernels is not None and bool(kernels.packs())


def unpack(data: torch.Tensor, shape: tuple[int, int], kind: Kind) -> torch.Tensor:
    """The numbers [out, in] of a packed weight's contiguous ``data``."""
    kernels = loaded()
    assert kernels is not None
    y = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    kernels.unpack(data.data_ptr(), kind, y.data_ptr(), *shape[::-1], torch.get_num_threads())
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of ``x`` […, C] over its last dimension."""
    kernels = loaded()
    assert kernels is not None
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    kernels.rms_norm(*at, x.numel() // size, size, eps)
    return y


def all_finite(x: torch.Tensor) -> bool:
    """Whether ``x`` is known to hold neither NaN nor infinity: only bfloat16 on a CPU can be."""
    if (kernels := _readable(x)) is None:
        return False
    return bool(kernels.all_finite(x.data_ptr(), x.numel()))


def largest(x: torch.Tensor, among: int) -> tuple[int, ...] | None:
    """Where rows ``x`` [n, V] have their largest number ``among`` the first, the first of equals.

    None for other rows than of bfloat16 on a CPU, and where a number is NaN, or the largest is not
    finite.
    """
    if (kernels := _readable(x)) is None:
        return None
    rows, size = x.shape
    at = x.data_ptr()
    found = tuple([kernels.largest(at + 2 * size * row, among) for row in range(rows)])
    return None if -1 in found else found


def _readable(x: torch.Tensor) -> ctypes.CDLL | None:
    """What can read ``x``."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or not x.is_contiguous():
        return None
    return loaded()


Pointers = ctypes.Array[ctypes.c_void_p]


def pointers(
    weights: Sequence[torch.Tensor | Packed | None], matrices: Sequence[torch.Tensor | Packed]
) -> Pointers:
    """Where weights lie, and what the ``matrices`` are made of; they have to outlive it."""
    places = [None if weight is None else _stored(weight)[0].data_ptr() for weight in weights]
    kinds = [_stored(matrix)[1] for matrix in matrices]
    return (POINTER * (len(places) + len(kinds)))(*places, *kinds)


def kind(dtype: str) -> str:
    """What decodes in ``dtype``, a name, on this CPU: ``compiled``, ``packed`` or ``PyTorch``.

    ``packed`` is compiled as well, and reads weights in the codes of their file.
    """
    if dtype != "bfloat16" or loaded() is None:
        return "PyTorch"
    return "packed" if packs() else "compiled"


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The compiled kernels; None where PyTorch's operations are to be used."""
    unasked = os.environ.get("PPSD_KERNELS") == "torch" or platform.system() != "Linux"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if unasked or not shutil.which(compiler[0]):
        return None
    try:
        build = functools.partial(_build, compiler)
        return _load(cached(SOURCE, _kind(compiler), build, _write, _read))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2] or str(error)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error)
    warnings.warn(f"bfloat16 will be slow, as kernels.c cannot be built: {reason}", stacklevel=2)
    return None


def _kind(compiler: list[str]) -> str:
    """A name for what this compiler makes for this CPU."""
    status = Path(shutil.which(compiler[0]) or "").stat()
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    features = next((line for line in cpu if line.startswith(("flags", "Features"))), "")
    parts = (*compiler, status.st_size, status.st_mtime_ns, *FLAGS, platform.machine(), features)
    identity = SOURCE.read_bytes() + PRODUCTS.read_bytes() + json.dumps(parts).encode()
    return f"kernels-{hashlib.sha256(identity).hexdigest()[:16]}"


def _build(compiler: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as work:
        built = Path(work) / BUILT
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        return built.read_bytes()


def _write(built: bytes, directory: Path) -> None:
    (directory / BUILT).write_bytes(built)


def _read(files: Mapping[str, bytes]) -> bytes:
    """Return a cached library; one that cannot be used is built anew (see ``cached``)."""
    _load(files[BUILT])
    return files[BUILT]


def _load(built: bytes) -> ctypes.CDLL:
    """Open the compiled file. Raises OSError or RuntimeError for one that is not fit for use."""
    memory = os.memfd_create(BUILT)  # stays open: the linker knows a library by this path
    with open(memory, "wb", closefd=False) as file:
        file.write(built)
    kernels = ctypes.CDLL(f"/proc/self/fd/{memory}")
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, result
    _check(kernels)
    return kernels


def _check(kernels: ctypes.CDLL) -> None:
    """Raise RuntimeError unless this compiler kept what the bits of a row rest on."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3 * STEP, generator=generator).bfloat16() for n in (7, 5))
    product = Product(weight, kernels=kernels)
    alone = torch.cat([product(x[row : row + 1]) for row in range(7)])
    for rows in (2, 3, 7):  # blocks of 4 rows, and what may be left
        if not torch.equal(product(x[:rows]), alone[:rows]):
            raise RuntimeError("a row's result depends on other rows")
