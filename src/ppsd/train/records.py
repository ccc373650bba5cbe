"""Read training data: JSONL of prompts, chats or texts, plain text files, hub datasets.

Nothing is tokenised here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, PpsdError, cause_of
from ppsd.model.head_files import PROMPT_DIGITS
from ppsd.model.source import HUB_ID

FIELDS = "prompt (and target), messages, or text"
TEXTS = (".jsonl", ".json", ".txt", ".md")  # names that end so are files, not hub datasets
KEPT = ("id", "source", "task", "category")  # what else of a row is worth keeping

Message = dict[str, str]


@dataclass(frozen=True)
class Record:
    """One row: a conversation with its target answer, or running ``text`` without a prompt.

    ``target`` None asks for self-generation. ``target_ids`` are the exact tokens that the model
    with fingerprint ``model`` wrote; for another model the text counts.
    """

    where: str
    messages: tuple[Message, ...] = ()
    target: str | None = None
    target_ids: tuple[int, ...] = ()
    model: str = ""
    text: str | None = None
    about: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def key(self) -> str:
        """Return a digest of the conversation, the same in whatever file it stands."""
        return _digest(self.messages)

    @cached_property
    def opening(self) -> str:
        """Return a digest of its user's first message, or of all messages without one.

        Whatever the system message says, an answer to the same question may say the same.
        """
        users = (m["content"] for m in self.messages if m["role"] == "user")
        first = next(users, None)
        return _digest(self.messages) if first is None else prompt_digest(first)

    @cached_property
    def prompts(self) -> frozenset[str]:
        """Return digests of everything that its user says, or of running text."""
        said = {m["content"] for m in self.messages if m["role"] == "user"}
        return frozenset(map(prompt_digest, said if self.text is None else {self.text}))


def _digest(messages: Sequence[Message]) -> str:
    content = json.dumps(messages, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def prompt_digest(text: str) -> str:
    """Return hexadecimal digits of a prompt, the same whatever its case and white space."""
    plain = " ".join(text.casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:PROMPT_DIGITS]


@dataclass(frozen=True)
class DataFile:
    """A source of records and its use, for provenance."""

    name: str
    sha256: str
    records: int
    use: str = "training"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_data(names: Sequence[str]) -> tuple[list[Record], list[DataFile]]:
    """Read all files and hub datasets in order; raises PpsdError naming file and line."""
    records: list[Record] = []
    files: list[DataFile] = []
    for name in names:
        found, digest = _read_one(name)
        if not found:
            raise PpsdError(f"{name} holds no training data")
        records += found
        files.append(DataFile(name, digest, len(found)))
    return records, files


def _read_one(name: str) -> tuple[list[Record], str]:
    path = Path(name)
    if not path.exists() and path.suffix.lower() not in TEXTS and HUB_ID.fullmatch(name):
        return _read_hub(name)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")  # some editors mark a text's beginning
    except (OSError, UnicodeDecodeError) as error:
        raise PpsdError(f"cannot read training data from {name}: {cause_of(error)}") from error
    digest = hashlib.sha256(content).hexdigest()
    if checks.has_lines_of_json(path):
        return list(_parse_lines(name, text.split("\n"))), digest
    return [Record(name, text=text)] if text.strip() else [], digest


def _parse_lines(name: str, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PpsdError(f"{where}: not JSON ({error})") from error
        yield from parse_row(row, where)


def parse_row(row: Any, where: str) -> Iterator[Record]:
    """Return the records of a JSON object; a chat has one for each message of the assistant."""
    try:
        about = tuple((name, row[name]) for name in KEPT if name in row)
        if "messages" in row:
            yield from _parse_chat(row, where, about)
        elif "prompt" in row:
            target = _text(row["target"]) if row.get("target") is not None else None
            user = {"role": "user", "content": _text(row["prompt"])}
            yield Record(where, (user,), target, about=about)
        else:
            yield Record(where, text=_text(row["text"]), about=about)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise PpsdError(f"{where}: needs an object with {FIELDS} ({error!r})") from error


def _parse_chat(
    row: Mapping[str, Any], where: str, about: tuple[tuple[str, Any], ...]
) -> Iterator[Record]:
    turns = [{"role": _text(m["role"]), "content": _text(m["content"])} for m in row["messages"]]
    if not turns:
        raise TypeError("messages is empty")
    if row.get("target") is not None:
        ids = tuple(int(token) for token in row.get("target_ids", ()))
        model = str(row.get("model", ""))
        target = "" if row["target"] == "" else _text(row["target"])  # a model may say nothing
        yield Record(where, tuple(turns), target, ids, model, about=about)
        return
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and i > 0:
            yield Record(where, tuple(turns[:i]), turn["content"], about=about)
    if turns[-1]["role"] != "assistant":
        yield Record(where, tuple(turns), about=about)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a non-empty text")
    return checks.unicode("text", value)


def _read_hub(name: str) -> tuple[list[Record], str]:
    """Read a hub dataset's train split; the digest is the dataset's own fingerprint."""
    if importlib.util.find_spec("datasets") is None:
        allowed = "a file, or a hub dataset with the package `datasets` installed (it is not)"
        raise ConfigError("data", name, allowed)
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # the package raises dozens of unrelated types
        text = " ".join(str(error).split())[:300]
        raise PpsdError(f"hub dataset {name!r} cannot be loaded: {text}") from error
    records = [r for i, row in enumerate(rows) for r in parse_row(row, f"{name}, row {i}")]
    return records, str(getattr(rows, "_fingerprint", ""))
