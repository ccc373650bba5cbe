"""The steps of a layer for a few bfloat16 rows, where PyTorch has no fast ones: kernels.c.

The machine's C compiler builds it at first use, for this very CPU, into ppsd's cache directory.
Without a compiler, or with ``PPSD_KERNELS=torch``, PyTorch's own operations are used instead.

All functions round once, at their end, and give a row the same bits whatever rows come with it.
Shapes as in layers.py; arguments have to satisfy ``fits``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ppsd.model.sidecar import cache_root
from ppsd.model.spec import ModelSpec

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
COMPILE_S = 60.0
MAX_ROWS = 16  # above, widening all weights once costs no more than doing it for every 4 rows
STEP = 32  # sizes are multiples of it
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Shape(ctypes.Structure):
    """What a layer computes on: Shape of kernels.c."""

    _fields_ = [
        *((name, LONG) for name in ("rows", "position", "hidden", "heads", "groups", "size")),
        ("inner", LONG),
        ("capacity", LONG),
        ("eps", FLOAT),
        ("threads", INT),
    ]


SIGNATURES = {
    "linear": ([POINTER] * 6 + [LONG] * 3 + [INT], None),
    "rms_norm": ([POINTER] * 3 + [LONG] * 2 + [FLOAT], None),
    "decoder_layer": ([POINTER] * 3 + [ctypes.POINTER(Shape)] + [POINTER] * 4, INT),
}


def fits(x: torch.Tensor, *sizes: int) -> bool:
    """Whether to use the functions here for the rows ``x`` [n, …, size] and further ``sizes``."""
    return (
        x.dtype == torch.bfloat16
        and x.shape[0] <= MAX_ROWS
        and not any(size % STEP for size in (x.shape[-1], *sizes))
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and library() is not None
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [n, in] times ``weight`` [out, in] transposed, plus ``bias``; [n, out]."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, size = x.shape
    out = weight.shape[0]
    y, wide = x.new_empty(rows, out), torch.empty(rows, size)
    added = None if bias is None else bias.data_ptr()
    at = x.data_ptr(), weight.data_ptr(), added, None, y.data_ptr(), wide.data_ptr()
    _library().linear(*at, rows, size, out, torch.get_num_threads())
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of ``x`` […, C] over its last dimension."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    at = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    _library().rms_norm(*at, x.numel() // size, size, eps)
    return y


def decoder_layer(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    spec: ModelSpec,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
) -> torch.Tensor:
    """One layer for rows ``x`` [n, C] at ``position``; ``weights`` in the order of LayerWeights.

    Rotates by ``cos`` and signed ``sin`` [n, 1, D]; writes ``keys``, ``values`` [K, cap, D].
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size, keys.shape[1]
    shape = Shape(
        x.shape[0], position, x.shape[1], *sizes, spec.rms_norm_eps, torch.get_num_threads()
    )
    pointers = (POINTER * len(weights))(*(None if w is None else w.data_ptr() for w in weights))
    others = [t.data_ptr() for t in (cos, sin, keys, values)]
    if _library().decoder_layer(x.data_ptr(), y.data_ptr(), pointers, shape, *others):
        raise MemoryError("no memory for the work space of a decoder layer")
    return y


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where PyTorch's operations are to be used."""
    if os.environ.get("PPSD_KERNELS") == "torch" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        kernels = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError):  # no compiler, or not a fit one: slower, as right
        return None
    for name, (arguments, result) in SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, result
    return kernels


def _library() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "asked for without fits()"
    return kernels


def _built() -> Path:
    """The compiled file for this CPU and compiler. Raises OSError or SubprocessError."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    parts = (SOURCE.read_text(), compiler, *FLAGS, _cpu_flags())
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    target = cache_root() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            draft = Path(work) / name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(draft), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
            draft.replace(target)
    return target


def _cpu_flags() -> str:
    """What tells CPUs apart that need code of their own."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
