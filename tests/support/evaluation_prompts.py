"""Digests of evaluation prompts, so that a test can tell whether a head was trained on one.

``python -m tests.support.evaluation_prompts FILE… > tests/data/evaluation_prompts.txt`` reads
Spec-Bench's question.jsonl, MT-bench's and Vicuna's questions, GSM8K's test.jsonl and
HumanEval.jsonl. The prompts themselves are not kept here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ppsd.train.records import prompt_digest


def prompts(path: Path) -> Iterator[str]:
    """Every turn or prompt of a JSONL file."""
    for line in path.read_text().split("\n"):
        if line.strip():
            row = json.loads(line)
            yield from row["turns"] if "turns" in row else [row.get("prompt") or row["question"]]


if __name__ == "__main__":
    found = {prompt_digest(text) for name in sys.argv[1:] for text in prompts(Path(name))}
    print("\n".join(sorted(found)))
