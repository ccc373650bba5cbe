"""Prompt files for verification and benchmarks: JSONL of several shapes, or plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, PpsdError

FIELDS = ("prompt", "question", "turns", "messages")


@dataclass(frozen=True)
class Task:
    """One prompt as chat messages, with the id and category its file gives it."""

    id: str
    category: str
    messages: tuple[dict[str, str], ...]


def default_tasks() -> list[Task]:
    """Return one short prompt, for measurements that do not depend on what is said."""
    return [Task("sky", "text", _user("Explain in simple words why the sky is blue."))]


def load_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """Read tasks from a JSONL file (one object a line) or a text file (one prompt a line).

    An object has ``prompt`` or ``question`` (text), ``turns`` (the first is taken) or
    ``messages``; ``category`` or ``task`` is optional. With a ``limit``, tasks are taken evenly
    from the whole file, so that every category has its share. Raises PpsdError naming file and
    line for what cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "at least 1")
    numbered = [(n, line) for n, line in enumerate(_lines(path), start=1) if line.strip()]
    if not numbered:
        raise PpsdError(f"{path} holds no prompts")
    if limit is not None and limit < len(numbered):
        numbered = [numbered[i * len(numbered) // limit] for i in range(limit)]
    if checks.has_lines_of_json(path):
        return [_task(path, n, line) for n, line in numbered]
    return [Task(str(n), "text", _user(line)) for n, line in numbered]


def digest(tasks: Sequence[Task]) -> str:
    """Return hexadecimal digits of what is asked, whatever the tasks are called."""
    asked = json.dumps([task.messages for task in tasks])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _lines(path: Path) -> list[str]:
    """Read lines, split at line feeds only: JSON may hold any other separator inside a string."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PpsdError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PpsdError(f"cannot read prompts from {path}: it is not UTF-8 ({error})") from error
    return text.split("\n")


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _task(path: Path, number: int, line: str) -> Task:
    try:
        record = json.loads(line)
        messages = _messages(record)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise PpsdError(
            f"{path}, line {number}: needs a JSON object with one of {', '.join(FIELDS)} ({error})"
        ) from error
    ids = (record.get(name) for name in ("question_id", "task_id", "id"))
    name = next((str(found) for found in ids if found is not None), None)
    category = str(record.get("category") or record.get("task") or path.stem)
    return Task(name or str(number), category, messages)


def _messages(record: dict[str, Any]) -> tuple[dict[str, str], ...]:
    if "messages" in record:
        messages = record["messages"]
        found = tuple({k: _text(m[k]) for k in ("role", "content")} for m in messages)
        if not found:
            raise ValueError("there are no messages")
        return found
    if "turns" in record:
        return _user(_text(record["turns"][0]))
    return _user(_text(record["prompt"] if "prompt" in record else record["question"]))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is not a non-empty text")
    return checks.unicode("text", value)
