"""Read tensors by their canonical Hugging Face names, one at a time, from safetensors.

Stages ask a TensorSource for what they own and for nothing else. GGUF is in gguf_file.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ppsd.errors import ModelError, cause_of, shortened
from ppsd.model.kernels import Kind
from ppsd.model.names import EMBEDDING, LM_HEAD, expected_shapes
from ppsd.model.packed import Codes
from ppsd.model.row_file import RowFile
from ppsd.model.spec import ModelSpec

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
FINGERPRINTED = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
)


class TensorSource(Protocol):
    """A model's tensors: what there is, and each of them on demand."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by canonical name, without touching the data."""

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one tensor in its own contiguous memory, converted to ``dtype``.

        Raises ModelError naming file and tensor when it is missing or unreadable.
        """

    def rows(self, name: str, dtype: torch.dtype) -> RowFile:
        """Return a reader of a matrix' rows as ``load`` returns them, which outlives the source."""

    def name_in_file(self, name: str) -> str:
        """Return what the file calls a tensor, whether it is there or not."""

    def kind(self, name: str) -> Kind | None:
        """Return the kind of codes that a weight is stored in; None if ``codes`` would fail."""

    def codes(self, name: str) -> Codes:
        """Return a weight as it is stored: ``load`` returns its numbers, rounded to bfloat16."""


def check_shapes(source: TensorSource, spec: ModelSpec) -> None:
    """Raise ModelError unless the source holds exactly the tensors ``spec`` describes.

    Stored rotary frequencies and a stored copy of a tied LM head are known extras; neither is used.
    """
    actual, expected = source.shapes(), expected_shapes(spec)
    for name, shape in expected.items():
        if name not in actual:
            raise ModelError(f"{spec.name}: tensor {source.name_in_file(name)} is missing")
        if tuple(actual[name]) != shape:
            raise ModelError(
                f"{spec.name}: tensor {source.name_in_file(name)} has shape {list(actual[name])}, "
                f"but the configuration asks for {list(shape)}"
            )
    extras = [name for name in actual if name not in expected and not _known_extra(name, spec)]
    if extras:
        raise ModelError(
            f"{spec.name}: {len(extras)} tensors do not belong to this architecture, "
            f"the first is {source.name_in_file(extras[0])}"
        )


def _known_extra(name: str, spec: ModelSpec) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and spec.tie_embeddings)


def fingerprint(spec: ModelSpec, source: TensorSource) -> str:
    """Return a SHA-256 (hex) that tells which model this is, whatever file format it is stored in.

    It covers the sizes and the float32 values of all one-dimensional tensors (norm weights and
    biases), to the bit: files that it tells apart may still be of one model for a head, see
    ``identity.Identity``. A fine-tune that left all norms and biases untouched, as merged LoRA
    does, is *not* told apart.
    """
    sizes = [getattr(spec, size) for size in FINGERPRINTED]
    # Converters write 1e-6 as the float32 next to it: both are the same number to a model.
    sizes = [float(str(np.float32(x))) if isinstance(x, float) else x for x in sizes]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    for name, shape in sorted(expected_shapes(spec).items()):
        if len(shape) == 1:
            digest.update(name.encode())
            digest.update(source.load(name, torch.float32).numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def weights_mark(spec: ModelSpec, source: TensorSource) -> str:
    """Return a digest (hex) of some rows of every matrix: of what a model's cached rows are.

    Stricter than ``fingerprint``: it tells fine-tunes and file formats apart, too.
    """
    digest = hashlib.sha256(fingerprint(spec, source).encode())
    for name, shape in sorted(expected_shapes(spec).items()):
        if len(shape) == 2:
            rows = torch.tensor([0, shape[0] // 2, shape[0] - 1])
            digest.update(source.rows(name, torch.float32)(rows).numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def codes_digest(spec: ModelSpec, source: TensorSource) -> str:
    """Return a short digest of which weights are stored in which codes; empty if none is."""
    kinds = {name: source.kind(name) for name in sorted(expected_shapes(spec))}
    coded = {name: kind for name, kind in kinds.items() if kind is not None}
    return hashlib.sha256(json.dumps(coded).encode()).hexdigest()[:8] if coded else ""


def own_head_notice(directory: Path) -> str:
    """Return a notice when a model that ties its LM head stores another one, else nothing.

    As in transformers, the stored LM head is used then. A directory whose weights cannot be read
    gives no notice: loading says what is wrong with it.
    """
    try:
        source = SafetensorsSource(directory)
        shapes = source.shapes()
        if not {EMBEDDING, LM_HEAD} <= shapes.keys() or shapes[EMBEDDING] != shapes[LM_HEAD]:
            return ""
        floats = all(source.stored(name) in FLOAT_TYPES for name in (EMBEDDING, LM_HEAD))
        if floats and torch.equal(source.view(EMBEDDING), source.view(LM_HEAD)):
            return ""
    except ModelError:
        return ""
    return "tie_word_embeddings is ignored: the file's LM head differs from its embedding"


def open_source(path: Path) -> TensorSource:
    """Open a .gguf file or a directory of safetensors, whichever ``path`` is."""
    if not path.is_dir():
        from ppsd.model.gguf_file import GGUFSource

        return GGUFSource(path)
    return SafetensorsSource(path)


class SafetensorsSource:
    """The safetensors of a directory: model.safetensors, or shards with their index.

    Files are opened on first use and stay memory-mapped. Raises ModelError for pickle files, for
    an index that points outside the directory and for files that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._index = self._read_index()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(self._slice(name).get_shape()) for name in self._index}

    def stored(self, name: str) -> str:
        """Return the dtype of one tensor by its name in the file."""
        dtype: str = self._slice(name).get_dtype()
        return dtype

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        self._check_floats(name)
        return self.view(name).to(dtype, copy=True).contiguous()

    def rows(self, name: str, dtype: torch.dtype) -> RowFile:
        self._check_floats(name)
        width, stored = self.view(name).shape[1], self.view(name).dtype
        path = self._directory / self._index[name]
        with path.open("rb") as file:  # a length, a header, and the tensors behind it
            size = int.from_bytes(file.read(8), "little")
            start = 8 + size + json.loads(file.read(size))[name]["data_offsets"][0]

        def decode(rows: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(rows).view(stored).to(dtype)

        return RowFile(path, start, width * stored.itemsize, decode)

    def view(self, name: str) -> torch.Tensor:
        """Return one tensor as the file holds it, in the file's own mapped memory."""
        mapped: torch.Tensor = self._open(self._index[name]).get_tensor(name)
        return mapped

    def name_in_file(self, name: str) -> str:
        """Return the same name: safetensors hold canonical ones."""
        return name

    def kind(self, name: str) -> Kind | None:
        """Return None: safetensors hold numbers."""
        return None

    def codes(self, name: str) -> Codes:
        raise ModelError(f"{self._directory}: tensor {name} is not stored in codes")

    def _check_floats(self, name: str) -> None:
        if (stored := self.stored(name)) not in FLOAT_TYPES:
            raise ModelError(
                f"{self._directory / self._index[name]}: tensor {name} has dtype {stored}; "
                f"supported are {', '.join(FLOAT_TYPES)}"
            )

    def _slice(self, name: str) -> Any:
        if name not in self._index:
            raise ModelError(f"{self._directory}: tensor {name} is missing")
        try:
            return self._open(self._index[name]).get_slice(name)
        except SafetensorError as error:
            file = self._directory / self._index[name]
            raise ModelError(f"{file}: tensor {name} is missing ({error})") from error

    def _open(self, filename: str) -> Any:
        if filename not in self._files:
            file = self._directory / filename
            if file.exists() and not file.is_file():  # opening a named pipe would wait for ever
                raise ModelError(f"{file}: not a readable safetensors file (not a regular file)")
            try:
                self._files[filename] = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise ModelError(f"{file}: this shard is missing") from error
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: not a readable safetensors file ({cause_of(error)})"
                ) from error
        return self._files[filename]

    def _read_index(self) -> dict[str, str]:
        """Return the file name of every tensor."""
        index = self._directory / "model.safetensors.index.json"
        single = "model.safetensors"
        shards = _weight_map(index) if index.is_file() else None
        if not (self._directory / single).exists():
            if shards is not None:
                return shards
        else:
            stored = dict.fromkeys(self._open(single).keys(), single)
            if shards not in (None, stored):  # transformers reads one of them without a word
                raise ModelError(
                    f"{self._directory}: {single} and {index.name} disagree about where the "
                    "tensors are; remove the one that is out of date"
                )
            return stored
        if any(self._directory.glob("*.bin")):
            raise ModelError(
                f"{self._directory}: holds only pickle weights (*.bin), which can run code when "
                "read; convert them to safetensors"
            )
        if (self._directory / "adapter_config.json").is_file():
            raise ModelError(
                f"{self._directory}: is an adapter; merge it into its model and give the result"
            )
        raise ModelError(f"{self._directory}: has neither {single} nor {index.name}")


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index, whose shards must lie beside it (links of a download cache may lead away)."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = shortened(repr(error))
        raise ModelError(f"{index}: not a safetensors index ({told})") from error
    for name, file in shards.items():
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index}: tensor {name} points to {file!r}; "
                "allowed are .safetensors files in the same directory"
            )
    return shards
