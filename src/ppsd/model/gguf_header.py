"""The header of a GGUF file, or of all parts of a split one: metadata and where tensors lie.

The header is read here because the gguf package takes seconds over a vocabulary that only the
tokenizer needs; it does supply the formats.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape

from ppsd.errors import ModelError, cause_of, shortened

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
LENGTH = struct.Struct("<Q")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")  # the stem that gguf-split gives a part's file
MAX_PARTS = 1024


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's ggml type, its shape in torch's order, and where its bytes lie in which part."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class Header:
    """A GGUF file's metadata and tensor table.

    ``metadata`` holds single values and those arrays that were asked for; ``arrays`` names the
    arrays that were skipped.
    """

    metadata: Mapping[str, Any]
    arrays: frozenset[str]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path, arrays: Collection[str] = ()) -> Header:
    """Read one file's header, in milliseconds unless large ``arrays`` are asked for.

    Raises ModelError naming the file when it is missing, truncated or not GGUF.
    """
    return _parse(_map_file(path), path, arrays)


class Part(NamedTuple):
    """A file of a model, and its bytes, mapped."""

    path: Path
    data: mmap.mmap


def read_parts(path: Path) -> tuple[Header, list[Part]]:
    """Read a file's header and map its bytes; a first part brings all the others of its model.

    The metadata is the first part's. Raises ModelError when a part is missing, when ``path`` is a
    later part, and when the parts do not hold the number of tensors that they state.
    """
    parts = [Part(path, _map_file(path))]
    header = _parse(parts[0].data, path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):  # gguf-split writes 0 into a file that it merged
        return header, parts
    tensors = dict(header.tensors)
    for part, file in enumerate(_part_files(path, header, count)[1:], start=1):
        parts.append(Part(file, _map_file(file)))
        for name, entry in _parse(parts[part].data, file).tensors.items():
            if name in tensors:
                raise ModelError(f"{file}: tensor {name} is also in an earlier part")
            tensors[name] = replace(entry, part=part)
    stated = header.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise ModelError(
            f"{path}: split.tensors.count is {stated}, but the {count} parts hold {len(tensors)}"
        )
    return replace(header, tensors=tensors), parts


def whole_name(path: Path) -> str:
    """Return the model's name: the stem of its file, without the number of a part."""
    match = PART.fullmatch(path.stem)
    return match[1] if match else path.stem


def named_parts(path: Path) -> list[Path]:
    """Return the files of all parts by their names, there or not; else the one file itself."""
    match = PART.fullmatch(path.stem)
    if match is None or int(match[3]) > MAX_PARTS:
        return [path]
    stem, count = match[1], int(match[3])
    return [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _part_files(path: Path, header: Header, count: object) -> list[Path]:
    """Return the files of all parts, which llama.cpp finds by their names."""
    number = header.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < count:
        told = shortened(f"split.no {number!r} and split.count {count!r}")
        raise ModelError(f"{path}: {told} do not fit")
    here = f"{path}: is part {number + 1} of {count} of a split model"
    match = PART.fullmatch(path.stem)
    if count > MAX_PARTS or match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise ModelError(
            f"{here}; its file name must end in -{number + 1:05}-of-{count:05}.gguf, "
            f"with at most {MAX_PARTS} parts"
        )
    files = named_parts(path)
    if number:
        raise ModelError(f"{here}; give the first one, {files[0].name}")
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(f"{here}; {', '.join(missing[:3])} must lie beside it")
    return files


def _map_file(path: Path) -> mmap.mmap:
    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        raise ModelError(f"{path}: cannot be read (not a regular file)")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({cause_of(error)})") from error


def _parse(data: mmap.mmap, path: Path, arrays: Collection[str] = ()) -> Header:
    try:
        return _Reader(data, arrays).header()
    except (ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a readable GGUF file ({error})") from error


class _Reader:
    """Read a header front to back; check every length against the file before its use."""

    def __init__(self, data: mmap.mmap, arrays: Collection[str]) -> None:
        self._data = data
        self._at = 0
        self._wanted = arrays

    def header(self) -> Header:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; supported are 2 and 3, little-endian")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        arrays: set[str] = set()
        for _ in range(pair_count):
            key = self._string()
            if key in metadata or key in arrays:
                raise ValueError(f"{shortened(key)} stands there twice")
            value = self._value(self._number("I"), key in self._wanted)
            if value is None:
                arrays.add(key)
            else:
                metadata[key] = value
        table = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {shortened(repr(alignment))}")
        start = -(-self._at // alignment) * alignment
        tensors = {info[0]: self._entry(*info, start) for info in table}
        if len(tensors) != tensor_count:
            raise ValueError("two tensors have the same name")
        return Header(metadata, frozenset(arrays), tensors)

    def _entry(
        self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int
    ) -> TensorEntry:
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ValueError(f"tensor {name} has the unknown type {kind}") from error
        nbytes = prod(quant_shape_to_byte_shape(shape, ggml_type))
        if not nbytes or start + offset + nbytes > len(self._data):
            raise ValueError(f"tensor {name} of {nbytes} bytes reaches past the end of the file")
        return TensorEntry(ggml_type, shape, start + offset, nbytes)

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, self._number("I"), shape, self._number("Q")

    def _value(self, kind: int, wanted: bool) -> Any:
        """Return a value; None for an array that nobody asked for."""
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array(wanted)
        if kind not in SCALARS:
            raise ValueError(f"metadata of the unknown type {kind}")
        number = self._number(SCALARS[kind])
        # 1e-5 is stored as the float32 next to it: take the shortest decimal that means the same
        return float(str(np.float32(number))) if SCALARS[kind] == "f" else number

    def _array(self, wanted: bool) -> list[Any] | None:
        kind, count = self._number("I"), self._number("Q")
        if kind in SCALARS:
            code = SCALARS[kind]
            numbers = self._take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", numbers)) if wanted else None
        if kind != STRING:
            raise ValueError(f"a metadata array of type {kind}")
        if wanted:
            return [self._string() for _ in range(count)]
        data, at, end = self._data, self._at, len(self._data) - LENGTH.size
        for _ in range(count):  # in local variables: a vocabulary has 10**5 strings
            if at > end:
                raise ValueError("it ends inside the header")
            at += LENGTH.size + LENGTH.unpack_from(data, at)[0]
        self._at = at
        self._take(0)  # refuses a last string that reaches past the end
        return None

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("it ends inside the header")
        self._at += count
        return self._data[self._at - count : self._at]
