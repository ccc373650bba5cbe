"""``ppsd-lab tasks`` and ``ppsd-lab baselines`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.errors import ConfigError
from tests.support.command import lab


@pytest.fixture
def small(tiny_model, tmp_path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"question_id": i, "category": name, "turns": [f"say {i}"]} for i, name in enumerate("aab")
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline = f"--model {tiny_model()} --dtype float32 --transport inprocess --head untrained"
    return [*pipeline.split(), "--prompts", str(prompts), "--max-tokens", "5"]


def test_tasks_as_json_and_continued(small, tmp_path: Path) -> None:
    flags = [*small, "--gammas", "1,2", "--sampled", "--out", tmp_path / "m.jsonl", "--json"]
    result = lab("tasks", *flags)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {row["group"] for row in record["rows"]} == {
        "all",
        "a",
        "b",
        "all T=1",
        "a T=1",
        "b T=1",
    }
    names = ["plain", "ppsd", "draft-then-verify γ=1", "draft-then-verify γ=2"]
    assert [r["variant"] for r in record["rows"] if r["group"] == "all"] == names
    assert [r["tasks"] for r in record["rows"] if r["variant"] == "ppsd"] == [3, 2, 1] * 2
    assert all(row["differing"] == 0 for row in record["rows"])
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 1 + 2 * 3 * 4
    again = json.loads(lab("tasks", *flags).stdout)
    assert again["rows"] == record["rows"]


def test_a_table_without_json(small) -> None:
    result = lab("tasks", *small, "--gammas", "")
    assert result.exit_code == 0, result.output
    assert "ppsd" in result.stdout
    assert "×" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--head", "none"], "head must be an exit head"),
        (["--gammas", "0"], "gamma"),
        (["--gammas", "x"], "gammas"),
    ],
)
def test_what_it_refuses(small, flags, words) -> None:
    result = lab("tasks", *small, *flags)
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)
