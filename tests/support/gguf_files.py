"""Small GGUF files, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one value of metadata under the type that converters give it."""
    kinds: list[tuple[type, Callable[[str, Any], None]]] = [
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ]
    next(add for kind, add in kinds if isinstance(value, kind))(key, value)


def write_tokenizer(
    path: Path, tokens: Sequence[str], types: Sequence[int] | None = None, **keys: Any
) -> Path:
    """Write a file that holds a tokenizer only; a key is one of ``tokenizer.ggml``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(list(tokens))
    if types is not None:
        writer.add_token_types(list(types))
    for key, value in keys.items():
        add_value(writer, f"tokenizer.ggml.{key}", value)
    writer.add_tensor("nothing", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
