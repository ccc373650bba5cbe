"""The heads that ship: they load, they are small, and no evaluation prompt trained them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ppsd.config import EngineConfig
from ppsd.errors import HeadError
from ppsd.model.head_files import PROMPT_DIGITS, PROMPTS_FILE, read_prompts
from ppsd.model.head_library import SHIPPED, FoundHead, find_heads
from ppsd.provenance import provenance
from ppsd.train.records import prompt_digest

EVALUATION = Path(__file__).parents[1] / "data" / "evaluation_prompts.txt"
EXPECTED = {("transformer", n) for n in (4, 8, 15, 18)} | {("norm", 8)}
ALL_BYTES = 16_000_000

HEADS = [head for head in find_heads() if head.shipped]


def test_there_is_a_head_for_each_exit() -> None:
    configs = [head.config for head in HEADS]
    assert {(c.kind, c.exit_layer) for c in configs if c is not None} == EXPECTED
    assert len(configs) == len(EXPECTED)


def test_they_are_small() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= ALL_BYTES


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.path.name)
def test_they_say_where_they_come_from(head: FoundHead) -> None:
    assert head.config is not None
    about = head.config.provenance
    assert head.config.trained
    assert about["command"].startswith("ppsd distill ")
    assert about["tokens"] > 0
    assert len(about["commit"]) >= 12
    assert all(len(file["sha256"]) == 64 for file in about["data"])
    assert 0 < head.config.metrics["validation"]["alpha"] < 1


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.path.name)
def test_no_evaluation_prompt_trained_them(head: FoundHead) -> None:
    trained = set(read_prompts(head.path))
    evaluation = set(EVALUATION.read_text().split())
    assert len(trained) > 500
    assert len(evaluation) > 2000
    assert trained.isdisjoint(evaluation)


def test_longer_digests_of_earlier_heads_are_compared_alike(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"who are you?").hexdigest()
    (tmp_path / PROMPTS_FILE).write_text(f"{digest[:16]}\n{digest[:PROMPT_DIGITS]}\n")
    assert read_prompts(tmp_path) == [prompt_digest("Who are you?")] * 2
    (tmp_path / PROMPTS_FILE).unlink()
    assert read_prompts(tmp_path) == []
    os.mkfifo(tmp_path / PROMPTS_FILE)
    with pytest.raises(HeadError, match=f"cannot read .*{PROMPTS_FILE}: not a regular file"):
        read_prompts(tmp_path)


def test_digests_do_not_mind_case_and_white_space() -> None:
    assert prompt_digest("Who  are\nyou?") == prompt_digest(" who are YOU? ")
    assert prompt_digest("Who are you?") != prompt_digest("Who am I?")


def test_results_name_them_as_anybody_can() -> None:
    """Not by where ppsd is installed here."""
    for head in HEADS:
        named = provenance(EngineConfig(head=str(head.path)))["config"]["head"]
        assert named == f"shipped {head.path.parent.name}/{head.path.name}"
    assert provenance(EngineConfig(head="own/head"))["config"]["head"] == "own/head"
