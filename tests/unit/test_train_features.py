"""Kept rows: the frozen model's own, rounded; found again, continued after a kill, never mixed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd.errors import PpsdError
from ppsd.train.batched import teacher_forward
from ppsd.train.data import make_batch
from ppsd.train.features import INDEX, FeatureStore
from ppsd.train.run import Teacher
from tests.support.teachers import random_examples, tiny_config, tiny_teacher

Models = Callable[[str], Path]
LAYERS = (2, 1)
COUNT = 20
EXAMPLES = random_examples(COUNT)


@pytest.fixture
def teacher(tiny_model: Models) -> Teacher:
    return tiny_teacher(tiny_model("llama"), tiny_config())


def open_store(path: Path, teacher: Teacher, layers: tuple[int, ...] = LAYERS) -> FeatureStore:
    return FeatureStore(path, teacher.stage, layers, teacher.compute)


def fill(store: FeatureStore, count: int = COUNT) -> list[tuple[int, int]]:
    """Fill with the first ``count`` examples; give what was reported."""
    seen: list[tuple[int, int]] = []
    store.fill(EXAMPLES[:count], lambda done, total: seen.append((done, total)))
    return seen


def tokens(first: int, last: int) -> int:
    return sum(len(example.tokens) for example in EXAMPLES[first:last])


def check(store: FeatureStore, teacher: Teacher) -> None:
    """Every example's kept rows are the model's rows, whatever batch they are read in."""
    batch = make_batch(EXAMPLES, teacher.stage.plan.device)
    kept = store(batch)
    assert list(kept.exits) == list(LAYERS)
    for i, example in enumerate(EXAMPLES):
        alone = teacher_forward(teacher.stage, example.tokens.long()[None], LAYERS)
        length = len(example.tokens)
        for layer, rows in [*alone.exits.items(), (-1, alone.last)]:
            found = (kept.last if layer == -1 else kept.exits[layer]).unflatten(0, (COUNT, -1))[i]
            torch.testing.assert_close(
                found[:length], rows.to(torch.bfloat16).to(rows.dtype), rtol=2**-7, atol=1e-6
            )
            assert not found[length:].any()


def test_rows_are_those_of_the_model(teacher: Teacher, tmp_path: Path) -> None:
    store = open_store(tmp_path / "rows", teacher)
    assert fill(store)[-1] == (tokens(0, COUNT), tokens(0, COUNT))
    check(store, teacher)


def test_what_is_kept_is_not_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    fill(open_store(tmp_path, teacher), 12)
    again = open_store(tmp_path, teacher)
    assert fill(again, 12) == []
    assert fill(again)[-1] == (tokens(12, COUNT), tokens(12, COUNT))
    check(again, teacher)


def test_a_killed_fill_goes_on(teacher: Teacher, tmp_path: Path) -> None:
    fill(open_store(tmp_path, teacher))
    index = tmp_path / INDEX
    lines = index.read_text().split("\n")
    index.write_text("\n".join(lines[:7]) + "\n" + lines[7][:5])
    assert fill(open_store(tmp_path, teacher))
    check(open_store(tmp_path, teacher), teacher)


def test_rows_of_another_model_or_without_a_layer_are_refused(
    teacher: Teacher, tmp_path: Path
) -> None:
    open_store(tmp_path, teacher)
    with pytest.raises(PpsdError, match="give another --features"):
        open_store(tmp_path, teacher, (3,))
    with pytest.raises(PpsdError, match="give another --features"):
        FeatureStore(tmp_path, teacher.stage, LAYERS, "another model")
    (tmp_path / INDEX).write_text("[1]\n")
    with pytest.raises(PpsdError, match="cannot use"):
        open_store(tmp_path, teacher)


def test_runs_that_share_a_directory_take_note_of_each_other(
    teacher: Teacher, tmp_path: Path
) -> None:
    first, second = open_store(tmp_path, teacher), open_store(tmp_path, teacher)
    fill(first, 6)
    fill(second, COUNT)
    fill(first)
    for store in (first, second, open_store(tmp_path, teacher)):
        check(store, teacher)


@pytest.mark.parametrize("change", ["lost", '"rows": 1.5', '"rows": -7', '"rows": 0'])
def test_an_index_that_would_shift_rows_is_refused(
    teacher: Teacher, tmp_path: Path, change: str
) -> None:
    fill(open_store(tmp_path, teacher))
    header, first, *rest = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    kept = "" if change == "lost" else re.sub(r'"rows": \d+', change, first)
    (tmp_path / "index.jsonl").write_text("".join([header, kept, *rest]))
    with pytest.raises(PpsdError, match=r"for --features: (a line is missing|rows must be an int)"):
        open_store(tmp_path, teacher)


def test_a_file_that_lost_rows_is_named(teacher: Teacher, tmp_path: Path) -> None:
    fill(open_store(tmp_path, teacher))
    (tmp_path / "layer-1.bf16").write_bytes(b"")
    with pytest.raises(PpsdError, match=r"layer-1\.bf16 lacks rows that index\.jsonl names"):
        open_store(tmp_path, teacher)
