"""A tiny teacher and data for tests of training, in float64 so that sums in any order agree."""

from __future__ import annotations

from pathlib import Path

import torch

from ppsd.train.checkpoint import RunDirectory
from ppsd.train.data import Example
from ppsd.train.distill import Cadence, Lesson, Trainer
from ppsd.train.features import live_features
from ppsd.train.run import Teacher, load_teacher
from ppsd.train.settings import DistillConfig

TINY = {"dtype": "float64", "max_length": 64, "batch_tokens": 96, "draft_vocab": 100}


def tiny_config(*exits: int, **changes: object) -> DistillConfig:
    return DistillConfig(exits or (3,), **{**TINY, **changes})


def tiny_teacher(model: Path, config: DistillConfig) -> Teacher:
    return load_teacher(str(model), config, "cpu")


def random_examples(count: int, seed: int = 0) -> list[Example]:
    """Texts whose second half begins like the first, so that there is something to copy."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 30, (count,), generator=generator).tolist()
    halves = [
        torch.randint(3, 290, (n - n // 2,), generator=generator, dtype=torch.int32)
        for n in lengths
    ]
    return [
        Example(torch.cat([half, half])[:n], n // 3)
        for n, half in zip(lengths, halves, strict=True)
    ]


def tiny_trainer(teacher: Teacher, config: DistillConfig, out: Path, **every: int) -> Trainer:
    examples = random_examples(36)
    ids = torch.arange(0, 300, 3) if config.draft_vocab else None
    features = live_features(teacher.stage, config.exit_layers)
    lesson = Lesson(examples[4:], examples[:4], ids, features)
    return Trainer(teacher.stage, config, lesson, RunDirectory(out, {}), Cadence(**every))
