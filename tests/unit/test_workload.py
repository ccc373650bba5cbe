"""Prompt files: every accepted shape, and what is said about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.errors import ConfigError, PpsdError
from ppsd.measure.workload import load_tasks


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_every_shape_of_record(write) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    records = [
        {"prompt": "p", "id": 7, "category": "maths"},
        {"question": "q", "task": "code"},
        {"turns": ["first", "second"], "question_id": 0},
        {"messages": chat, "task_id": "HumanEval/3"},
    ]
    tasks = load_tasks(write("\n\n".join(json.dumps(r) for r in records)))
    assert [task.messages for task in tasks] == [user("p"), user("q"), user("first"), tuple(chat)]
    assert [task.id for task in tasks] == ["7", "3", "0", "HumanEval/3"]
    assert [task.category for task in tasks] == ["maths", "code", "prompts", "prompts"]


def test_text_file_has_a_prompt_a_line(write) -> None:
    tasks = load_tasks(write("one\n\n{two}\r\n", "prompts.txt"))
    assert [(task.id, task.messages) for task in tasks] == [
        ("1", user("one")),
        ("3", user("{two}")),
    ]


def test_only_line_feeds_end_a_line(write) -> None:
    text = "a\u2028b\u0085c\x0cd"
    tasks = load_tasks(write(json.dumps({"prompt": text}, ensure_ascii=False)))
    assert [task.messages for task in tasks] == [user(text)]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(write) -> None:
    assert load_tasks(write(b"\xef\xbb\xbfhello", "p.txt"))[0].messages == user("hello")


def test_limit_takes_evenly_from_the_whole_file(write) -> None:
    path = write("\n".join(f"p{i}" for i in range(10)), "p.txt")
    assert [task.id for task in load_tasks(path, 4)] == ["1", "3", "6", "8"]
    assert len(load_tasks(path, 99)) == 10


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        "5",
        '"prompt"',
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"turns": []}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": "hi"}',
    ],
)
def test_a_bad_line_is_named(write, line) -> None:
    with pytest.raises(PpsdError, match=r"prompts\.jsonl, line 2: needs a JSON object with one of"):
        load_tasks(write('{"prompt": "fine"}\n' + line))


def test_files_that_cannot_be_read(write, tmp_path) -> None:
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(PpsdError, match=f"^cannot read prompts from {missing}: No such file"):
        load_tasks(missing)
    with pytest.raises(PpsdError, match="Is a directory"):
        load_tasks(tmp_path)
    with pytest.raises(PpsdError, match="not UTF-8"):
        load_tasks(write(b"\xff\xfe"))
    with pytest.raises(PpsdError, match="holds no prompts"):
        load_tasks(write("\n \n"))
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        load_tasks(write("x"), 0)


def test_an_id_that_is_null_is_none(write) -> None:
    rows = [{"id": None, "prompt": "one"}, {"question_id": None, "id": 7, "prompt": "two"}]
    assert [task.id for task in load_tasks(write("\n".join(map(json.dumps, rows))))] == ["1", "7"]
